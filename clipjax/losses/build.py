"""Construction of a loss function, from options (`make_loss`) or from a config (`build_loss`).

Reading order: `make_loss`, `ContrastiveLoss`; then `build_loss`, `TrainingLoss`.
"""

import functools
from dataclasses import KW_ONLY, dataclass
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
from clipjax.losses.signature import LossInputs, LossResults, MovingAverages, Teacher
from clipjax.losses.softmax import GlobalSoftmax, MultiPositiveSoftmax, Softmax
from clipjax.losses.tiles import DEFAULT_TILE, Scaling, TiledLogits
from clipjax.losses.topology import choose_method
from clipjax.runtime.sharding import SLICE, batch_devices
from clipjax.typing import Encoded, Metrics

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
) -> "ContrastiveLoss":
    """Make the loss of this kind, in tiles, on this mesh; without a mesh, on whole arrays.

    Args:
        kind: `softmax`, `sigmoid` or `global`.
        method: `gathered`, `ring` or `auto`, which chooses by the number of pairs per device, memory and topology.
        mesh: has some of the axes `slice`, `data` and `fsdp`, over which the rows of both embeddings are split.
        tile: at most so many rows and columns of the similarity matrix exist on a device at a time; None: 1,024.
        dtype: of the embeddings that move between devices and enter the products. Sums are float32.
        label_smoothing: softmax only: the share of the target that is spread evenly over the batch.
        group_role: pairs of the same group are `ignored`, or each other's `positive`.
        distill_weight: of the cross-entropy against a teacher, besides the loss itself; None: no teacher.
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
        Memory per device: linear in its rows and columns, and one tile; see `losses.partitioning` for what moves.
    """
    kind, method, dtype, group_role = LossKind(kind), LossMethod(method), Dtype(dtype), GroupRole(group_role)
    positives = group_role is GroupRole.POSITIVE
    _check_options(kind, positives, label_smoothing, tile, distill_weight, epsilon, rho)
    logit_loss = _choose_logit_loss(kind, positives, epsilon, distill_weight)
    tiled = TiledLogits(logit_loss, DEFAULT_TILE if tile is None else tile, jnp.dtype(dtype.value), positives)
    distilled = distill_weight is not None
    return ContrastiveLoss(tiled, kind, method, mesh, label_smoothing=label_smoothing, distilled=distilled, rho=rho)


@dataclass(frozen=True, eq=False)
class ContrastiveLoss:
    """The loss that `make_loss` describes, a `LossFunction`.

    Attributes:
        tiled: the logit loss, in tiles.
        kind: the kind of loss.
        method: the way in which devices share the similarity matrix.
        mesh: has the axes over which the rows of both embeddings are split; None: whole arrays.
        label_smoothing: share of the target that is spread evenly over the batch.
        distilled: the loss needs a teacher.
        rho: margin by which the `global` loss learns its scale.
    """

    tiled: TiledLogits
    kind: LossKind
    method: LossMethod
    mesh: Mesh | None
    _: KW_ONLY
    label_smoothing: float
    distilled: bool
    rho: float | None

    @functools.cached_property
    def _sharded(self) -> Any:
        return make_sharded_loss(self.tiled, method=self.method, mesh=self.mesh)

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
        """Return loss and metrics; see `LossFunction`."""
        inputs = LossInputs(group, teacher, memory)
        results = self.evaluate(image_embed, text_embed, logit_scale, logit_bias, inputs)
        return results.loss, results.metrics

    def evaluate(
        self,
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None,
        inputs: LossInputs,
    ) -> LossResults:
        """Return loss and metrics, and the new moving averages of the `global` loss.

        Raises:
            ValueError: a teacher, memory or groups that are missing, or that this loss would ignore.
        """
        positives, (group, teacher, memory) = self.tiled.positives, inputs
        _check_given("teacher", teacher, needed=self.distilled)
        _check_given("memory", memory, needed=self.kind is LossKind.GLOBAL)
        if positives or self.label_smoothing:
            _check_given("group", group, needed=positives)
        # Only a sigmoid depends on the bias; what is zero here gets no gradient there.
        bias = logit_bias if self.kind is LossKind.SIGMOID and logit_bias is not None else jnp.zeros_like(logit_scale)
        pairs = Pairs(image_embed, text_embed, group)
        scaling = Scaling(logit_scale, bias)
        if teacher is not None:
            pairs = pairs._replace(teacher=(teacher.image_embed, teacher.text_embed))
            scaling = scaling._replace(teacher=teacher.logit_scale)
        if memory is not None:
            pairs, scaling = pairs._replace(memory=memory.log_mean), scaling._replace(gamma=memory.gamma)
        value, metrics, new_memory = self._sharded(pairs, scaling)
        if self.label_smoothing:
            own = jnp.mean(jnp.sum(image_embed * text_embed, axis=1))
            every = jnp.sum(jnp.mean(image_embed, axis=0) * jnp.mean(text_embed, axis=0))
            value = value + self.label_smoothing * logit_scale * (own - every)
        if self.rho is not None:
            value = (value + self.rho) / logit_scale
        return LossResults(value, metrics, new_memory)


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
        raise ValueError(f"rho={rho} would divide what is learned from a teacher too; leave out one of them")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} must lie between 0 and 1")
    if kind is LossKind.GLOBAL and positives:
        raise ValueError("group_role=positive needs kind=softmax or kind=sigmoid, not global")
    if kind is not LossKind.GLOBAL and (rho is not None or epsilon != DEFAULT_EPSILON):
        raise ValueError(f"rho={rho} and epsilon={epsilon} need kind=global; kind={kind.value} would ignore them")


