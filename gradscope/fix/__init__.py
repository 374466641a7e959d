"""Ways out: reference fixers for libraries that cut the gradient."""
