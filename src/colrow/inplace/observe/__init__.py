"""What a model does when it runs: the calls of its modules, and where their values go."""
