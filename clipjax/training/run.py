"""One run: the parts that its loop uses, and their common work: step, judge the data, evaluate, save, finish.

`build` makes the parts, a line per noun; the loop sees a `Run`.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.records import make_records
from clipjax.checkpoints.saved import load_params
from clipjax.config import Config, LossKind, steps_of, total_steps
from clipjax.data.sample import REASONS
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import BadSampleLimit, TrainStream, pair_groups
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import Evaluation, run_tasks, write_results
from clipjax.losses import describe_loss
from clipjax.monitoring import events as run_events
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import Goodput, wall_clock
from clipjax.monitoring.run_logger import RunLogger, results_table
from clipjax.monitoring.stragglers import rank_times
from clipjax.runtime import device_check, process_log, processes, sharding
from clipjax.training.inputs import Inputs
from clipjax.training.preflight import Checked
from clipjax.training.program import Program, build_program
from clipjax.training.resume import Position, start_state
from clipjax.training.step import TrainState, eval_params, to_items
from clipjax.typing import Batch, Metrics, Params

STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices
BATCH = ("image", "tokens", "skip_reason")
"""Arrays of a batch that every step takes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """The parts of one run, and what they do together.

    Attributes:
        config: all of its settings.
        workdir: the folder of its files.
        inputs: data, tokenizer, tasks, first weights.
        program: the functions that are compiled.
        stream: training batches of this process.
        limit: judges the share of unusable samples.
        checkpoints: of the workdir.
        logger: metrics, progress, log.
        goodput: the ledger of the run's time.
        signal: the request to stop, once it comes.
        teacher: parameters of the frozen model to learn from; None: without.
        state: the state to start with; the first step takes its buffers over.
        start: completed updates at the start, and what belongs to them.
    """

    config: Config
    workdir: Path
    inputs: Inputs
    program: Program
    stream: TrainStream
    limit: BadSampleLimit
    checkpoints: Checkpoints
    logger: RunLogger
    goodput: Goodput
    signal: processes.ShutdownSignal
    teacher: Params | None
    state: TrainState
    start: Position
    _in_flight: collections.deque[tuple[int, Metrics]] = field(default_factory=collections.deque)

    @functools.cached_property
    def _jitted_step(self) -> Any:
        return self.program.jit(self.state)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Start an update; the results are still being computed. The state's buffers are taken over.

        This is `TrainStep.__call__`, compiled once.
        """
        with contextlib.nullcontext() if self._in_flight else self.goodput.phase("compile"):  # the first one
            return self._jitted_step(state, batch, self.teacher)

    def next_batch(self) -> Mapping[str, jax.Array]:
        """Return the next global batch, on the devices, once they are not too far behind.

        Raises:
            TooManyBadSamples: the data is unusable beyond the configured share; every process raises this at the same
                step, as all of them judge the same counts.
        """
        while len(self._in_flight) >= STEPS_IN_FLIGHT:
            step, metrics = self._in_flight.popleft()
            with self.logger.waiting_for_devices():
                jax.block_until_ready(metrics["loss"])
            if step % steps_of(self.config.log.every_examples, self.config) == 0:
                self.limit.check(step, jax.device_get(metrics["samples_skipped"]).tolist(), self.stream.latest_bad())
        with self.goodput.phase("waiting_for_data"):
            batch = next(self.stream)
        self.logger.count_samples(batch["index"])
        group = pair_groups(batch, self.config.loss.same_pair)
        more = {} if group is None else {"group": group}
        if self.config.loss.kind is LossKind.GLOBAL:
            more["index"] = batch["index"].astype(np.int32)
        return sharding.global_batch(self.program.mesh, {name: batch[name] for name in BATCH} | more)

    def follow(self, step: int, metrics: Metrics) -> None:
        """Count a step that has been started among those in flight."""
        self._in_flight.append((step, metrics))

    def _encoder(self, state: TrainState) -> Encoder:
        program = self.program
        return Encoder(self.config, program.clip, program.mesh, self.inputs.tokenizer, eval_params(state))

    def evaluate(self, state: TrainState, step: int) -> Evaluation:
        """Run the tasks; one that fails is told and left out. The state is saved before any other error is raised."""
        self.logger.flush()
        jax.block_until_ready(state.step)  # what is left of the step belongs to the step
        with self.logger.pause(), self.goodput.phase("evaluation"):
            try:
                evaluation = run_tasks(self.inputs.tasks, self._encoder(state))
            except Exception:
                self.save(state, step)
                self.checkpoints.wait()
                raise
            self.logger.results(step, evaluation.results, evaluation.failures)
        return evaluation

    def save(self, state: TrainState, step: int, evaluation: Evaluation | None = None) -> None:
        """Save in the background; the log is complete up to this step before the checkpoint is."""
        self.logger.flush()
        if self.checkpoints.latest_step() == step:
            return
        teacher = self.inputs.teacher_checkpoint
        position = Position(
            step,
            evaluated=evaluation is not None,
            num_samples=len(self.inputs.source),
            teacher_step=None if teacher is None else teacher.step,
            shards=[list(shard) for shard in self.inputs.source.digests()],
        )
        records = make_records(self.config, self.inputs.tokenizer, asdict(position))
        best_value = None
        if self.config.checkpoint.best_metric is not None and evaluation is not None:
            task, _, metric = self.config.checkpoint.best_metric.rpartition(":")
            best_value = evaluation.results.get(task, {}).get(metric)  # the task may have failed
        with self.logger.waiting_for_devices():  # saving would wait for the step: no work of the host
            jax.block_until_ready(state.step)
        latest = self.checkpoints.latest_step()
        with self.goodput.phase("saving"):
            self.checkpoints.save(step, to_items(state), records, best_value, last=step == total_steps(self.config))
            if latest is not None:
                self.checkpoints.mark_good(latest)
        self.goodput.record()

    def finish(self, state: TrainState, last: int, evaluation: Evaluation | None) -> None:
        """Wait for the last checkpoint, then leave `results.json`, the sign of a finished run."""
        with self.goodput.phase("saving"):
            self.checkpoints.wait()
            self.checkpoints.mark_good(last)
        self.logger.flush()
        if evaluation is None:  # the run was complete before: its log is, but a kill may have come before results.json
            with self.goodput.phase("evaluation"):
                evaluation = run_tasks(self.inputs.tasks, self._encoder(state))
        if processes.is_first():
            write_results(self.workdir / "results.json", self.checkpoints.path(last), evaluation)
        self.logger.finish(last)
        if evaluation.results:
            self.logger.message(results_table(evaluation.results))
        examples = last * self.config.global_batch_size
        self.logger.message(f"done: {last} steps, {examples} examples; all of it is in {self.workdir}")


@contextlib.contextmanager
def build(checked: Checked) -> Iterator[Run]:
    """Build the parts of a run, from its mesh to its first batch; the end of the `with` block closes them.

    Raises:
        DamagedCheckpoint: the arrays of the first state cannot be restored.
    """
    config, workdir, inputs = checked.config, checked.workdir, checked.inputs
    mesh = sharding.make_mesh(config.mesh)
    teacher_config = None if inputs.teacher_checkpoint is None else inputs.teacher_checkpoint.config
    program = build_program(config, mesh, num_samples=len(inputs.source), tx=checked.tx, teacher=teacher_config)
    with contextlib.ExitStack() as stack:
        goodput = stack.enter_context(_goodput(checked))
        process_log.info(f"device check: {device_check.check_devices(mesh)}")
        stack.enter_context(jax.set_mesh(mesh))
        signal = processes.ShutdownSignal()
        stack.callback(signal.restore)
        checkpoints = Checkpoints(workdir, config.checkpoint, max_failed_saves=config.recovery.max_failed_saves)
        stack.callback(_close, checkpoints, goodput)
        state, start = start_state(config, inputs, checkpoints, program.init_state, mesh)
        teacher = None if inputs.teacher_checkpoint is None else load_params(inputs.teacher_checkpoint, mesh)
        logger = RunLogger(
            config,
            workdir,
            start_step=start.step,
            flops_per_pair=config.model.flops(),
            skip_reasons=REASONS,
            times=rank_times(),
            goodput=goodput,
            exporter=checked.exporter,
        )
        stack.callback(logger.close)
        logger.message(describe_loss(config, mesh))
        if checked.exporter is not None:
            logger.message(f"metrics for Prometheus: {checked.exporter.url}")
        stream = TrainStream(
            inputs.source,
            tokenize=TextToTokens(inputs.tokenizer, config.model.text.context_length),
            config=config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start.step,
        )
        stack.callback(stream.close)
        yield Run(
            config=config,
            workdir=workdir,
            inputs=inputs,
            program=program,
            stream=stream,
            limit=BadSampleLimit(
                config,
                num_samples=len(inputs.source),
                start_step=start.step,
                skipped=jax.device_get(state.samples_skipped).tolist(),
            ),
            checkpoints=checkpoints,
            logger=logger,
            goodput=goodput,
            signal=signal,
            teacher=teacher,
            state=state,
            start=start,
        )


@contextlib.contextmanager
def _goodput(checked: Checked) -> Iterator[Goodput]:
    """Open the ledger of this start, the first process's in `events.jsonl`; record the end of the `with` block."""
    events = Events(checked.workdir, enabled=processes.is_first(), clock=wall_clock)
    past = run_events.read(checked.workdir) if processes.is_first() else []
    events.counts.update(event["event"] for event in past)
    goodput = Goodput(events, past, devices=jax.device_count())
    if checked.exporter is not None:
        checked.exporter.watch(goodput, events)
    try:
        yield goodput
    except BaseException as error:
        goodput.record("stop", reason=type(error).__name__)
        raise
    goodput.record("stop")


def _close(checkpoints: Checkpoints, goodput: Goodput) -> None:
    """Wait until everything saved is on disk; after a signal this takes a while."""
    with goodput.phase("saving"):
        checkpoints.close()
