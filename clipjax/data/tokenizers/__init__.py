"""Text to token ids: one interface, and the tokenizers that a config can name."""
