"""Evaluation tasks. Each gets an `Encoder` (functions from pixels and texts to embeddings) and gives metrics."""
