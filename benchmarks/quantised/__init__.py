"""What multiplies quantised weights, how fast and how exactly."""
