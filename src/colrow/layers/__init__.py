"""The parallel layers, a file each; the package colrow offers them by name."""
