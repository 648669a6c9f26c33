"""Checkpoints: arrays, data position, config, tokenizer and preprocessing, all in one step directory.

`WORKDIR/checkpoints/STEP/` holds groups of arrays (`params`, `train`, where there are any `ema` and `batch_stats`) and
the records `config`, `data`, `tokenizer`, `preprocessing` as JSON. Orbax writes in the background into a temporary
directory and renames it when all of it is there, so a step directory is complete or absent. Nothing is ever unpickled.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from clipjax.checkpoints.records import FOLDER, RECORDS
from clipjax.config import CheckpointConfig


class DamagedCheckpoint(ValueError):
    """The arrays of a checkpoint cannot be restored."""


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
        """Return the newest complete step, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> pathlib.Path:
        """Return the directory of a step."""
        return self._workdir / FOLDER / str(step)

    def save(
        self, step: int, arrays: Mapping[str, Any], records: Mapping[str, Any], best_value: float | None = None
    ) -> None:
        """Start saving, and return when the arrays may change again.

        Args:
            step: completed updates.
            arrays: pytrees of arrays by group.
            records: JSON values by name.
            best_value: the metric that chooses the best step, if it was measured at this step.
        """
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        metrics = None if best_value is None else {self._best_metric: best_value}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, step: int, abstract_arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arrays, placed by the shardings of `abstract_arrays`, and the records.

        Raises:
            DamagedCheckpoint: a group or array is missing, misshapen or damaged.
        """
        restored = restore_items(
            functools.partial(self._manager.restore, step), self.path(step), abstract_arrays, RECORDS
        )
        return {name: restored[name] for name in abstract_arrays}, {name: restored[name] for name in RECORDS}

    def wait(self) -> None:
        """Wait until everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then stop the background threads."""
        self._manager.close()


def restore_items(
    restore: Callable[..., Any], path: pathlib.Path, abstract_arrays: Mapping[str, Any], records: Sequence[str] = ()
) -> Any:
    """Return groups of arrays and records by name; `restore` reads them from `path`.

    Raises:
        DamagedCheckpoint: they cannot be read.
    """
    items: dict[str, Any] = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_arrays.items()}
    items |= {name: ocp.args.JsonRestore() for name in records}
    try:
        return restore(args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore have many kinds
        raise DamagedCheckpoint(f"checkpoint {path} cannot be restored into this config: {error}") from error
