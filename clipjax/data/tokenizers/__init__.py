"""Text to token ids: one protocol, and the tokenizers that a config can name."""
