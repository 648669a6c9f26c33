"""Start of a run: afresh, from another run's weights, or from its own newest checkpoint."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.manifest import DamagedCheckpoint, UndecidedCheckpoint
from clipjax.checkpoints.records import pack_tokenizer
from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.config import Config
from clipjax.config.paths import expanded
from clipjax.config.serialization import flatten, to_dict
from clipjax.data.digests import describe_differences, from_record
from clipjax.data.training_order import parse_order
from clipjax.models.positions import fit_positions
from clipjax.pytrees import leaf_paths, map_with_path
from clipjax.runtime import processes, sharding
from clipjax.training import migrations
from clipjax.training.decisions import Decisions, num_decided, parse_all, rollbacks_of
from clipjax.training.health import init_health
from clipjax.training.inputs import Inputs, comes_from_init
from clipjax.training.program import Program
from clipjax.training.recovery import RunStopped
from clipjax.training.step import TrainState, from_items, to_items

RESUMABLE = (
    "mesh.",
    "log.",
    "eval.",
    "checkpoint.",
    "recovery.",
    "init_from",
    "compile_cache",
    "data.tfds_dir",
    "data.cache_",
    "data.train",
    "data.max_bad_fraction",
    "data.on_unreadable",
    "data.num_",
    "data.prefetch_batches",
)
"""Fields (by prefix) that may change when a run goes on: none of them touches the state or the order of samples."""


def check_resumable(step: int, saved: Config, config: Config) -> None:
    """Refuse to resume with a config that would make a different run.

    Raises:
        ValueError: every field that differs, with both values.
    """
    old, new = flatten(to_dict(expanded(saved))), flatten(to_dict(expanded(config)))
    # The place of one source may change as `data.train` may; its name, weight and captions may not.
    places = {f"data.mixture.{name}.source" for each in (saved, config) for name in each.data.mixture}
    changed = [
        f"{path}={new.get(path)!r} (checkpoint: {old.get(path)!r})"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and not path.startswith(RESUMABLE) and path not in places
    ]
    if changed:
        raise ValueError(
            f"the workdir holds a run at step {step} with another config: {', '.join(changed)}; "
            "use the old values to go on with it, or another workdir to start anew"
        )


@dataclass(frozen=True)
class Position:
    """Progress of a run.

    Attributes:
        step: completed updates.
        evaluated: the tasks were run at this step.
        num_samples: size of the training source.
        teacher_step: of the checkpoint that is distilled from, if any.
        shards: of the training source, in order: `[name, digest, number of samples]`; None: an older version saved.
        decisions: taken before, as JSON objects.
        order: fixes that of the training pairs; None: an older version saved.
        index: for each training source, the format of the index that has numbered its samples, or None where there is
            none; None: an older version saved.
    """

    step: int = 0
    evaluated: bool = False
    num_samples: int = 0
    teacher_step: int | None = None
    shards: Sequence[Sequence[Any]] | None = None
    decisions: Sequence[Mapping[str, Any]] = ()
    order: Mapping[str, Any] | None = None
    index: Sequence[int | None] | None = None

    @classmethod
    def from_record(cls, record: Any, step: int) -> "Position":
        """Return the position of a `data` record.

        Args:
            record: any JSON value.
            step: of its checkpoint.

        Raises:
            ValueError: a field is missing, unknown or of another type or step; with the field.
        """
        if not isinstance(record, dict):
            raise ValueError(f"data={record!r} must be an object")
        values = {name: value for name, value in record.items() if name != "format"}
        if unknown := sorted(values.keys() - _KINDS.keys()):
            raise ValueError(f"data.{unknown[0]} is unknown to this version of clipjax")
        for name in ("step", "num_samples"):
            if name not in values:
                raise ValueError(f"data.{name} is missing; a converted checkpoint begins a run by init_from only")
        for name, value in values.items():
            if type(value) not in _KINDS[name]:
                kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
                raise ValueError(f"data.{name}={value!r} must be of type {kinds}")
        if values["step"] != step:
            raise ValueError(f"data.step={values['step']} must be {step}, the step of the checkpoint")
        parse_order(values.get("order"))
        return cls(**values)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "evaluated": (bool,),
    "num_samples": (int,),
    "teacher_step": (int, NoneType),
    "shards": (list, NoneType),
    "decisions": (list,),
    "order": (dict, NoneType),
    "index": (list, NoneType),
}
"""Types of the fields of a `data` record; `shards` and `decisions` are parsed further where they are used."""


def check_same_run(saved: SavedCheckpoint, config: Config, inputs: Inputs) -> None:
    """Refuse to resume if the continuation would not be the run that was saved.

    Raises:
        ValueError: another config, another tokenizer or other training data; the message names the difference.
        DamagedCheckpoint: the record of its position is none.
    """
    check_resumable(saved.step, saved.config, config)
    if saved.records["tokenizer"] != pack_tokenizer(inputs.tokenizer):
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer that the run at step {saved.step} in the "
            "workdir was trained with; bring that back, or use another workdir to start anew"
        )
    _position(saved.path, saved.records["data"], saved.step)
    _check_same_data(saved, config, inputs)


def _check_same_data(saved: SavedCheckpoint, config: Config, inputs: Inputs) -> None:
    """Refuse other training data by its contents, or by path and number where an older version recorded no contents.

    Raises:
        ValueError: it differs, and where.
    """
    data, remedy = saved.records["data"], "bring those back, or use another workdir to start anew"
    recorded, here = from_record(data.get("shards")), config.data.shown_train
    if recorded is None:
        old, new = expanded(saved.config).data.shown_train, expanded(config).data.shown_train
        if old != new:
            raise ValueError(
                f"{here} is another place than that of the run in the workdir, {old}, which has saved no digests to "
                f"tell whether the data is the same; use the old place, or another workdir to start anew"
            )
        if len(inputs.source) != data["num_samples"]:
            raise ValueError(
                f"{here} has {len(inputs.source)} samples, but the run in the workdir was trained on "
                f"{data['num_samples']}; {remedy}"
            )
        processes.announce(
            f"warning: {here}: the checkpoint has no digests of its data, so the contents were not compared"
        )
        return
    found = inputs.source.digests()
    if [shard.digest for shard in recorded] != [shard.digest for shard in found]:
        raise ValueError(
            f"{here} has {len(inputs.source)} samples of other contents than the {data['num_samples']} that the run in "
            f"the workdir was trained on ({describe_differences(recorded, found)}); {remedy} (paths may change)"
        )


def start_state(
    program: Program,
    inputs: Inputs,
    checkpoints: Checkpoints,
    decisions: Decisions,
    *,
    before: int | None = None,
) -> tuple[TrainState, Position]:
    """Return the newest good checkpoint's state and position, or a fresh state; every array is created on its shards.

    Args:
        program: of the run.
        inputs: give the first weights of a fresh state, if not the seed alone.
        checkpoints: of the workdir; those that a rollback has rejected or that are damaged are set aside.
        decisions: of the run; what its file has lost comes back from a checkpoint's copy.
        before: take a checkpoint of a step below this one; None: any.

    Raises:
        DamagedCheckpoint: there are checkpoints, but none is good, or its arrays do not fit.
        RunStopped: decisions and checkpoints contradict each other, or there are decisions alone.
    """
    newest = _choose(decisions, checkpoints, before)
    if newest is not None:
        return _restore(checkpoints, newest, program.abstract_state, program.mesh)
    if decisions.taken and before is None:
        raise RunStopped(
            f"{decisions.path} holds {len(decisions.taken)} rollbacks, but no checkpoint from before or after them is "
            "left; bring the checkpoints back, or start anew in another workdir"
        )
    state = program.fresh_state()
    if inputs.init_checkpoint is not None:
        state = _take_params(state, inputs.init_checkpoint, program.config, program.mesh)
    return state, Position()


def _choose(decisions: Decisions, checkpoints: Checkpoints, before: int | None = None) -> int | None:
    """Return the newest step, below `before` if that is given, that is verified and belongs to the run as decided."""
    _apply(decisions, checkpoints)
    while True:
        steps = None if before is None else [step for step in checkpoints.steps() if step < before]
        newest = checkpoints.newest_verified(steps)
        if newest is None:
            return None
        # Again, of this one: the storage may not have given its records before.
        is_current = _apply(decisions, checkpoints, [newest])
        if newest not in is_current:
            raise UndecidedCheckpoint(
                f"checkpoint {checkpoints.path(newest)}: its records cannot be read any more, so whether a rollback "
                "has rejected it cannot be known; see to the storage and start again"
            )
        if is_current[newest]:
            return newest


def _apply(decisions: Decisions, checkpoints: Checkpoints, steps: Sequence[int] | None = None) -> dict[int, bool]:
    """Set aside the checkpoints behind which the run has gone back; those that are damaged are judged later.

    Args:
        decisions: of the run.
        checkpoints: of the workdir.
        steps: to judge; None: all.

    Returns:
        Whether the run has kept it, for every step whose records could be read.

    Raises:
        RunStopped: decisions and checkpoints contradict each other.
        DamagedCheckpoint: the copy of one holds no decisions.
        UnusableCheckpoint: one cannot be set aside.
    """
    copies = {}
    for step, copy in checkpoints.read_data("decisions", [], steps).items():
        try:
            copies[step] = parse_all(copy)
        except ValueError as error:
            raise _damaged(checkpoints.path(step), f"data.decisions: {error}") from error
    try:
        decisions.adopt(max(copies.values(), key=num_decided, default=[]))
    except ValueError as error:
        raise RunStopped(str(error)) from error
    is_current = {step: decisions.is_current(step, len(rollbacks_of(copy))) for step, copy in copies.items()}
    for step in is_current:
        if not is_current[step]:
            checkpoints.set_aside(step, "rejected")
    return is_current


def _restore(checkpoints: Checkpoints, step: int, placed: TrainState, mesh: Mesh) -> tuple[TrainState, Position]:
    """Return state and position of a checkpoint, in any format."""
    path = checkpoints.path(step)
    try:
        data = checkpoints.read_record(step, "data")
    except (OSError, ValueError) as error:
        raise _damaged(path, f"data: {error}") from error
    position, version = _position(path, data, step), data.get("format", 1)
    items, _ = checkpoints.restore(step, migrations.abstract_items(version, to_items(placed)))
    health = jax.jit(init_health, out_shardings=sharding.replicated(mesh))()
    return from_items(migrations.migrate(version, items, health)), position


def _position(path: pathlib.Path, data: Any, step: int) -> Position:
    """Return the position that a checkpoint's `data` record holds.

    Raises:
        DamagedCheckpoint: it holds none, or is of an unknown format.
    """
    try:
        position = Position.from_record(data, step)
        migrations.check_format(data.get("format", 1))
        return position
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: pathlib.Path, fault: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {path} is damaged: {fault}; bring back a good copy, or move it away")


def _take_params(state: TrainState, init_checkpoint: SavedCheckpoint, config: Config, mesh: Mesh) -> TrainState:
    """Return the state with the parameters of another run that `init_match` names.

    BatchNorm's statistics are taken if the whole image tower is.
    """
    given = dict(load_params(init_checkpoint, mesh))
    batch_stats = given.pop("batch_stats", None)
    old, new, keep = init_checkpoint.config.model, config.model, config.init_keep_positions
    fit = jax.jit(lambda given: fit_positions(given, old, new, keep))
    theirs = dict(zip(leaf_paths(given), jax.tree.leaves(fit(given)), strict=True))
    params = map_with_path(lambda name, ours: theirs[name] if comes_from_init(config, name) else ours, state.params)
    params = jax.device_put(params, sharding.shardings_of(state.params))
    if batch_stats is None or not all(
        comes_from_init(config, f"image/{name}") for name in leaf_paths(state.params["image"])
    ):
        batch_stats = state.batch_stats
    ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
    return replace(state, params=params, ema=ema, batch_stats=batch_stats)
