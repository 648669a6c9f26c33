"""Contrastive losses on whole arrays, as the papers write them: references for the tiled and sharded ones.

Axes: n pairs of the global batch, e embed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.typing import Metrics


def _logits(
    image_embed: Float[Array, "n e"],
    text_embed: Float[Array, "n e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None,
) -> Float[Array, "n n"]:
    """Compute all logits in full float32, also where the hardware's default for float32 is fewer bits."""
    similarity = jnp.matmul(image_embed, text_embed.T, precision=jax.lax.Precision.HIGHEST)
    return logit_scale * similarity + (0 if logit_bias is None else logit_bias)


def _negatives(n: int, group: Int[Array, "n"] | None) -> Array:
    """Mark the pairs off the diagonal that count, bool [n, n]."""
    group = jnp.arange(n) if group is None else group
    return group[:, None] != group[None, :]


def softmax_loss(
    image_embed: Float[Array, "n e"],
    text_embed: Float[Array, "n e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    group: Int[Array, "n"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Compute the symmetric cross-entropy over the n x n similarity matrix, mean over the pairs and both directions.

    A bias added to every logit leaves a softmax as it is, so `logit_bias` does not enter.

    Source:
        arXiv 2103.00020, figure 3.
    """
    del logit_bias
    logits = _logits(image_embed, text_embed, logit_scale, None)
    own = jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(own | _negatives(len(logits), group), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(lse - 2 * jnp.diagonal(logits)) / 2, _metrics(logits)


def sigmoid_loss(
    image_embed: Float[Array, "n e"],
    text_embed: Float[Array, "n e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    group: Int[Array, "n"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Compute the binary cross-entropy of every pair, summed over the n x n logits and divided by n.

    Source:
        arXiv 2303.15343, equation 1.
    """
    logits = _logits(image_embed, text_embed, logit_scale, logit_bias)
    others = jnp.where(_negatives(len(logits), group), jax.nn.softplus(logits), 0)
    return jnp.mean(jnp.sum(others, axis=1) + jax.nn.softplus(-jnp.diagonal(logits))), _metrics(logits)


def _metrics(logits: Float[Array, "n n"]) -> Metrics:
    """Compute the in-batch accuracy both ways; a tie is a miss."""
    others = jnp.where(jnp.eye(len(logits), dtype=bool), -jnp.inf, logits)
    return {
        "image_to_text_accuracy": jnp.mean(jnp.diagonal(logits) > jnp.max(others, axis=1), dtype=jnp.float32),
        "text_to_image_accuracy": jnp.mean(jnp.diagonal(logits) > jnp.max(others, axis=0), dtype=jnp.float32),
    }
