"""Tiny models of every architecture, split and compared with the whole."""
