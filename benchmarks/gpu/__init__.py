"""What one rank of a large model does with its GPU: ``python -m benchmarks.gpu``."""
