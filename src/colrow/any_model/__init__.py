"""A tensor-parallel model of any architecture, as every command takes it."""
