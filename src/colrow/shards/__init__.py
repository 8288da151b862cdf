"""What a rank holds of a model: shards of its parameters, and what optimisers do to them."""
