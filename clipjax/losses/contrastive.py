"""Contrastive losses on whole arrays: the reference that every sharded twin is tested against.

Axes: n pairs of the global batch, e embed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.typing import Metrics


def similarity(rows: Float[Array, "n e"], columns: Float[Array, "m e"]) -> Float[Array, "n m"]:
    """All dot products in full float32, also where the hardware's default for float32 is fewer bits."""
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def softmax_loss(
    image_embed: Float[Array, "n e"],
    text_embed: Float[Array, "n e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric cross-entropy over the n x n similarity matrix, mean over the n pairs and both directions.

    A bias added to every logit leaves a softmax as it is, so `logit_bias` does not enter.

    Returns:
        The loss, and `image_to_text_accuracy` and `text_to_image_accuracy` within the batch.

    Source:
        arXiv 2103.00020, figure 3.
    """
    del logit_bias
    logits = logit_scale * similarity(image_embed, text_embed)
    positive = jnp.diagonal(logits)
    row_lse = jax.nn.logsumexp(logits, axis=1)
    column_lse = jax.nn.logsumexp(logits, axis=0)
    loss = jnp.mean(row_lse + column_lse - 2 * positive) / 2
    own = jnp.arange(logits.shape[0])
    return loss, {
        "image_to_text_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == own, dtype=jnp.float32),
        "text_to_image_accuracy": jnp.mean(jnp.argmax(logits, axis=0) == own, dtype=jnp.float32),
    }
