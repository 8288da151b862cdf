"""Split and whole compared: the measure, the unsplit reference, and what was sent."""
