"""A session in, text or a picture out; a reporter opens no file and parses no flag."""
