"""A page that shows which rank holds what of a model, and what the ranks send."""
