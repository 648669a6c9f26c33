"""Construction of a loss function, from options (`make_loss`) or from a config (`build_loss`).

Read `make_loss`, `ContrastiveLoss`; then `build_loss` and `with_captions`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clipjax.config import Config, Dtype, GroupRole, LossConfig, LossKind, LossMethod
from clipjax.losses.distillation import Distilled
from clipjax.losses.logit_loss import LogitLoss
from clipjax.losses.partitioning import Pairs
from clipjax.losses.sharded import make_sharded_loss
from clipjax.losses.sigmoid import Sigmoid
from clipjax.losses.signature import LossFunction, MovingAverages, Teacher
from clipjax.losses.softmax import GlobalSoftmax, MultiPositiveSoftmax, Softmax
from clipjax.losses.tiles import DEFAULT_TILE, Scaling, TiledLogits
from clipjax.losses.topology import choose_method
from clipjax.runtime.sharding import SLICE, batch_devices
from clipjax.typing import Metrics

DEFAULT_EPSILON = LossConfig().epsilon


def make_loss(
    *,
    kind: LossKind | str = LossKind.SOFTMAX,
    method: LossMethod | str = LossMethod.AUTO,
    mesh: Mesh | None = None,
    tile: int | None = None,
    dtype: Dtype | str = Dtype.FLOAT32,
    label_smoothing: float = 0.0,
    group_role: GroupRole | str = GroupRole.IGNORED,
    distill_weight: float | None = None,
    epsilon: float = DEFAULT_EPSILON,
    rho: float | None = None,
) -> LossFunction:
    """Make the loss of this kind, in tiles, on this mesh; without a mesh, on whole arrays.

    Args:
        kind: `softmax`, `sigmoid` or `global`.
        method: `gathered`, `ring` or `auto`, which chooses by the number of pairs per device, memory and topology.
        mesh: has some of the axes `slice`, `data` and `fsdp`, over which the rows of both embeddings are split.
        tile: the most rows and columns of the similarity matrix that exist on a device at a time; None: 1,024.
        dtype: of the embeddings that move between devices and enter the products. Sums are float32.
        label_smoothing: softmax only: the share of the target that is spread evenly over the batch.
        group_role: pairs of the same group are `ignored`, or each other's `positive`.
        distill_weight: of the cross-entropy against a teacher, beside the loss itself; None: no teacher.
        epsilon: global only: added to each sample's moving average.
        rho: global only: the loss is divided by the logit scale, and rho / logit_scale added, so that the scale is
            learned as in FastCLIP-v3; None: neither.

    Returns:
        A function of global arrays. Its metrics: in-batch accuracy both ways (a tie is a miss), mean similarity of the
        pairs, and mean over images of their most similar other text. Derivatives of metrics are zero.

    Raises:
        ValueError: unknown kind, method, dtype or role; options that this kind would ignore. From the function: a
            teacher, memory or groups that are missing, or that this loss would ignore.

    Source:
        arXiv 2103.00020, figure 3 (softmax); arXiv 2303.15343, equation 1 (sigmoid); arXiv 2407.01445 (global); arXiv
        2004.11362, equation 2 (several positives); arXiv 2309.12314 (distillation).

    Cost:
        Memory per device: linear in its rows and columns, and one tile; for the traffic see `losses.partitioning`.
    """
    kind, method, dtype, group_role = LossKind(kind), LossMethod(method), Dtype(dtype), GroupRole(group_role)
    positives = group_role is GroupRole.POSITIVE
    _check_options(kind, positives, label_smoothing, tile, distill_weight, epsilon, rho)
    logit_loss = _choose_logit_loss(kind, positives, epsilon, distill_weight)
    tiled = TiledLogits(logit_loss, DEFAULT_TILE if tile is None else tile, jnp.dtype(dtype.value), positives)
    sharded = make_sharded_loss(tiled, method=method, mesh=mesh)
    return ContrastiveLoss(sharded, kind, positives, label_smoothing, distill_weight is not None, rho)


@dataclass(frozen=True)
class ContrastiveLoss:
    """A contrastive loss over the global batch, as `LossFunction` describes it.

    Attributes:
        sharded: pairs and scaling -> value, metrics and the new moving averages.
        kind: only a sigmoid depends on the bias; only `global` needs moving averages.
        positives: true if pairs of the same group are positives, so that groups are needed.
        label_smoothing: share of the target that is spread evenly over the batch.
        distills: true if a teacher is needed.
        rho: of FastCLIP-v3; None: leave the loss as it is.
    """

    sharded: Callable[[Pairs, Scaling], tuple[Array, Metrics, Array | None]]
    kind: LossKind
    positives: bool
    label_smoothing: float
    distills: bool
    rho: float | None

    def __call__(
        self,
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None = None,
        *,
        group: Int[Array, "n"] | None = None,
        teacher: Teacher | None = None,
        memory: MovingAverages | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss and its metrics; see `LossFunction` for the arguments."""
        _check_given("teacher", teacher, needed=self.distills)
        _check_given("memory", memory, needed=self.kind is LossKind.GLOBAL)
        if self.positives or self.label_smoothing:
            _check_given("group", group, needed=self.positives)
        # The zero of a loss that does not depend on the bias gives the caller's bias no gradient.
        bias = logit_bias if self.kind is LossKind.SIGMOID and logit_bias is not None else jnp.zeros_like(logit_scale)
        pairs, scaling = Pairs(image_embed, text_embed, group), Scaling(logit_scale, bias)
        if teacher is not None:
            pairs = pairs._replace(teacher=(teacher.image_embed, teacher.text_embed))
            scaling = scaling._replace(teacher=teacher.logit_scale)
        if memory is not None:
            pairs, scaling = pairs._replace(memory=memory.log_mean), scaling._replace(gamma=memory.gamma)
        value, metrics, new_memory = self.sharded(pairs, scaling)
        if self.label_smoothing:
            own = jnp.mean(jnp.sum(image_embed * text_embed, axis=1))
            every = jnp.sum(jnp.mean(image_embed, axis=0) * jnp.mean(text_embed, axis=0))
            value = value + self.label_smoothing * logit_scale * (own - every)
        if self.rho is not None:
            value = (value + self.rho) / logit_scale
        return value, metrics if new_memory is None else {**metrics, "memory": new_memory}


