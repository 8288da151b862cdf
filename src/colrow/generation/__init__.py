"""Generation: key-value cache, sampling from vocab-parallel logits, tokenizers, streaming."""
