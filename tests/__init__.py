"""colrow's tests; a package, so that the ranks can import them by name."""
