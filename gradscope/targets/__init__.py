"""What to trace and how to build and feed it."""
