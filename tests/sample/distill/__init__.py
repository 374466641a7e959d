"""Distil a large vision model into a small one."""
