"""Checks of a config before any device is touched: field, value, rule, remedy.

`validate` needs nothing but the config; `validate_devices` also the numbers of devices and processes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from clipjax.config.canvas import canvas_errors
from clipjax.config.caption import DecoderConfig
from clipjax.config.data import unused_columns
from clipjax.config.image import ImagePool
from clipjax.config.loss import LossKind, SamePair
from clipjax.config.loss_validation import loss_errors
from clipjax.config.model import AttentionMethod
from clipjax.config.model_validation import LANES, caption_errors, model_errors
from clipjax.config.ranges import FINITE, RANGES
from clipjax.config.run import Config, resolve_mesh
from clipjax.config.serialization import field_value, from_dict, numbers, to_dict
from clipjax.config.variable_aspect import variable_aspect_errors

BATCH_FIELDS = ("global_batch_size", "microbatch_size", "eval.batch_size")
"""Fields of the batches that the mesh and the processes divide."""


MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of which one may fill up."""


MEMORY_UNIT = 2**12 * 3 * 5
"""The memory of the `global` loss has room for a multiple of so many samples, so that it can be split and restored over
any number of devices that divides this."""


def validate(config: Config, *, batch_fields: Sequence[str] = BATCH_FIELDS) -> None:
    """Check all that can be known without a device.

    Raises:
        ValueError: everything that is wrong, a line each: field, value, rule, remedy.
    """
    errors = [*_type_errors(config), *range_errors(config), *_mesh_errors(config)]
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
        batch_fields: the batches that there are.
        teacher: the config of a frozen model that lies on the same mesh.
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
        errors += _batch_division_error(config, path, num_processes, "the number of processes")
    if errors:
        raise ValueError("\n".join(errors))


def _attention_error(config: Config, platform: str, tensor: int) -> str | None:
    """Return what keeps these devices from computing attention as configured."""
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
    """Return the sizes that the mesh axes split but do not divide."""
    (slices, data, fsdp, tensor), errors = sizes, []
    parts = f"mesh.slice={slices} * " if slices > 1 else ""
    for path in batch_fields:
        what = f"{parts}mesh.data={data} * mesh.fsdp={fsdp}"
        errors += _batch_division_error(config, path, slices * data * fsdp, what)
    trains = "global_batch_size" in batch_fields
    if trains and config.loss.kind is LossKind.GLOBAL and MEMORY_UNIT % (slices * data * fsdp):
        errors.append(
            f"loss.kind=global keeps its memory in parts, and needs a number of devices that divides {MEMORY_UNIT} "
            f"({parts}mesh.data={data} * mesh.fsdp={fsdp})"
        )
    return errors + _tower_division_errors(config, fsdp, tensor)


def _tower_division_errors(config: Config, fsdp: int, tensor: int) -> list[str]:
    """Return the sizes of towers and heads that `mesh.fsdp` and `mesh.tensor` split but do not divide."""
    model, errors = config.model, []
    by_fsdp, by_tensor = f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"
    for path, tower in (("model.image", model.image), ("model.text", model.text)):
        errors += _division_error(config, f"{path}.num_heads", tensor, by_tensor)
        errors += _division_error(config, f"{path}.mlp_dim", tensor, by_tensor, getattr(tower, "hidden_dim", None))
        share = getattr(tower, "FIRST_LAYER_SHARE", 1)
        rule = by_fsdp if share == 1 else f"{share} * {by_fsdp}, as the first layer has half as many channels"
        errors += _division_error(config, f"{path}.width", share * fsdp, rule)
    queries = getattr(model.image, "pool", None) is ImagePool.QUERIES
    if queries:
        errors += _division_error(config, "model.image.query_heads", tensor, by_tensor)
    if model.caption is not None or queries:  # a head or a pooling takes the embedding as its input
        errors += _division_error(config, "model.embed_dim", fsdp, by_fsdp)
    if isinstance(model.caption, DecoderConfig):
        hidden = model.caption.hidden_dim(model.text.width)
        errors += _division_error(config, "model.caption.num_heads", tensor, by_tensor)
        errors += _division_error(config, "model.caption.mlp_dim", tensor, by_tensor, hidden)
    for path in ("model.embed_dim", "model.text.vocab_size"):
        errors += _division_error(config, path, tensor, by_tensor)
    return errors


