"""Optimisers and a gradient scaler that are right where parameters are divided over ranks."""
