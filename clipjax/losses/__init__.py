"""Contrastive losses: pure functions `(image_embed, text_embed, logit_scale, logit_bias) -> (loss, metrics)`.

The value and its gradient are those of the mean over the global batch, whatever mesh computes it.
`contrastive` holds the reference for one device, `sharded` the same on a mesh.
"""

from collections.abc import Callable

from jax import Array
from jax.sharding import Mesh

from clipjax.config import LossKind, LossMethod
from clipjax.losses.contrastive import softmax_loss
from clipjax.losses.sharded import make_gathered_softmax_loss
from clipjax.typing import Metrics

LossFunction = Callable[[Array, Array, Array, Array | None], tuple[Array, Metrics]]


def make_loss(
    *,
    kind: LossKind | str = LossKind.SOFTMAX,
    method: LossMethod | str = LossMethod.AUTO,
    mesh: Mesh | None = None,
) -> LossFunction:
    """The loss of this kind on this mesh; without a mesh, on whole arrays.

    Args:
        kind: `softmax`.
        method: `gathered` or `auto`, which is `gathered` on a mesh.
        mesh: has the axes `data` and `fsdp`, over which the rows of both embeddings are split.

    Raises:
        ValueError: unknown kind or method.
    """
    kind, method = LossKind(kind), LossMethod(method)
    match kind, method:
        case LossKind.SOFTMAX, LossMethod.AUTO | LossMethod.GATHERED:
            return softmax_loss if mesh is None else make_gathered_softmax_loss(mesh)


__all__ = ["LossFunction", "make_loss", "softmax_loss"]
