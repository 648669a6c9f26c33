"""Weights in and out: tables that say which of a peer's weights is which of ours. No file is touched in here.

`rules` applies a table in either direction; one module per peer reads its config and gives its table.
"""
