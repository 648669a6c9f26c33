"""Conversion of peers' weights: a peer's directory to a checkpoint (`importer`), and back (`exporter`).

A table pairs a peer's weights with ours; `rules` applies it in either direction. One module per peer holds its table
and reads its config; `files`, `tokenizers` and `preprocessing` handle the other files beside the weights.
"""
