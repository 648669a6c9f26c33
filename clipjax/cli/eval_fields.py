"""Fields of a checkpoint's config that an evaluation reads, and its tasks: what may be changed, and what is refused."""

import copy
from collections.abc import Sequence

from clipjax.cli.overrides import Override, load_config
from clipjax.config import CheckpointConfig, Config, MeshConfig
from clipjax.config.data import TFDS_PREFIX
from clipjax.config.serialization import path_parts

TFDS_DATA = {"tfds_dir": "tfds_dir", "tfds_image_key": "image_field", "tfds_caption_key": "caption_field"}
"""Fields of the data that TFDS sources read, and those of a task that stand in their place."""

TASK_DATA = (*TFDS_DATA, "image_field", "caption_field", "image_root")

READ = (
    "eval.batch_size",
    "eval.tasks",
    "mesh",
    *(f"data.{name}" for name in TASK_DATA),
    "data.num_threads",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_image_pixels",
    "data.max_caption_bytes",
    "data.background",
    "data.exif_orientation",
    "data.resize",
    "data.interpolation",
    "data.mean",
    "data.std",
    "model.compute_dtype",
    "model.matmul_dtype",
    "model.attention",
    "compile_cache",
)
"""Fields, or groups of them, that evaluation reads and an override may change."""

TRAINED = ("model", "data.tokenizer", "loss.contrastive_weight")
"""Fields, or groups of them, that the weights were trained with, unless they are among `READ` or `TRAINING_ONLY`."""

TRAINING_ONLY = ("model.remat", "model.init_logit_scale", "model.max_logit_scale", "model.image.patch_dropout")
"""Fields of the model that only training reads."""

NOT_OPENED = ("init_from", "loss.distill_from", "data.train", "data.tokenizer")
"""Fields that name what evaluation does not open."""


def base_config(saved: Config, tasks_from: str | None, first: Config | None = None) -> Config:
    """Return the checkpoint's config, before overrides, without what only its training run could use.

    Nor does a checkpoint, which others may have made, choose the compile cache: what lies there is executed.

    Args:
        saved: config of the checkpoint.
        tasks_from: a config file, the tasks of which take the place of the checkpoint's.
        first: such a config of the first of several checkpoints, which are all evaluated on its tasks in its batches.
    """
    config = copy.deepcopy(saved)
    config.compile_cache = Config().compile_cache
    config.mesh = MeshConfig()
    config.checkpoint = CheckpointConfig()  # its best_metric speaks of tasks that may not be run
    if tasks_from:
        other = load_config(tasks_from)
        config.eval.tasks = other.eval.tasks
        for name in TASK_DATA:
            setattr(config.data, name, getattr(other.data, name))
    if first is not None:
        config.eval = copy.deepcopy(first.eval)
        for name in TASK_DATA:
            setattr(config.data, name, getattr(first.data, name))
    for each in (config.eval, *config.eval.tasks.values()):  # when tasks are due in the loop
        each.every_examples = None
    return config


def refuse_unread(overrides: Sequence[Override]) -> None:
    """Refuse overrides that would change nothing.

    Raises:
        ValueError: all of them, a line each.
    """
    errors = []
    for one in overrides:
        is_interval = is_within(one.path, ("eval.tasks",)) and path_parts(one.path)[-1][0] == "every_examples"
        if is_within(one.path, READ) and not is_interval:
            continue
        if is_within(one.path, TRAINED) and not is_within(one.path, TRAINING_ONLY):
            why = "the weights of the checkpoint were trained with its own value, and fix it"
        else:
            why = "only training reads it"
        errors.append(f"config.{one.path}={one.text}: {why}; clipjax eval takes {', '.join(READ)}")
    if errors:
        raise ValueError("\n".join(errors))


def refuse_unused_tfds(config: Config, overrides: Sequence[Override]) -> None:
    """Refuse to say where TFDS data lies for tasks that read none.

    Raises:
        ValueError: all such overrides, a line each.
    """
    errors = []
    for name, own in TFDS_DATA.items():
        given = [one for one in overrides if one.path == f"data.{name}"]
        reading = [task for task in config.eval.tasks.values() if any(map(_is_tfds, task.sources))]
        if given and all(getattr(task, own) is not None for task in reading):
            why = f"each task that reads TFDS data has its own {own}" if reading else "no task reads TFDS data"
            errors += [f"config.{one.path}={one.text}: {why}; leave it out" for one in given]
    if errors:
        raise ValueError("\n".join(errors))


def _is_tfds(source: str) -> bool:
    return source.startswith(TFDS_PREFIX)


def is_within(path: str, groups: Sequence[str]) -> bool:
    """Return True for a field that is one of these, or within one of these groups."""
    return any(path == group or path.startswith((f"{group}.", f"{group}[")) for group in groups)


def select_tasks(config: Config, chosen: str | None, overrides: Sequence[Override]) -> None:
    """Keep the tasks that are wanted, in the order in which they are named.

    Raises:
        ValueError: there is no such task, or an override is of another.
    """
    tasks = config.eval.tasks
    wanted = list(tasks) if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tasks]
    if unknown or not wanted:
        raise ValueError(
            f"--tasks={chosen or ''}: {', '.join(unknown) or 'nothing'} is not among the tasks of the checkpoint's "
            f"config ({', '.join(tasks) or 'none; --tasks_from=CONFIG takes them from there'})"
        )
    for one in overrides:
        keys = [name for name, is_key in path_parts(one.path) if is_key]
        if keys and keys[0] not in wanted:
            raise ValueError(f"config.{one.path}={one.text}: the task {keys[0]!r} is not among --tasks={chosen}")
    config.eval.tasks = {name: tasks[name] for name in wanted}
