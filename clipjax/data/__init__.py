"""Pairs to batches: sources, images, tokenizers and the streams that join them. Never imports JAX."""
