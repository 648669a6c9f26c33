"""What fills a chip's memory while a step runs, by kind."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.config import Config, Dtype


def bytes_on_a_chip(tree: Any) -> int:
    """Of all arrays of a tree, one chip's part; a PRNG key counts as its words."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += 8
        else:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def by_kind(config: Config, state: Any, batch: Any, teacher: Any, peak_bytes: int) -> Mapping[str, int]:
    """Bytes of one chip at the peak of a step. What is no argument of the step is split by what is known of it.

    `loss` is what the embeddings of the whole batch take, which a ring never has together; `activations` is the rest:
    what the towers keep for the backward pass, what they work in, and blocks of logits.
    """
    params = bytes_on_a_chip(state.params)
    kinds = {
        "parameters": params,
        "optimizer": bytes_on_a_chip((state.opt_state, state.ema)),
        "batch": bytes_on_a_chip(batch),
        "other state": bytes_on_a_chip((state.memory, state.batch_stats, teacher)),
        "gradients": params,
        "loss": _loss_bytes(config),
    }
    kinds["activations"] = max(0, peak_bytes - sum(kinds.values()))
    return {kind: size for kind, size in kinds.items() if size}


def _loss_bytes(config: Config) -> int:
    """Embeddings of all pairs, of images and of texts."""
    size = 2 if config.loss.dtype is Dtype.BFLOAT16 else 4
    return 2 * config.global_batch_size * config.model.embed_dim * size
