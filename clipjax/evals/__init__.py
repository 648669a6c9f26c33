"""Evaluation tasks. Each gets an `Encoder`, which embeds pixels and texts, and gives metrics."""
