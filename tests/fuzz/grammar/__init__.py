"""Modules that nobody foresaw: what users write, put together at random."""
