"""From stored pairs to batches: sources, images, tokenizers and the pipeline that joins them. Never imports JAX."""
