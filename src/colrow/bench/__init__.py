"""Where the time of a layer, a block or a model goes, by tensor-parallel size."""
