"""One run: the parts that its loop uses, and what it does besides stepping: judge the data, evaluate, save, finish."""

import collections
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from clipjax import distributed
from clipjax.checkpoint import Checkpoints, make_records
from clipjax.config import Config, LossKind, steps_of
from clipjax.data.pipeline import BadSampleLimit, TrainStream, pair_groups
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import Results, run_tasks, write_results
from clipjax.inputs import Inputs
from clipjax.journal import Journal, results_table
from clipjax.resume import Position
from clipjax.step import TrainState, eval_params, to_groups
from clipjax.typing import Batch, Metrics, Params

STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices
BATCH = ("image", "tokens", "reason")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of one run, and what they do together."""

    config: Config
    workdir: Path
    inputs: Inputs
    put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]]
    stream: TrainStream
    limit: BadSampleLimit
    checkpoints: Checkpoints
    journal: Journal
    signal: distributed.ShutdownSignal
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    make_encoder: Callable[[Params], Encoder]
    _in_flight: collections.deque[tuple[int, Metrics]] = field(default_factory=collections.deque)

    def next_batch(self) -> Mapping[str, jax.Array]:
        """The next global batch, on the devices, once they are not too far behind.

        Raises:
            TooManyBadSamples: the data is unusable beyond the configured share; every process learns so at the same
                step, as all of them judge the same counts.
        """
        while len(self._in_flight) >= STEPS_IN_FLIGHT:
            step, metrics = self._in_flight.popleft()
            with self.journal.blocked():
                jax.block_until_ready(metrics["loss"])
            if step % steps_of(self.config.log.every_examples, self.config) == 0:
                self.limit.check(step, jax.device_get(metrics["samples_skipped"]).tolist(), self.stream.latest_bad())
        batch = next(self.stream)
        self.journal.feed(batch["index"])
        group = pair_groups(batch, self.config.loss.same_pair)
        more = {} if group is None else {"group": group}
        if self.config.loss.kind is LossKind.GLOBAL:
            more["index"] = batch["index"].astype(np.int32)
        return self.put({name: batch[name] for name in BATCH} | more)

    def follow(self, step: int, metrics: Metrics) -> None:
        """Take note of a step that has been started."""
        self._in_flight.append((step, metrics))

    def evaluate(self, state: TrainState, step: int) -> Results:
        """Run the tasks; should one fail, the state is saved before the error goes on."""
        self.journal.flush()
        with self.journal.pause():
            try:
                results = run_tasks(self.inputs.tasks, self.make_encoder(eval_params(state)))
            except Exception:
                self.save(state, step)
                self.checkpoints.wait()
                raise
            if results:
                self.journal.results(step, results)
        return results

    def save(self, state: TrainState, step: int, results: Results | None = None) -> None:
        """Save in the background; the log is complete up to this step before the checkpoint can be."""
        self.journal.flush()
        if self.checkpoints.latest_step() == step:
            return
        teacher = self.inputs.teacher
        position = Position(
            step,
            evaluated=results is not None,
            num_samples=len(self.inputs.source),
            teacher_step=None if teacher is None else teacher.step,
        )
        records = make_records(self.config, self.inputs.tokenizer, asdict(position))
        best_value = None
        if self.config.checkpoint.best_metric is not None and results:
            task, _, metric = self.config.checkpoint.best_metric.rpartition(":")
            best_value = results[task][metric]
        with self.journal.blocked():  # saving would wait for the step; not for what others call host work
            jax.block_until_ready(state.step)
        self.checkpoints.save(step, to_groups(state), records, best_value)

    def finish(self, state: TrainState, last: int, results: Results | None) -> None:
        """Wait for the last checkpoint, then leave `results.json`, the sign of a finished run."""
        self.checkpoints.wait()
        self.journal.flush()
        if results is None:  # the run was complete before: its log is, but a kill may have come before results.json
            results = run_tasks(self.inputs.tasks, self.make_encoder(eval_params(state)))
        if distributed.is_first():
            write_results(self.workdir / "results.json", self.checkpoints.path(last), results)
        self.journal.finish()
        if results:
            self.journal.message(results_table(results))
        examples = last * self.config.global_batch_size
        self.journal.message(f"done: {last} steps, {examples} examples; all of it is in {self.workdir}")
