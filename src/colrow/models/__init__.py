"""The one decoder, its configuration, and a small table per model family."""
