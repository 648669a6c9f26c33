"""Contrastive losses on a mesh: each device computes its own rows and columns of the global similarity matrix.

Axes: n pairs of the global batch, r pairs of one device, e embed. `rows` are a device's own embeddings, `columns` the
gathered embeddings of the other tower.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clipjax.losses.contrastive import similarity
from clipjax.sharding import BATCH_AXES
from clipjax.typing import Metrics

SPLIT, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()


def make_gathered_softmax_loss(mesh: Mesh) -> Callable[..., tuple[Array, Metrics]]:
    """`contrastive.softmax_loss` with both embeddings split over the batch axes of the mesh.

    Both embeddings are gathered once, in the forward pass. In the backward pass every device forms the complete
    gradient of its own rows from the gathered embeddings and the log-sum-exps of all rows and columns, so no
    gradient has to be reduced across devices.

    Cost:
        Per device: two [r, n] float32 blocks of logits; moved: 2 n e floats of embeddings and 2 n of log-sum-exps.
    """
    saved_specs = (SPLIT, SPLIT, WHOLE, WHOLE, SPLIT, SPLIT)  # own embeddings, gathered embeddings, log-sum-exps
    # check_vma cannot see that a gathered array is the same on every device.
    forward = jax.shard_map(
        _forward,
        mesh=mesh,
        in_specs=(SPLIT, SPLIT, WHOLE),
        out_specs=(WHOLE, WHOLE, saved_specs),
        check_vma=False,
    )
    backward = jax.shard_map(
        _backward,
        mesh=mesh,
        in_specs=(WHOLE, WHOLE, saved_specs),
        out_specs=(SPLIT, SPLIT, WHOLE),
        check_vma=False,
    )

    @jax.custom_vjp
    def loss(image_embed: Array, text_embed: Array, logit_scale: Array) -> tuple[Array, Metrics]:
        value, metrics, _ = forward(image_embed, text_embed, logit_scale)
        return value, metrics

    def loss_forward(image_embed: Array, text_embed: Array, logit_scale: Array) -> tuple[Any, Any]:
        value, metrics, saved = forward(image_embed, text_embed, logit_scale)
        return (value, metrics), (logit_scale, saved)

    def loss_backward(residuals: Any, cotangents: Any) -> tuple[Array, Array, Array]:
        logit_scale, saved = residuals
        return backward(cotangents[0], logit_scale, saved)

    loss.defvjp(loss_forward, loss_backward)

    def gathered_softmax_loss(
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        del logit_bias  # as in the reference
        return loss(image_embed, text_embed, logit_scale)

    return gathered_softmax_loss


def _gather(x: Float[Array, "r ..."]) -> Float[Array, "n ..."]:
    return jax.lax.all_gather(x, BATCH_AXES, axis=0, tiled=True)


def _own(rows: int) -> Array:
    """Global positions of this device's rows."""
    return jax.lax.axis_index(BATCH_AXES) * rows + jnp.arange(rows)


def _forward(image_embed: Array, text_embed: Array, logit_scale: Array) -> tuple[Array, Metrics, tuple[Array, ...]]:
    image_all, text_all = _gather(image_embed), _gather(text_embed)
    own = _own(image_embed.shape[0])
    image_lse, image_hits = _row_statistics(image_embed, text_all, logit_scale, own)
    text_lse, text_hits = _row_statistics(text_embed, image_all, logit_scale, own)
    positive = logit_scale * jnp.sum(image_embed * text_embed, axis=1)
    sums = jnp.stack([jnp.sum(image_lse + text_lse - 2 * positive) / 2, jnp.sum(image_hits), jnp.sum(text_hits)])
    loss, image_accuracy, text_accuracy = jax.lax.psum(sums, BATCH_AXES) / image_all.shape[0]
    metrics = {"image_to_text_accuracy": image_accuracy, "text_to_image_accuracy": text_accuracy}
    return loss, metrics, (image_embed, text_embed, image_all, text_all, image_lse, text_lse)


def _row_statistics(rows: Array, columns: Array, logit_scale: Array, own: Array) -> tuple[Array, Array]:
    """Log-sum-exp of every row, and whether its largest logit is the positive pair."""
    logits = logit_scale * similarity(rows, columns)
    return jax.nn.logsumexp(logits, axis=1), (jnp.argmax(logits, axis=1) == own).astype(jnp.float32)


def _backward(cotangent: Array, logit_scale: Array, saved: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    image_embed, text_embed, image_all, text_all, image_lse, text_lse = saved
    own = _own(image_embed.shape[0])
    weight = cotangent / (2 * image_all.shape[0])
    image_grad, scale_grad = _row_gradient(image_embed, text_all, logit_scale, (image_lse, _gather(text_lse)), own)
    text_grad, _ = _row_gradient(text_embed, image_all, logit_scale, (text_lse, _gather(image_lse)), own)
    scale_grad = jax.lax.psum(weight * scale_grad, BATCH_AXES)
    return weight * logit_scale * image_grad, weight * logit_scale * text_grad, scale_grad


def _row_gradient(
    rows: Array, columns: Array, logit_scale: Array, lse: tuple[Array, Array], own: Array
) -> tuple[Array, Array]:
    """Gradients of 2 n times the loss: of the rows (before the scale), and of the scale over these rows.

    A logit enters the softmax of its row and that of its column, and, on the diagonal, both positives.
    """
    cosine = similarity(rows, columns)
    logits = logit_scale * cosine
    grad = jnp.exp(logits - lse[0][:, None]) + jnp.exp(logits - lse[1][None, :])
    diagonal = own[:, None] == jnp.arange(columns.shape[0])[None, :]
    grad = jnp.where(diagonal, grad - 2, grad)
    rows_grad = jax.lax.dot_general(grad, columns, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return rows_grad, jnp.sum(grad * cosine)
