"""What can be split in a model, found and proven in one process; the model is not changed."""