def _batch_division_error(config: Config, path: str, parts: int, what: str) -> list[str]:
    """Return the batch at `path` if its parts would be unequal, or cut a row of several images."""
    row = 1 if path == "eval.batch_size" else config.data.images_per_row
    if row > 1:
        what = f"{what} * data.images_per_row={row}"
    return _division_error(config, path, parts * row, what)


def _division_error(config: Config, path: str, divisor: int, what: str, value: int | None = None) -> list[str]:
    """Return the field at `path`, or the value that stands for its None, if it cannot be divided."""
    value = field_value(config, path) if value is None else value
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


def range_errors(config: Any, path: str = "") -> list[str]:
    """Return the numbers of a config, or of a part of it at `path`, that lie outside of their fields' ranges."""
    errors = []
    for place, value, metadata in numbers(config, path):
        ranges = (*metadata.get(RANGES, ()), FINITE)
        broken = next((one for one in ranges if not (math.isfinite(value) and one.holds(value))), None)
        if broken is not None:
            errors.append(f"{place}={value} {broken.rule}")
    return errors


def _mesh_errors(config: Config) -> list[str]:
    if [getattr(config.mesh, axis) for axis in MESH_AXES].count(-1) > 1:
        return ["mesh: only one of data, fsdp and tensor may be -1; give the others a size"]
    return []


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
    errors += loss_errors(config)
    if config.data.mixture and config.loss.same_pair is SamePair.NONE:
        errors.append(
            "loss.same_pair=none must be index or caption with data.mixture: its sources have epochs of their own, so "
            "a batch may hold a pair twice, which is no negative of itself"
        )
    if len(config.data.mean) != 3 or len(config.data.std) != 3 or min(config.data.std) <= 0:
        errors.append(
            f"data.mean={config.data.mean} and data.std={config.data.std} must have three numbers, for red, green and "
            "blue, and a standard deviation must be greater than 0"
        )
    errors += [*config.data.source_errors(), *config.data.errors("data"), *_unused_columns(config)]
    errors += canvas_errors(config.data, config.model.image.image_size)
    errors += variable_aspect_errors(config.data, config.model.image)
    for path in ("optim.freeze", "init_match"):
        for pattern in field_value(config, path):
            try:
                re.compile(pattern)
            except re.error as error:
                errors.append(f"{path}={pattern!r} is no regular expression: {error}")
    if config.init_match and config.init_from is None:
        errors.append(f"init_match={config.init_match} needs init_from, a clipjax checkpoint")
    if config.init_keep_positions and config.init_from is None:
        errors.append(f"init_keep_positions={config.init_keep_positions} needs init_from, a clipjax checkpoint")
    for name, task in config.eval.tasks.items():
        errors += task.errors(f"eval.tasks.{name}")
    errors += [*config.eval.shift_errors(), *config.eval.interval_errors()]
    best = config.checkpoint.best_metric
    if best is not None and config.eval.interval_of(best.rpartition(":")[0]) is None:
        errors.append(
            f"checkpoint.best_metric={best!r} would only see the last step; set eval.every_examples, or every_examples "
            "of its task"
        )
    if config.log.prometheus_port is None and config.log.prometheus_host != type(config.log)().prometheus_host:
        errors.append(
            f"log.prometheus_host={config.log.prometheus_host!r} would be ignored: nothing is served; set "
            "log.prometheus_port"
        )
    return errors


def _unused_columns(config: Config) -> list[str]:
    data, tasks = config.data, config.eval.tasks.values()
    parts = [(data.train, data.captions), *((part.source, part.captions) for part in data.mixture.values())]
    evaluated = [place for task in tasks for place in task.sources]
    plain = [source for source, captions in parts if not (captions or data.captions)]
    trained = [source for source, _ in parts]
    unused = unused_columns(data, [*trained, *evaluated], "data.", plain=[*plain, *evaluated])
    folders = [task.tfds_dir for task in tasks if task.tfds_dir]
    return [*unused, *data.cache_errors([*trained, *evaluated], tfds_dirs=folders)]


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
