"""The logger of a run: `metrics.jsonl`, TensorBoard, progress line, each process's log. It never makes a device wait.

A step's metrics are kept while they are being computed, and fetched one step later.
"""

import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from clipjax.config import Config, total_steps
from clipjax.monitoring.goodput import Goodput
from clipjax.monitoring.progress import Progress, StepClock, mfu
from clipjax.monitoring.prometheus import Exporter
from clipjax.monitoring.stragglers import RankTimes, StepTimes
from clipjax.monitoring.writers import MetricsWriter
from clipjax.runtime import process_log, processes
from clipjax.runtime.chips import find_chip
from clipjax.runtime.terminal import format_table
from clipjax.typing import Metrics

NO_SHARES = ("best_c", "shuffled_similarity")
"""Metrics of evaluations that are neither counts nor shares."""


class RunLogger:
    """The metrics and the progress of a run, on the first process; the others only keep their own log.

    Args:
        config: the run.
        workdir: the folder of the files.
        start_step: completed updates; later lines of an earlier try are dropped.
        evaluated: the tasks were run at this step; if not, lines of their results at this step are dropped too.
        flops_per_pair: first step, last step -> mean FLOPs of the forward pass of an image and its texts, for MFU.
        count_samples: step, metric `samples_skipped` -> what a line of the log tells of the samples.
        enabled: this process writes and prints; None: the first one does.
        times: collects the times of several processes; None for one alone.
        goodput: the ledger of the run's time; None keeps none.
        exporter: serves the numbers to others; None: nobody asks.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        *,
        start_step: int,
        evaluated: bool = True,
        flops_per_pair: Callable[[int, int], float],
        count_samples: Callable[[int, np.ndarray], Mapping[str, Any]],
        enabled: bool | None = None,
        times: RankTimes | None = None,
        goodput: Goodput | None = None,
        exporter: Exporter | None = None,
    ) -> None:
        enabled = processes.is_first() if enabled is None else enabled
        self._batch = config.global_batch_size
        self._flops, self._count_samples = flops_per_pair, count_samples
        chip = find_chip(jax.devices()[0].device_kind)
        self._peak_tflops = config.log.peak_tflops or (None if chip is None else chip.peak_tflops)
        self._writer = (
            MetricsWriter(workdir, tensorboard=config.log.tensorboard, start_step=start_step, evaluated=evaluated)
            if enabled
            else None
        )
        steps = total_steps(config)
        self._progress = Progress(steps, enabled=enabled)
        self._clock = StepClock(steps, step=start_step, examples_seen=start_step * self._batch)
        self._pending: tuple[int, Metrics, dict[str, Any]] | None = None
        self._times, self._last_step = times, start_step
        self._goodput, self._exporter, self._price = goodput, exporter, config.log.price_per_hour
        self._blocked_seconds = 0.0  # since the last logged step
        self._samples = 0

    def count_samples(self, index: np.ndarray) -> None:
        """Add the samples that this process feeds into a step to the digest."""
        self._samples = (self._samples + sample_digest(index)) % 2**64

    @contextmanager
    def waiting_for_devices(self) -> Iterator[None]:
        """Count the time of the `with` block as waiting for the devices, and so for other processes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._blocked_seconds += time.perf_counter() - start

    def log_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        """Log a step; the next `flush` fetches its numbers.

        Args:
            step: completed updates.
            metrics: of the step, on the devices.
            wait_seconds: total time that training has waited for data.
        """
        rates = self._clock.lap(step=step, examples_seen=step * self._batch, wait_seconds=wait_seconds)
        if self._goodput is not None:
            self._goodput.record()
        if self._peak_tflops is not None:
            flops = self._flops(self._last_step + 1, step)
            rates["mfu"] = mfu(rates["examples_per_second"], flops, jax.device_count(), self._peak_tflops)
        self._pending = (step, metrics, rates | self._ledger())
        self._account(step, rates)

    def _ledger(self) -> dict[str, Any]:
        """Return the share of productive steps, and the seconds of the whole run by cause."""
        if self._goodput is None:
            return {}
        seconds = {cause: round(value, 3) for cause, value in self._goodput.seconds().items()}
        return {"goodput": self._goodput.fraction(), "wall_seconds": seconds}

    def _account(self, step: int, rates: Mapping[str, float]) -> None:
        """Log and send the times of this process since the last logged step."""
        steps = step - self._last_step
        seconds = self._batch / rates["examples_per_second"]
        spent = StepTimes(
            host=socket.gethostname(),
            step_seconds=seconds,
            input_wait_seconds=rates["input_wait_fraction"] * seconds,
            blocked_seconds=min(self._blocked_seconds / steps, seconds),
            samples=f"{self._samples:016x}",
        )
        self._last_step, self._blocked_seconds, self._samples = step, 0.0, 0
        process_log.info(
            f"step {step}: {seconds:.4f} s/step: {spent.input_wait_seconds:.4f} waiting for data, "
            f"{spent.host_seconds:.4f} working on the host, {spent.blocked_seconds:.4f} waiting for the devices; "
            f"samples {spent.samples}"
        )
        if self._times is not None:
            self._times.send(step, steps, spent)

    def flush(self) -> None:
        """Write the pending step, if there is one."""
        if self._pending is None:
            return
        step, metrics, host = self._pending
        self._pending = None
        if self._writer is None:
            return
        with self.waiting_for_devices():
            skipped = np.asarray(metrics["samples_skipped"])
        values = {
            "examples_seen": step * self._batch,
            **{name: float(value) for name, value in metrics.items() if name != "samples_skipped"},
            **host,
            **self._count_samples(step, skipped),
        }
        slow: list[str] = []
        if self._times is not None:
            ranks, slow = self._times.receive(before=step)
            values |= ranks
        self._writer.write(step, values)
        self._progress.update(step, values)
        if self._exporter is not None:
            self._exporter.update(step, values)
        process_log.info(f"step {step}: loss {values['loss']:.6g}")
        for line in slow:
            self.message(line)

    def sync(self) -> None:
        """Wait until all that is written is on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def results(
        self, step: int, results: Mapping[str, Mapping[str, float]], failures: Mapping[str, str] | None = None
    ) -> None:
        """Write the results of an evaluation, and the reasons of tasks that failed, and show them."""
        for task, reason in (failures or {}).items():
            self.message(f"evaluation task {task} failed and is left out: {reason}")
        if self._writer is not None and (results or failures):
            failed = {"eval_failed": failures} if failures else {}
            line = {"examples_seen": step * self._batch, "eval": results, **failed, **self._ledger()}
            self._writer.write(step, line)
            shown = (
                f"{task} {name} {value:.3f}" for task, metrics in results.items() for name, value in metrics.items()
            )
            if results:
                self.message("  ".join(item for item in shown if " num_" not in item))

    def message(self, text: str) -> None:
        """Show a line; every process logs it."""
        process_log.info(text)
        if self._writer is not None:
            self._progress.message(text)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the `with` block out of the rates."""
        with self._clock.pause():
            yield

    def finish(self, step: int) -> None:
        """Show the times of the run, which ends at this step, and of several processes; all of them must call it."""
        if self._times is not None and (table := self._times.table()):
            self.message(table)
        if self._goodput is not None:
            self.message(self._goodput.table(pairs=step * self._batch, price_per_hour=self._price))

    def close(self) -> None:
        """Write the pending step and close the files."""
        self.flush()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()


def sample_digest(index: np.ndarray) -> int:
    """Return a digest of samples by their number in the source, the same in any order.

    It is a sum modulo 2^64, so those of all processes add up to that of the global batch, and those of all steps of
    an epoch to that of the whole source: if one sample were read twice, or left out, they would not.
    """
    mixed = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)  # splitmix64, which has no two equal values
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return results as a table: a line per task and metric, shares as percentages."""
    rows = [
        [task, name, metric_text(name, value)] for task, metrics in results.items() for name, value in metrics.items()
    ]
    return format_table(rows, ("task", "metric", "value"))


def metric_text(name: str, value: float) -> str:
    """Return a metric of an evaluation as people read it: a count, a share as percentage, or a number."""
    if name.startswith("num_"):
        return f"{value:.0f}"
    return f"{value:.3g}" if name in NO_SHARES else f"{100 * value:.1f} %"
