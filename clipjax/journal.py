"""What a run tells: `metrics.jsonl`, TensorBoard, the progress line. It never makes a device wait.

A step's metrics are kept as they come, still being computed, and fetched one step later.
"""

import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from clipjax.config import Config, total_steps
from clipjax.data.sources import REASONS
from clipjax.flops import model_flops
from clipjax.metrics import PEAK_TFLOPS, MetricsWriter, Progress, StepClock, format_table, mfu
from clipjax.typing import Metrics


class Journal:
    """Writes metrics on the first process; on the others it does nothing.

    Args:
        config: the run.
        workdir: where the files go.
        start_step: completed updates; later lines of an earlier try are dropped.
        enabled: whether this process writes.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, *, start_step: int, enabled: bool) -> None:
        self._batch = config.global_batch_size
        self._flops = model_flops(config.model)
        self._peak_tflops = config.log.peak_tflops or PEAK_TFLOPS.get(jax.devices()[0].device_kind)
        self._writer = (
            MetricsWriter(workdir, tensorboard=config.log.tensorboard, start_step=start_step) if enabled else None
        )
        steps = total_steps(config)
        self._progress = Progress(steps, enabled=enabled)
        self._clock = StepClock(steps, step=start_step, examples_seen=start_step * self._batch)
        self._pending: tuple[int, Metrics, dict[str, Any]] | None = None

    def note(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        """Remember a step to log; its numbers are fetched by the next `flush`.

        Args:
            step: completed updates.
            metrics: what the step gave.
            wait_seconds: total time that training has waited for data.
        """
        rates = self._clock.lap(step=step, examples_seen=step * self._batch, wait_seconds=wait_seconds)
        self._pending = (step, metrics, rates)

    def flush(self) -> None:
        """Write the remembered step, if there is one."""
        if self._pending is None:
            return
        step, metrics, host = self._pending
        self._pending = None
        if self._writer is None:
            return
        skipped = np.asarray(metrics["samples_skipped"]).tolist()
        values = {
            "examples_seen": step * self._batch,
            **{name: float(value) for name, value in metrics.items() if name != "samples_skipped"},
            **host,
            "samples_skipped": dict(zip(REASONS, skipped, strict=True)),
        }
        if self._peak_tflops is not None:
            rate = host["examples_per_second"]
            values["mfu"] = mfu(rate, self._flops, jax.device_count(), self._peak_tflops)
        self._writer.write(step, values)
        self._progress.update(step, values)

    def results(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Write the results of an evaluation, and show them."""
        if self._writer is not None:
            self._writer.write(step, {"examples_seen": step * self._batch, "eval": results})
            shown = (
                f"{task} {name} {value:.3f}" for task, metrics in results.items() for name, value in metrics.items()
            )
            self._progress.message("  ".join(item for item in shown if " num_" not in item))

    def message(self, text: str) -> None:
        """Show a line."""
        if self._writer is not None:
            self._progress.message(text)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here is not training: it does not enter the rates."""
        with self._clock.pause():
            yield

    def close(self) -> None:
        """Write what is pending, close the files."""
        self.flush()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Results for a person: a line per task and metric, shares as percentages."""
    rows = [
        [task, name, f"{value:.0f}" if name.startswith("num_") else f"{100 * value:.1f} %"]
        for task, metrics in results.items()
        for name, value in metrics.items()
    ]
    return format_table(rows, ("task", "metric", "value"))
