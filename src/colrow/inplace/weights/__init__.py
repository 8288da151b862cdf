"""The weights of a split model: read part by part, made up for the meta device, saved whole."""
