"""Reading and writing: safetensors, GGUF, training state."""
