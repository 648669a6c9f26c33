"""One run: the parts that its loop uses, and what it does besides stepping: judge the data, evaluate, save, finish.

`build` makes the parts, a line per noun; `Run` is what the loop sees.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.records import make_records
from clipjax.checkpoints.saved import load_params
from clipjax.config import Config, LossKind, steps_of
from clipjax.data.sample import REASONS
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import BadSampleLimit, TrainStream, pair_groups
from clipjax.evals.encoder import Encoder, make_encoder_factory
from clipjax.evals.runner import Results, run_tasks, write_results
from clipjax.losses import describe_loss
from clipjax.monitoring.run_logger import RunLogger, results_table
from clipjax.monitoring.stragglers import rank_times
from clipjax.runtime import processes, sharding
from clipjax.training.inputs import Inputs
from clipjax.training.preflight import Checked
from clipjax.training.program import build_program
from clipjax.training.resume import Position, start_state
from clipjax.training.step import TrainState, eval_params, to_items
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
    journal: RunLogger
    signal: processes.ShutdownSignal
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    make_encoder: Callable[[Params], Encoder]
    state: TrainState
    start: Position
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
        self.checkpoints.save(step, to_items(state), records, best_value)

    def finish(self, state: TrainState, last: int, results: Results | None) -> None:
        """Wait for the last checkpoint, then leave `results.json`, the sign of a finished run."""
        self.checkpoints.wait()
        self.journal.flush()
        if results is None:  # the run was complete before: its log is, but a kill may have come before results.json
            results = run_tasks(self.inputs.tasks, self.make_encoder(eval_params(state)))
        if processes.is_first():
            write_results(self.workdir / "results.json", self.checkpoints.path(last), results)
        self.journal.finish()
        if results:
            self.journal.message(results_table(results))
        examples = last * self.config.global_batch_size
        self.journal.message(f"done: {last} steps, {examples} examples; all of it is in {self.workdir}")


@contextlib.contextmanager
def build(checked: Checked) -> Iterator[Run]:
    """The parts of a run, from its mesh to its first batch; closed at the end of the `with` block.

    Raises:
        DamagedCheckpoint: the arrays that it starts with cannot be restored.
    """
    config, workdir, inputs = checked.config, checked.workdir, checked.inputs
    mesh = sharding.make_mesh(config.mesh)
    teacher_config = None if inputs.teacher is None else inputs.teacher.config
    program = build_program(config, mesh, num_samples=len(inputs.source), tx=checked.tx, teacher=teacher_config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        signal = processes.ShutdownSignal()
        stack.callback(signal.restore)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        stack.callback(checkpoints.close)
        state, start = start_state(config, inputs, checkpoints, program.init_state, mesh)
        teacher = None if inputs.teacher is None else load_params(inputs.teacher, mesh)
        journal = RunLogger(
            config,
            workdir,
            start_step=start.step,
            flops_per_pair=config.model.flops(),
            skip_reasons=REASONS,
            times=rank_times(),
        )
        stack.callback(journal.close)
        journal.message(describe_loss(config, mesh))
        stream = TrainStream(
            inputs.source,
            tokenize=TextToTokens(inputs.tokenizer, config.model.text.context_length),
            config=config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start.step,
        )
        stack.callback(stream.close)
        update = program.jit(state)
        yield Run(
            config=config,
            workdir=workdir,
            inputs=inputs,
            put=functools.partial(sharding.global_batch, mesh),
            stream=stream,
            limit=BadSampleLimit(
                config,
                num_samples=len(inputs.source),
                start_step=start.step,
                skipped=jax.device_get(state.samples_skipped).tolist(),
            ),
            checkpoints=checkpoints,
            journal=journal,
            signal=signal,
            train_step=lambda state, batch: update(state, batch, teacher),
            make_encoder=make_encoder_factory(config, program.clip, mesh, inputs.tokenizer),
            state=state,
            start=start,
        )
