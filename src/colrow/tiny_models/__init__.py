"""Tiny random models of every architecture of transformers."""
