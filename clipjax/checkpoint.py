"""Checkpoints: arrays, data position, config, tokenizer and preprocessing, all in one step directory.

`WORKDIR/checkpoints/STEP/` holds groups of arrays (`params`, `train`, where there are any `ema` and `batch_stats`) and
the records `config`, `data`, `tokenizer`, `preprocessing` as JSON. Orbax writes in the background into a temporary
directory and renames it when all of it is there, so a step directory is complete or absent. Nothing is ever unpickled.
"""

import base64
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from clipjax.config import CheckpointConfig, Config
from clipjax.config_json import flatten, from_dict, to_dict
from clipjax.data.tokenizer import Tokenizer, tokenizer_from_files

FOLDER = "checkpoints"
RECORDS = ("config", "data", "tokenizer", "preprocessing")


class Checkpoints:
    """The checkpoints of one run: saved in the background, the last few and the best one kept."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig) -> None:
        self._workdir = workdir
        policy: preservation_policy.PreservationPolicy = preservation_policy.LatestN(config.keep_last)
        best: Callable[[Any], float] | None = None
        self._best_metric = config.best_metric
        if config.best_metric is not None:
            # A step that was judged by another metric counts as the worst.
            best = lambda metrics: float(metrics.get(config.best_metric, -math.inf))  # noqa: E731
            keep_best = preservation_policy.BestN(get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False)
            policy = preservation_policy.AnyPreservationPolicy([policy, keep_best])
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=best, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> pathlib.Path:
        """Directory of a step."""
        return self._workdir / FOLDER / str(step)

    def save(
        self, step: int, arrays: Mapping[str, Any], records: Mapping[str, Any], best_value: float | None = None
    ) -> None:
        """Start saving; returns when the arrays may change again.

        Args:
            step: completed updates.
            arrays: pytrees of arrays by group.
            records: JSON values by name.
            best_value: what the best step is chosen by, if it was measured at this step.
        """
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        metrics = None if best_value is None else {self._best_metric: best_value}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, step: int, abstract_arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays, placed as the shardings of `abstract_arrays` say, and the records.

        Raises:
            ValueError: a group or array is missing, misshapen or damaged.
        """
        restored = _restore(functools.partial(self._manager.restore, step), self.path(step), abstract_arrays, RECORDS)
        return {name: restored[name] for name in abstract_arrays}, {name: restored[name] for name in RECORDS}

    def wait(self) -> None:
        """Until everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then stop the background threads."""
        self._manager.close()


def _restore(
    restore: Callable[..., Any], path: pathlib.Path, abstract_arrays: Mapping[str, Any], records: Sequence[str] = ()
) -> Any:
    """Groups of arrays and records by name; `restore` reads them from `path`."""
    items: dict[str, Any] = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_arrays.items()}
    items |= {name: ocp.args.JsonRestore() for name in records}
    try:
        return restore(args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore have many kinds
        raise ValueError(f"checkpoint {path} cannot be restored into this config: {error}") from error


class SavedCheckpoint:
    """One checkpoint opened for reading.

    Args:
        path: a workdir (its newest step is taken), its `checkpoints` folder, or one step directory.
        step: another step in the same place.

    Raises:
        ValueError: there is no checkpoint there, or its records are damaged.
    """

    def __init__(self, path: str | pathlib.Path, *, step: int | None = None) -> None:
        folder, newest = find_checkpoint(pathlib.Path(path))
        step = newest if step is None else step
        if not (folder / str(step)).is_dir():
            raise ValueError(f"checkpoint {folder / str(step)} is needed, but no longer there; bring it back")
        self.step = step
        self.path = folder / str(step)
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._restore = functools.partial(reader.restore, self.path.absolute())
        items: dict[str, Any] = {name: ocp.args.JsonRestore() for name in RECORDS}
        try:
            records = _lone_reader().restore(self.path.absolute(), args=ocp.args.Composite(**items))
            self.records: dict[str, Any] = dict(records.items())
            self.config: Config = from_dict(self.records["config"])
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"checkpoint {self.path} is damaged or not clipjax's: {error}") from error

    @property
    def params_group(self) -> str:
        """The group to evaluate: `ema` where one was kept, else `params`."""
        return "ema" if (self.path / "ema").is_dir() else "params"

    def params(self, abstract_params: Any) -> Any:
        """The parameters to evaluate, placed as the shardings of `abstract_params` say.

        BatchNorm's statistics are among them, as `batch_stats`, where they are among those.
        """
        group, wanted = self.params_group, dict(abstract_params)
        groups = {"batch_stats": wanted.pop("batch_stats")} if "batch_stats" in wanted else {}
        restored = _restore(self._restore, self.path, {group: wanted, **groups})
        return {**restored[group], **{name: restored[name] for name in groups}}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was saved."""
        return unpack_tokenizer(self.records["tokenizer"])


def _lone_reader() -> ocp.Checkpointer:
    """Reads without waiting for other processes, which may be unable to."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The folder of steps and the step that a path means.

    Raises:
        ValueError: there is none.
    """
    if path.name.isdigit() and (path / "config").is_dir():
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise ValueError(
            f"no checkpoint at {str(path)!r}: give a workdir that training has saved to, or one of its "
            f"{FOLDER}/STEP directories"
        )
    return folder, max(steps)


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as a JSON record."""
    files = {name: base64.b64encode(content).decode() for name, content in tokenizer.files().items()}
    return {"name": tokenizer.name, "files": files}


def unpack_tokenizer(record: Any) -> Tokenizer:
    """The tokenizer of a record.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        files = {str(name): base64.b64decode(content, validate=True) for name, content in record["files"].items()}
        return tokenizer_from_files(str(record["name"]), files)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's tokenizer is damaged: {error!r}") from error


def make_records(config: Config, tokenizer: Tokenizer, data_position: Mapping[str, Any]) -> dict[str, Any]:
    """All records of a checkpoint.

    `preprocessing` repeats what of the config turns a picture into the model's input, for readers of other kinds.
    """
    return {
        "config": to_dict(config),
        "data": dict(data_position),
        "tokenizer": pack_tokenizer(tokenizer),
        "preprocessing": {
            "image_size": config.model.image.image_size,
            "resize": config.data.resize.value,
            "interpolation": f"{config.data.interpolation.value}, antialiased",
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        },
    }


RESUMABLE = (
    "mesh.",
    "log.",
    "eval.",
    "checkpoint.",
    "init_from",
    "compile_cache",
    "data.tfds_dir",
    "data.max_bad_fraction",
    "data.num_",
    "data.prefetch_batches",
)
"""Fields (by prefix) that may change when a run goes on: none of them touches the state or the order of samples."""


def newest_checkpoint(workdir: pathlib.Path) -> SavedCheckpoint | None:
    """The newest checkpoint in a workdir, or None where there is none yet.

    Raises:
        ValueError: it is damaged.
    """
    try:
        find_checkpoint(workdir)
    except ValueError:
        return None
    return SavedCheckpoint(workdir)


def check_resumable(step: int, saved: Config, config: Config) -> None:
    """Refuse to go on with a config that would make a different run.

    Raises:
        ValueError: every field that differs, with both values.
    """
    old, new = flatten(to_dict(saved)), flatten(to_dict(config))
    changed = [
        f"{path}={new.get(path)!r} (checkpoint: {old.get(path)!r})"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and not path.startswith(RESUMABLE)
    ]
    if changed:
        raise ValueError(
            f"the workdir holds a run at step {step} with another config: {', '.join(changed)}; "
            "use the old values to go on with it, or another workdir to start anew"
        )
