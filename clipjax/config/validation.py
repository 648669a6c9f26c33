"""What can be wrong with a config, told before any device is touched: field, value, rule, remedy.

`validate` needs nothing but the config; `validate_devices` also the numbers of devices and processes.
"""

import math
import re
from collections.abc import Sequence

from clipjax.config.data import TaskKind
from clipjax.config.loss import LossKind
from clipjax.config.loss_validation import _loss_errors
from clipjax.config.model import AttentionMethod, ImagePool, ResNetConfig
from clipjax.config.model_validation import LANES, caption_errors, model_errors
from clipjax.config.run import Config, resolve_mesh
from clipjax.config.serialization import field_value, from_dict, to_dict

BATCH_FIELDS = ("global_batch_size", "microbatch_size", "eval.batch_size")
"""Batches that the mesh and the processes share out."""


MESH_AXES = ("data", "fsdp", "tensor")
"""Those of which one may fill up."""


MEMORY_UNIT = 2**12 * 3 * 5
"""The memory of the `global` loss has room for a multiple of so many samples, so that it can be split and restored over
any number of devices that divides this."""


METRICS = {
    TaskKind.ZERO_SHOT: ("top1", "top5"),
    TaskKind.RETRIEVAL: tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    TaskKind.IMAGE_RETRIEVAL: tuple(
        f"{way}_r{k}" for way in ("source_to_gallery", "gallery_to_source") for k in (1, 5, 10)
    ),
}
"""Metrics of each kind of task that a best checkpoint can be chosen by."""


def validate(config: Config, *, batch_fields: Sequence[str] = BATCH_FIELDS) -> None:
    """Check all that can be known without a device.

    Raises:
        ValueError: everything that is wrong, a line each: field, value, rule, remedy.
    """
    errors = [*_type_errors(config), *_range_errors(config)]
    if not errors:
        errors = _batch_errors(config) if "global_batch_size" in batch_fields else []
        errors += [*model_errors(config), *caption_errors(config), *_part_errors(config)]
        # An axis of -1 is not known yet: 1 divides everything, and `validate_devices` looks again.
        mesh = config.mesh
        sizes = mesh.slice or 1, max(1, mesh.data), max(1, mesh.fsdp), max(1, mesh.tensor)
        errors += _division_errors(config, sizes, batch_fields)
    if errors:
        raise ValueError("\n".join(errors))


def validate_devices(
    config: Config,
    *,
    num_devices: int,
    num_processes: int,
    num_slices: int = 1,
    batch_fields: Sequence[str] = BATCH_FIELDS,
    teacher: Config | None = None,
    platform: str = "",
) -> None:
    """Check the mesh, and what it has to divide, against the machine, before a mesh exists.

    Args:
        config: the run, or what is evaluated.
        num_devices: of all processes.
        num_processes: that share them evenly.
        num_slices: groups that the hardware says the devices form.
        batch_fields: which batches there are.
        teacher: what a frozen model was trained with that lies on the same mesh.
        platform: of the devices, "cpu", "gpu" or "tpu", where it is known.

    Raises:
        ValueError: mesh sizes that do not fit, or a batch or model that cannot be shared out evenly.
    """
    sizes = resolve_mesh(config.mesh, num_devices, num_slices)
    errors = _division_errors(config, sizes, batch_fields)
    if teacher is not None:
        errors += [f"loss.distill_from: its {error}" for error in _division_errors(teacher, sizes, ())]
    if num_slices not in (1, sizes[0]):
        errors.append(f"mesh.slice={sizes[0]} must be {num_slices}, the slices of the hardware; None finds out")
    tensor = sizes[-1]
    if platform and (problem := _attention_error(config, platform, tensor)):
        errors.append(problem)
    if num_devices // num_processes % tensor:
        errors.append(
            f"mesh.tensor={tensor} must divide the {num_devices // num_processes} devices of each process, "
            "so that every process reads whole rows of the batch"
        )
    for path in batch_fields:
        errors += _division_error(config, path, num_processes, "the number of processes")
    if errors:
        raise ValueError("\n".join(errors))