def _choose_logit_loss(kind: LossKind, positives: bool, epsilon: float, distill_weight: float | None) -> LogitLoss:
    """Return the logit loss of this kind and these options."""
    rules: LogitLoss
    match kind:
        case LossKind.SOFTMAX:
            rules = MultiPositiveSoftmax() if positives else Softmax()
        case LossKind.SIGMOID:
            rules = Sigmoid()
        case LossKind.GLOBAL:
            rules = GlobalSoftmax(epsilon)
    return rules if distill_weight is None else Distilled(rules, distill_weight)


def _check_given(name: str, value: object, *, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"this loss needs {name}=...")
    if not needed and value is not None:
        raise ValueError(f"this loss would ignore {name}; make it with the options that use it")


@dataclass(frozen=True, eq=False)
class TrainingLoss:
    """Weighted sum of a contrastive loss and the mean negative log-likelihood of the captions' tokens.

    The second mean is over all tokens of the global batch. With k texts of each image the contrastive loss is the mean
    of k losses over the global batch, each of the images and their texts of one number.

    Attributes:
        contrastive: loss of the embeddings; None: without.
        contrastive_weight: its weight.
        caption_weight: weight of the captions' negative log-likelihood; 0: without.

    Source:
        arXiv 2205.01917, equation 3; arXiv 2505.04601 (several texts).
    """

    contrastive: ContrastiveLoss | None
    contrastive_weight: float = 1.0
    caption_weight: float = 0.0

    def __call__(self, encoded: Encoded, inputs: LossInputs) -> LossResults:
        """Return the loss of what a model gives for the global batch."""
        results = LossResults(jnp.zeros((), jnp.float32), {})
        if self.contrastive is not None:
            results = self._contrast(self.contrastive, encoded, inputs)
            if not self.caption_weight and self.contrastive_weight == 1:
                return results
            metrics = {**results.metrics, "contrastive_loss": results.loss}
            results = results._replace(loss=self.contrastive_weight * results.loss, metrics=metrics)
        if self.caption_weight:
            caption_loss = jnp.sum(encoded.nll) / jnp.sum(encoded.num_tokens)  # type: ignore[arg-type]
            metrics = {**results.metrics, "caption_loss": caption_loss}
            results = results._replace(loss=results.loss + self.caption_weight * caption_loss, metrics=metrics)
        return results

    def _contrast(self, loss: ContrastiveLoss, encoded: Encoded, inputs: LossInputs) -> LossResults:
        """Return the contrastive loss, or the mean over the texts of an image, of which memory and teacher have one."""
        image, text, scale, bias = encoded[:4]
        if text.ndim == 2:
            return loss.evaluate(image, text, scale, bias, inputs)
        assert inputs.teacher is None and inputs.memory is None
        count, group = text.shape[1], inputs.group
        each = [
            loss.evaluate(
                image,
                text[:, k],
                scale,
                bias,
                inputs._replace(group=group if group is None or group.ndim == 1 else group[:, k]),
            )
            for k in range(count)
        ]
        metrics = {name: sum(part.metrics[name] for part in each) / count for name in each[0].metrics}
        return LossResults(sum((part.loss for part in each[1:]), each[0].loss) / count, metrics)


def build_loss(config: LossConfig, mesh: Mesh) -> TrainingLoss:
    """Return the loss that a config describes: contrastive, of captions, or both."""
    contrastive = _build_contrastive(config, mesh) if config.contrastive_weight else None
    return TrainingLoss(contrastive, config.contrastive_weight, config.caption_weight)


def _build_contrastive(config: LossConfig, mesh: Mesh) -> ContrastiveLoss:
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
    """Describe the chosen loss, method and tile, for the log."""
    devices, loss = batch_devices(mesh), config.loss
    pair_bytes = 2 * config.model.embed_dim * jnp.dtype(loss.dtype.value).itemsize
    method = choose_method(loss.method, mesh, config.global_batch_size, pair_bytes)
    slices = f" in {mesh.shape[SLICE]} slices" if mesh.shape[SLICE] > 1 else ""
    way = f"{method.value} over {devices} devices{slices}, " if devices > 1 else ""
    tile = f"tiles of at most {DEFAULT_TILE if loss.tile is None else loss.tile}"
    cached = "" if config.microbatch_size is None else f", {config.microbatch_size} pairs encoded at a time"
    count = config.data.captions_per_image
    texts = "" if count == 1 else f", mean over {count} captions of each image"
    return f"loss: {loss.kind.value}, {way}{tile}{cached}{texts}"
