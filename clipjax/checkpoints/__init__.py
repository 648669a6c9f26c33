"""Checkpoints: arrays, data position, config, tokenizer and preprocessing, all in one step directory."""
