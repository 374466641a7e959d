"""Source to findings, without importing or running any of it: resolve, read, walk, join, judge."""