def _attention_error(config: Config, platform: str, tensor: int) -> str | None:
    """A way to compute attention that these devices do not have."""
    method, places = config.model.attention, {AttentionMethod.FUSED: ("tpu", "cpu"), AttentionMethod.CUDNN: ("gpu",)}
    if platform not in places.get(method, (platform,)):
        return f"model.attention={method.value} is not for devices of platform {platform}; use auto"
    if method is AttentionMethod.FUSED:
        for path in ("model.image.width", "model.text.width"):
            width = field_value(config, path)
            if width // tensor % LANES:
                rule = f"must be a multiple of {LANES}; use auto"
                return f"model.attention=fused: {path}={width} / mesh.tensor={tensor} {rule}"
    return None


def _division_errors(config: Config, sizes: tuple[int, int, int, int], batch_fields: Sequence[str]) -> list[str]:
    """Sizes that the mesh axes split but do not divide."""
    (slices, data, fsdp, tensor), errors = sizes, []
    parts = f"mesh.slice={slices} * " if slices > 1 else ""
    for path in batch_fields:
        errors += _division_error(config, path, slices * data * fsdp, f"{parts}mesh.data={data} * mesh.fsdp={fsdp}")
    trains = "global_batch_size" in batch_fields
    if trains and config.loss.kind is LossKind.GLOBAL and MEMORY_UNIT % (slices * data * fsdp):
        errors.append(
            f"loss.kind=global keeps its memory in parts, and needs a number of devices that divides {MEMORY_UNIT} "
            f"({parts}mesh.data={data} * mesh.fsdp={fsdp})"
        )
    for tower in ("model.image", "model.text"):
        errors += _division_error(config, f"{tower}.num_heads", tensor, f"mesh.tensor={tensor}")
        errors += _division_error(config, f"{tower}.mlp_dim", tensor, f"mesh.tensor={tensor}")
        half = 2 if tower == "model.image" and isinstance(config.model.image, ResNetConfig) else 1
        what = (
            f"mesh.fsdp={fsdp}" if half == 1 else f"2 * mesh.fsdp={fsdp}, as the first layer has half as many channels"
        )
        errors += _division_error(config, f"{tower}.width", half * fsdp, what)
    wide = config.model.caption is not None or getattr(config.model.image, "pool", None) is ImagePool.QUERIES
    if wide:  # a head or a pooling takes the embedding as its input
        errors += _division_error(config, "model.embed_dim", fsdp, f"mesh.fsdp={fsdp}")
    errors += _division_error(config, "model.caption.num_heads", tensor, f"mesh.tensor={tensor}")
    for path in ("model.embed_dim", "model.text.vocab_size"):
        errors += _division_error(config, path, tensor, f"mesh.tensor={tensor}")
    return errors


def _division_error(config: Config, path: str, divisor: int, what: str) -> list[str]:
    value = field_value(config, path)
    if (
        path.endswith(".mlp_dim")
        and value is None
        and field_value(config, path.replace("mlp_dim", "depth")) is not None
    ):
        value = 4 * field_value(config, path.replace("mlp_dim", "width"))
    if value is None or value % divisor == 0:
        return []
    lower = value // divisor * divisor
    nearest = ", ".join(str(size) for size in (lower, lower + divisor) if size)
    return [f"{path}={value} must be divisible by {divisor} ({what}); nearest: {nearest}"]


def _type_errors(config: Config) -> list[str]:
    try:
        from_dict(to_dict(config))
    except ValueError as error:
        return [str(error).removeprefix("config.")]
    return []


_POSITIVE = (
    "total_examples",
    "global_batch_size",
    "model.embed_dim",
    "model.image.image_size",
    "model.image.patch_size",
    "model.image.width",
    "model.image.depth",
    "model.image.num_heads",
    "model.image.mlp_dim",
    "model.text.context_length",
    "model.text.vocab_size",
    "model.text.width",
    "model.text.depth",
    "model.text.num_heads",
    "model.text.mlp_dim",
    "model.init_logit_scale",
    "model.max_logit_scale",
    "optim.learning_rate",
    "optim.epsilon",
    "optim.max_grad_norm",
    "data.num_threads",
    "data.prefetch_batches",
    "data.max_image_pixels",
    "data.max_caption_bytes",
    "eval.batch_size",
    "eval.every_examples",
    "checkpoint.every_examples",
    "checkpoint.keep_last",
    "log.every_examples",
    "log.peak_tflops",
)


_NOT_NEGATIVE = (
    "warmup_examples",
    "seed",
    "optim.final_learning_rate",
    "optim.weight_decay",
    "data.num_workers",
)


_FRACTION = ("data.min_crop_area", "data.max_bad_fraction")


_BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.ema_decay")


def _range_errors(config: Config) -> list[str]:
    errors = []
    for paths, holds, rule in (
        (_POSITIVE, lambda value: value > 0, "must be greater than 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (_FRACTION, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ):
        for path in paths:
            value = field_value(config, path)
            if isinstance(value, int | float) and not (math.isfinite(value) and holds(value)):
                errors.append(f"{path}={value} {rule}")
    if config.mesh.slice is not None and config.mesh.slice < 1:
        errors.append(f"mesh.slice={config.mesh.slice} must be at least 1, or None for those of the hardware")
    for axis in MESH_AXES:
        size = getattr(config.mesh, axis)
        if size != -1 and size < 1:
            errors.append(f"mesh.{axis}={size} must be at least 1, or -1 to fill up")
    if [getattr(config.mesh, axis) for axis in MESH_AXES].count(-1) > 1:
        errors.append("mesh: only one of data, fsdp and tensor may be -1; give the others a size")
    return errors


def _batch_errors(config: Config) -> list[str]:
    errors = []
    batch = config.global_batch_size
    if config.total_examples < batch:
        errors.append(f"total_examples={config.total_examples} must be at least one global_batch_size={batch}")
    if batch == 1 and config.loss.contrastive_weight:
        errors.append(
            "global_batch_size=1: a contrastive loss compares the pairs of a batch, and one pair alone has no "
            "negatives and teaches nothing; give at least 2, or leave that loss out (loss.contrastive_weight=0)"
        )
    if config.warmup_examples > config.total_examples:
        errors.append(
            f"warmup_examples={config.warmup_examples} must not exceed total_examples={config.total_examples}"
        )
    return errors


def _part_errors(config: Config) -> list[str]:
    errors = []
    errors += _loss_errors(config)
    if not config.data.train:
        errors.append("data.train='' must name a source: tfds:NAME/SPLIT, or a path, glob or brace pattern of tars")
    if len(config.data.mean) != 3 or len(config.data.std) != 3 or min(config.data.std) <= 0:
        errors.append(
            f"data.mean={config.data.mean} and data.std={config.data.std} must have three numbers, for red, green and "
            "blue, and a standard deviation must be greater than 0"
        )
    for path in ("optim.freeze", "init_match"):
        for pattern in field_value(config, path):
            try:
                re.compile(pattern)
            except re.error as error:
                errors.append(f"{path}={pattern!r} is no regular expression: {error}")
    if config.init_match and config.init_from is None:
        errors.append(f"init_match={config.init_match} needs init_from, a clipjax checkpoint")
    for name, task in config.eval.tasks.items():
        if not task.source:
            errors.append(f"eval.tasks.{name}.source='' must name a source")
        prompts = (task.classes, task.templates)
        if task.kind is TaskKind.ZERO_SHOT and None in prompts:
            errors.append(f"eval.tasks.{name}: zero_shot needs classes and templates; got {prompts}")
        if task.kind is not TaskKind.ZERO_SHOT and prompts != (None, None):
            errors.append(f"eval.tasks.{name}: {task.kind.value} would ignore classes and templates; leave both None")
        if (task.kind is TaskKind.IMAGE_RETRIEVAL) != (task.gallery is not None):
            errors.append(
                f"eval.tasks.{name}.gallery={task.gallery!r}: image_retrieval needs a second source, others none"
            )
    return errors + _best_metric_errors(config)


def _best_metric_errors(config: Config) -> list[str]:
    best = config.checkpoint.best_metric
    if best is None:
        return []
    task, _, metric = best.rpartition(":")
    known = [f"{name}:{item}" for name, choice in config.eval.tasks.items() for item in METRICS[choice.kind]]
    if f"{task}:{metric}" not in known:
        return [f"checkpoint.best_metric={best!r} must be TASK:METRIC, one of {', '.join(known) or 'none: no tasks'}"]
    if config.eval.every_examples is None:
        return [f"checkpoint.best_metric={best!r} would only see the last step; set eval.every_examples"]
    return []


def check_embeddings(config: Config) -> None:
    """Refuse a model that was not trained to embed anything.

    Raises:
        ValueError: it is one.
    """
    if config.loss.contrastive_weight == 0:
        raise ValueError(
            "this model predicts captions only (loss.contrastive_weight=0): it has no embeddings; zero-shot evaluation "
            "ranks classes by the likelihood of their prompts"
        )
