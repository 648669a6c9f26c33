"""Contrastive losses: pure functions `(image_embed, text_embed, logit_scale, logit_bias) -> (loss, metrics)`.

The value and its gradient are those of the mean over the global batch, whatever mesh, method or tile computes it.
`contrastive` holds the plain references; `kinds` says what each kind of loss does with a logit, `tiles` walks through a
block of the similarity matrix, `sharded` shares the matrix out among devices.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clipjax.config import Config, Dtype, LossConfig, LossKind, LossMethod
from clipjax.losses.contrastive import sigmoid_loss, softmax_loss
from clipjax.losses.kinds import Sigmoid, Softmax
from clipjax.losses.sharded import Pairs, choose_method, make_sharded_loss
from clipjax.losses.tiles import DEFAULT_TILE, Product, Scaling
from clipjax.sharding import batch_devices
from clipjax.typing import Metrics


@runtime_checkable
class LossFunction(Protocol):
    """A loss over the global batch."""

    def __call__(
        self,
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None = None,
        *,
        group: Int[Array, "n"] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Loss and metrics.

        Args:
            image_embed: unit-norm.
            text_embed: unit-norm; row i belongs to image i.
            logit_scale: multiplier of the similarities.
            logit_bias: added to the logits; a softmax does not depend on it.
            group: pairs of the same group are no negatives of each other.
        """
        ...


def make_loss(
    *,
    kind: LossKind | str = LossKind.SOFTMAX,
    method: LossMethod | str = LossMethod.AUTO,
    mesh: Mesh | None = None,
    tile: int | None = None,
    dtype: Dtype | str = Dtype.FLOAT32,
    label_smoothing: float = 0.0,
) -> LossFunction:
    """The loss of this kind, in tiles, on this mesh; without a mesh, on whole arrays.

    Args:
        kind: `softmax` or `sigmoid`.
        method: `gathered`, `ring` or `auto`, which chooses by the number of pairs per device.
        mesh: has the axes `data` and `fsdp`, over which the rows of both embeddings are split.
        tile: at most so many rows and columns of the similarity matrix exist on a device at a time; None: 1,024.
        dtype: of the embeddings that move between devices and enter the products. Sums are float32.
        label_smoothing: softmax only: the share of the target that is spread evenly over the batch.

    Returns:
        A function of global arrays. Its metrics: in-batch accuracy both ways (a tie is a miss), mean similarity of the
        pairs, and mean over images of their most similar other text. Derivatives of metrics are zero.

    Raises:
        ValueError: unknown kind or method.

    Source:
        arXiv 2103.00020, figure 3 (softmax); arXiv 2303.15343, equation 1 (sigmoid).

    Cost:
        Memory per device: linear in its rows and columns, and one tile; see `losses.sharded` for what moves.
    """
    kind, method, dtype = LossKind(kind), LossMethod(method), Dtype(dtype)
    match kind:
        case LossKind.SOFTMAX:
            rules = Softmax()
        case LossKind.SIGMOID:
            rules = Sigmoid()
    product = Product(rules, DEFAULT_TILE if tile is None else tile, jnp.dtype(dtype.value))
    tiled = make_sharded_loss(product, method=method, mesh=mesh)

    def loss(
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None = None,
        *,
        group: Int[Array, "n"] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        # A softmax does not depend on the bias; what is zero here gets no gradient there.
        bias = jnp.zeros_like(logit_scale) if kind is LossKind.SOFTMAX or logit_bias is None else logit_bias
        value, metrics = tiled(Pairs(image_embed, text_embed, group), Scaling(logit_scale, bias))
        if label_smoothing:
            own = jnp.mean(jnp.sum(image_embed * text_embed, axis=1))
            every = jnp.vdot(jnp.mean(image_embed, axis=0), jnp.mean(text_embed, axis=0))
            value = value + label_smoothing * logit_scale * (own - every)
        return value, metrics

    return loss


def build_loss(config: LossConfig, mesh: Mesh) -> LossFunction:
    """The loss that a config describes."""
    return make_loss(
        kind=config.kind,
        method=config.method,
        mesh=mesh,
        tile=config.tile,
        dtype=config.dtype,
        label_smoothing=config.label_smoothing,
    )


def describe_loss(config: Config, mesh: Mesh) -> str:
    """What was chosen, for the log."""
    devices, loss = batch_devices(mesh), config.loss
    way = f"{choose_method(loss.method, mesh, config.global_batch_size).value} over {devices} devices, "
    tile = f"tiles of at most {DEFAULT_TILE if loss.tile is None else loss.tile}"
    cached = "" if config.microbatch_size is None else f", {config.microbatch_size} pairs encoded at a time"
    return f"loss: {loss.kind.value}, {way if devices > 1 else ''}{tile}{cached}"


__all__ = ["LossFunction", "build_loss", "choose_method", "describe_loss", "make_loss", "sigmoid_loss", "softmax_loss"]
