"""Contents of a chip's memory at the peak of a step, by kind."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.config import Config, Dtype


def bytes_on_a_chip(tree: Any) -> int:
    """Count the bytes of one chip's part of all arrays of a tree; a PRNG key counts as its words."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += 8
        else:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def by_kind(config: Config, state: Any, batch: Any, teacher: Any, peak_bytes: int) -> Mapping[str, int]:
    """Split the bytes of one chip at the peak of a step by kind.

    `loss` counts the embeddings of the whole batch, which a ring never has together; `activations` is the rest: arrays
    that the towers keep for the backward pass, their temporaries, and blocks of logits.
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
    """Count the bytes of the embeddings of all images and texts."""
    size, texts = 2 if config.loss.dtype is Dtype.BFLOAT16 else 4, config.data.captions_per_image
    return (1 + texts) * config.global_batch_size * config.model.embed_dim * size
