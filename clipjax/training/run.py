"""One run from a start or a rollback on: the parts that its loop uses, and their common work.

`build` makes the parts, a line per noun; the loop sees a `Run`: step, judge the data and the updates, evaluate, save,
finish.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.records import make_records
from clipjax.config import Config, steps_of, total_steps
from clipjax.data.bad_sample_limit import BadSampleLimit
from clipjax.data.patch_rows import mean_flops_per_pair
from clipjax.data.training_stream import TrainStream, WorkersDie
from clipjax.evals.encoder import Encoder
from clipjax.evals.results import write_results
from clipjax.evals.runner import RESULTS_FILE, Evaluation, run_tasks
from clipjax.losses import describe_loss
from clipjax.monitoring.events import Events
from clipjax.monitoring.run_logger import RunLogger, results_table
from clipjax.monitoring.stragglers import rank_times
from clipjax.runtime import processes
from clipjax.runtime.objects import join
from clipjax.runtime.shutdown import Shutdown
from clipjax.training import left_out
from clipjax.training.inputs import Inputs
from clipjax.training.recovery import Recovery, RunStopped
from clipjax.training.resume import Position, start_state
from clipjax.training.sample_counts import SampleCounts
from clipjax.training.session import Session, open_checkpoints
from clipjax.training.step import TrainState, eval_params, to_items
from clipjax.training.stream import device_batch, open_stream
from clipjax.typing import Batch, Metrics

STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices; updates are judged as late
JUDGED = ("loss", "param_norm", "skipped_in_a_row", "loss_spike", "samples_skipped")
"""Metrics that are looked at after every step."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """The parts of one run, and what they do together.

    Attributes:
        session: the parts that outlive a rollback.
        stream: training batches of this process.
        limit: judges the share of unusable samples.
        checkpoints: of the workdir.
        recovery: judges the updates.
        logger: metrics, progress, log.
        state: the state to start with; the first step takes its buffers over.
        start: completed updates at the start, and what belongs to them.
    """

    session: Session
    stream: TrainStream
    limit: BadSampleLimit
    checkpoints: Checkpoints
    recovery: Recovery
    logger: RunLogger
    state: TrainState
    start: Position
    _in_flight: collections.deque[tuple[int, Metrics, jax.Array | None]] = field(default_factory=collections.deque)

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return self.session.checked.config

    @property
    def workdir(self) -> Path:
        """The folder of the run's files."""
        return self.session.checked.workdir

    @property
    def place(self) -> str:
        """The place where the run's files are kept: the workdir, or the address that it is a local folder of."""
        return self.session.checked.place

    @property
    def inputs(self) -> Inputs:
        """Data, tokenizer, tasks, first weights."""
        return self.session.checked.inputs

    @property
    def signal(self) -> Shutdown:
        """The request to stop, once it comes."""
        return self.session.signal

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Start an update; the results are still being computed. The state's buffers are taken over.

        This is `TrainStep.__call__`, compiled once.
        """
        compiles = "step" not in vars(self.session)  # the first time
        with self.session.goodput.phase("compile") if compiles else contextlib.nullcontext():
            return self.session.step(state, batch, self.session.teacher)

    def next_batch(self, step: int) -> Mapping[str, jax.Array]:
        """Return the global batch of a step, on the devices, once they are not too far behind.

        Raises:
            TooManyBadSamples: the data is unusable beyond the configured share; every process raises this at the same
                step, as all of them judge the same counts.
            RollBack: updates were not finite, or the loss spiked; the run goes on from an earlier checkpoint.
            RunStopped: there is no such checkpoint, or copies of the state differ.
        """
        self.session.goodput.step(step)
        self.session.watchdog.beat(step)
        while len(self._in_flight) >= STEPS_IN_FLIGHT:
            self._count_bad(*self._judge_oldest())
        with self.session.goodput.phase("waiting_for_data"), self.session.watchdog.reading():
            batch = self._read()
        self.logger.count_samples(batch["index"])
        self.session.profile.maybe_start(step)
        return device_batch(self.config, self.session.mesh, batch)

    def _read(self) -> dict[str, np.ndarray]:
        """Return this process's part of the next batch; after too many deaths of workers without them, to the stop."""
        try:
            return next(self.stream)
        except WorkersDie as error:
            self.signal.request(str(error))
            self.stream.read_here()
            return next(self.stream)

    def follow(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Count a step that has been started among those in flight."""
        replicas, every = self.session.replicas, self.session.replica_check_every
        digests = replicas.check(state) if replicas is not None and step % every == 0 else None
        self._in_flight.append((step, metrics, digests))
        if self.signal.take_profile_request():
            self.session.profile.request()
        self.session.profile.maybe_stop(step, metrics)

    def _judge_oldest(self) -> tuple[int, dict[str, np.ndarray]]:
        """Judge the oldest update in flight; return its step and what it was judged by."""
        step, metrics, digests = self._in_flight.popleft()
        with self.logger.waiting_for_devices():
            jax.block_until_ready(metrics["loss"])
        values = jax.device_get({name: metrics[name] for name in JUDGED})
        if digests is not None and self.session.replicas is not None:
            self.recovery.judge_replicas(step, self.session.replicas.find_differing(digests))
        self.recovery.judge(step, values)
        if step == total_steps(self.config):
            self.recovery.end(step, values)
        return step, values

    def settle(self) -> None:
        """Judge all updates that are in flight.

        Raises:
            TooManyBadSamples: the data is unusable beyond the configured share.
            RollBack: the last ones were not finite; the run goes on from an earlier checkpoint.
            RunStopped: there is no such checkpoint.
        """
        for each in [self._judge_oldest() for _ in range(len(self._in_flight))]:
            self._count_bad(*each)

    def _count_bad(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Compare the bad samples up to a step with the limit, as often as the log counts them."""
        if step % steps_of(self.config.log.every_examples, self.config) == 0 or step == total_steps(self.config):
            self.limit.check(step, values["samples_skipped"].tolist(), self.stream.latest_bad)

    def _encoder(self, state: TrainState) -> Encoder:
        clip = self.session.program.clip
        return Encoder(self.config, clip, self.session.mesh, self.inputs.tokenizer, eval_params(state))

    def evaluate(self, state: TrainState, step: int, names: Sequence[str]) -> Evaluation:
        """Run the tasks of these names; one that fails is told and left out.

        The state is saved before any other error is raised.
        """
        tasks = {name: self.inputs.tasks[name] for name in names}
        self.logger.flush()
        jax.block_until_ready(state.step)  # what is left of the step belongs to the step
        with self.logger.pause(), self.session.phase("evaluation"):
            try:
                evaluation = run_tasks(tasks, self._encoder(state))
            except Exception:
                self.save(state, step)
                self.wait_for_saves()
                raise
            self.logger.results(step, evaluation.results, evaluation.failures)
        return evaluation

    def save(self, state: TrainState, step: int, evaluation: Evaluation | None = None, *, last: bool = False) -> None:
        """Save in the background; the log is complete up to this step before the checkpoint is.

        Args:
            state: to save.
            step: completed updates.
            evaluation: of this step, if there was one.
            last: the run ends or stops here.

        Raises:
            SavesFail: too many saves in a row have failed.
        """
        self.logger.flush()
        with self.logger.waiting_for_devices():  # saving would wait for the step: no work of the host
            jax.block_until_ready(state.step)
        teacher = self.inputs.teacher_checkpoint
        position = Position(
            step,
            evaluated=evaluation is not None,
            num_samples=len(self.inputs.source),
            teacher_step=None if teacher is None else teacher.step,
            shards=[list(shard) for shard in self.inputs.source.digests()],
            decisions=self.session.decisions.records(),
            order=None if self.inputs.order is None else self.inputs.order.to_record(),
            index=self.inputs.index_formats(),
        )
        records = make_records(self.config, self.inputs.tokenizer, asdict(position))
        best_value = self._best_value(evaluation)
        with self.session.phase("saving", "a save"):
            ends = last or step == total_steps(self.config)
            self.checkpoints.save(step, to_items(state), records, best_value, last=ends, before_commit=self._sync_logs)
        self.session.goodput.record()

    def _sync_logs(self) -> None:
        """Bring the log to the disk, so that no checkpoint there is ahead of it, even if the power fails."""
        self.logger.sync()
        self.session.events.sync()

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Add the evaluation of a step that was saved before it was evaluated."""
        self.checkpoints.add_best(step, self._best_value(evaluation))

    def _best_value(self, evaluation: Evaluation | None) -> float | None:
        """Return the metric that chooses the best step; the task may have failed."""
        if self.config.checkpoint.best_metric is None or evaluation is None:
            return None
        task, _, metric = self.config.checkpoint.best_metric.rpartition(":")
        return evaluation.results.get(task, {}).get(metric)

    def wait_for_saves(self) -> None:
        """Wait until everything saved is on disk.

        Raises:
            SavesFail: the last checkpoint could not be saved.
        """
        with self.session.phase("saving", "the last save"):
            self.checkpoints.wait()

    def finish(self, state: TrainState, last: int, evaluation: Evaluation | None) -> None:
        """Wait for the last checkpoint, then leave `results.json`, the sign of a finished run.

        Raises:
            SavesFail: the last checkpoint could not be saved.
            RunStopped: the store that keeps the workdir does not take it; or only `results.json` could not be written,
                and the results are shown before.
        """
        self.wait_for_saves()
        self.recovery.mark_all()
        self.logger.flush()
        self.session.send_all()
        if evaluation is None:  # the run was complete before: its log is, but a kill may have come before results.json
            with self.session.phase("evaluation"):
                evaluation = run_tasks(self.inputs.tasks, self._encoder(state))
        path = self.workdir / RESULTS_FILE
        failure = exchange.publish("results", lambda: write_results(path, self._checkpoint(last), evaluation))
        self.logger.finish(last)
        if evaluation.results:
            self.logger.message(results_table(evaluation.results))
        if failure:
            raise RunStopped(
                f"all {last} steps are done and saved, but {path} cannot be written: {failure}; make room, and the "
                "same command evaluates again and writes it"
            )
        examples = last * self.config.global_batch_size
        self.logger.message(f"done: {last} steps, {examples} examples; all of it is in {self.place}")

    def _checkpoint(self, step: int) -> str:
        """Return where a checkpoint is kept."""
        path = self.checkpoints.path(step)
        return join(self.place, *path.relative_to(self.workdir).parts)


class _Teller:
    """Events that are shown as well, as the progress line allows; in any thread.

    Attributes:
        say: shows a line.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self.say: Callable[[str], None] = processes.announce

    def failed_save(self, step: int, reason: str) -> None:
        self._tell("failed_save", f"the checkpoint of step {step} is not saved: {reason}", step=step)

    def worker_restart(self, text: str) -> None:
        self._tell("worker_restart", text)

    def stand_ins(self, text: str, total: int) -> None:
        self._tell("stand_ins", text, total=total)

    def _tell(self, event: str, text: str, **facts: int) -> None:
        self._events.add(event, text=text, **facts)
        self.say(text)


@contextlib.contextmanager
def build(session: Session) -> Iterator[Run]:
    """Build the parts of a run, from its checkpoint to its first batch; the end of the `with` block closes them.

    Raises:
        DamagedCheckpoint: no checkpoint can be restored, though there are some.
    """
    checked = session.checked
    config, workdir, inputs = checked.config, checked.workdir, checked.inputs
    teller = _Teller(session.events)
    with contextlib.ExitStack() as stack:
        with session.phase("initialisation", "the start"):
            checkpoints = open_checkpoints(session, teller.failed_save)
            stack.callback(_wait_for_save, checkpoints.close, session)
            state, start = start_state(session.program, inputs, checkpoints, session.decisions)
            if processes.is_first():
                left_out.write_missing(workdir, session.decisions.taken, inputs.source, config, inputs.order)
        logger = RunLogger(
            config,
            workdir,
            start_step=start.step,
            evaluated=start.evaluated,
            flops_per_pair=functools.partial(mean_flops_per_pair, config),
            count_samples=SampleCounts(config, inputs, session.decisions),
            times=rank_times(),
            goodput=session.goodput,
            exporter=checked.exporter,
        )
        stack.callback(logger.close)
        stack.callback(_wait_for_save, checkpoints.close, session)  # first, as it brings the log to the disk
        teller.say = logger.message  # above the progress line
        logger.message(describe_loss(config, session.mesh))
        if checked.exporter is not None:
            logger.message(f"metrics for Prometheus: {checked.exporter.url}")
        if session.keeper is not None:
            stack.enter_context(session.keeper.telling(teller.stand_ins))
        stream = open_stream(session, start.step, teller.worker_restart)
        stack.callback(stream.close)
        yield Run(
            session=session,
            stream=stream,
            limit=BadSampleLimit(
                config,
                num_samples=len(inputs.source),
                start_step=start.step,
                skipped=jax.device_get(state.samples_skipped).tolist(),
            ),
            checkpoints=checkpoints,
            recovery=Recovery(
                config,
                checkpoints=checkpoints,
                decisions=session.decisions,
                events=session.events,
                start_step=start.step,
                settle=lambda: _wait_for_save(checkpoints.settle, session),
            ),
            logger=logger,
            state=state,
            start=start,
        )


def _wait_for_save(wait: Callable[[], None], session: Session) -> None:
    """Wait for the save in progress; after a signal this takes a while."""
    with session.phase("saving", "the last save"):
        wait()