def _check_options(
    kind: LossKind,
    positives: bool,
    label_smoothing: float,
    tile: int | None,
    distill_weight: float | None,
    epsilon: float,
    rho: float | None,
) -> None:
    """Refuse values out of range, and options that this kind would ignore."""
    if label_smoothing and (kind is not LossKind.SOFTMAX or positives):
        raise ValueError(f"label_smoothing={label_smoothing} needs kind=softmax and group_role=ignored")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be at least 1, or None for {DEFAULT_TILE}")
    if distill_weight is not None and not distill_weight > 0:
        raise ValueError(f"distill_weight={distill_weight} must be greater than 0, or None for no teacher")
    if distill_weight is not None and rho is not None:
        raise ValueError(f"rho={rho} would divide the teacher's part of the loss too; leave out rho or distill_weight")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} must lie between 0 and 1")
    if kind is LossKind.GLOBAL and positives:
        raise ValueError("group_role=positive needs kind=softmax or kind=sigmoid, not global")
    if kind is not LossKind.GLOBAL and (rho is not None or epsilon != DEFAULT_EPSILON):
        raise ValueError(f"rho={rho} and epsilon={epsilon} need kind=global; kind={kind.value} would ignore them")


def _choose_logit_loss(kind: LossKind, positives: bool, epsilon: float, distill_weight: float | None) -> LogitLoss:
    logit_loss: LogitLoss
    match kind:
        case LossKind.SOFTMAX:
            logit_loss = MultiPositiveSoftmax() if positives else Softmax()
        case LossKind.SIGMOID:
            logit_loss = Sigmoid()
        case LossKind.GLOBAL:
            logit_loss = GlobalSoftmax(epsilon)
    return logit_loss if distill_weight is None else Distilled(logit_loss, distill_weight)


def _check_given(name: str, value: object, *, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"this loss needs {name}=...; pass it with the embeddings")
    if not needed and value is not None:
        raise ValueError(f"this loss would ignore {name}; make it with the options that use it")


def build_loss(config: LossConfig, mesh: Mesh) -> LossFunction:
    """Build the loss that a config describes: contrastive, of captions, or both."""
    contrastive = _build_contrastive(config, mesh) if config.contrastive_weight else None
    if contrastive is not None and not config.caption_weight and config.contrastive_weight == 1:
        return contrastive
    return with_captions(contrastive, config.contrastive_weight, config.caption_weight)


def with_captions(contrastive: LossFunction | None, contrastive_weight: float, caption_weight: float) -> LossFunction:
    """Add a contrastive loss (None: without) and the mean negative log-likelihood of captions' tokens, weighted.

    The returned loss also takes `nll` and `num_tokens` [n]; its mean is over all tokens of the global batch.

    Source:
        arXiv 2205.01917, equation 3.
    """

    def loss(*embeds: Any, nll: Any = None, num_tokens: Any = None, **options: Any) -> tuple[Any, Metrics]:
        value, metrics = jnp.zeros((), jnp.float32), {}
        if contrastive is not None:
            contrastive_value, metrics = contrastive(*embeds, **options)
            value = contrastive_weight * contrastive_value
            metrics["contrastive_loss"] = contrastive_value
        if caption_weight:
            caption_value = jnp.sum(nll) / jnp.sum(num_tokens)
            value = value + caption_weight * caption_value
            metrics["caption_loss"] = caption_value
        return value, metrics

    return loss


def _build_contrastive(config: LossConfig, mesh: Mesh) -> LossFunction:
    return make_loss(
        kind=config.kind,
        method=config.method,
        mesh=mesh,
        tile=config.tile,
        dtype=config.dtype,
        label_smoothing=config.label_smoothing,
        group_role=config.group_role,
        distill_weight=None if config.distill_from is None else config.distill_weight,
        epsilon=config.epsilon,
        rho=config.rho,
    )


def describe_loss(config: Config, mesh: Mesh) -> str:
    """Describe the kind, method and tiles that were chosen, for the log."""
    devices, loss = batch_devices(mesh), config.loss
    pair_bytes = 2 * config.model.embed_dim * jnp.dtype(loss.dtype.value).itemsize
    method = choose_method(loss.method, mesh, config.global_batch_size, pair_bytes)
    slices = f" in {mesh.shape[SLICE]} slices" if mesh.shape[SLICE] > 1 else ""
    sharing = f"{method.value} over {devices} devices{slices}, " if devices > 1 else ""
    tile = f"tiles of at most {DEFAULT_TILE if loss.tile is None else loss.tile}"
    cached = "" if config.microbatch_size is None else f", {config.microbatch_size} pairs encoded at a time"
    return f"loss: {loss.kind.value}, {sharing}{tile}{cached}"
