"""The command line: one file a command, each of which parses options and calls one library function."""
