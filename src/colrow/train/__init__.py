"""Training: data, steps that do not depend on the layout, checkpoints, faults, reports."""
