"""One start of a process: what lives as long as it does, through every rollback of its run.

`open_session` makes it: ledger, signals, watchdog, mesh, compiled step. `run.build` adds what a rollback makes anew.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.saved import load_params
from clipjax.checkpoints.saving import OnFailure
from clipjax.config import DataConfig, patch_menu
from clipjax.monitoring import events as run_events
from clipjax.monitoring import run_record
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import Goodput, wall_clock
from clipjax.monitoring.profile import ProfileOnRequest
from clipjax.runtime import connections, device_check, process_log, processes, sharding, start_signals
from clipjax.runtime.shutdown import Shutdown
from clipjax.runtime.watchdog import Watchdog
from clipjax.training.decisions import Decisions
from clipjax.training.preflight import Checked
from clipjax.training.program import Program, build_program
from clipjax.training.recovery import RunStopped
from clipjax.training.replicas import ReplicaCheck, steps_between_checks
from clipjax.training.stand_ins import Keeper, open_keeper
from clipjax.typing import Params

_sendings = itertools.count()


@dataclass(frozen=True, eq=False, kw_only=True)
class Session:
    """The parts of a start that outlive a rollback.

    Attributes:
        checked: the run that was allowed to begin.
        mesh: the devices.
        program: the functions that are compiled.
        decisions: that the run has taken.
        events: of the run.
        goodput: the ledger of the run's time.
        signal: requests to stop.
        watchdog: ends the run if it is stuck.
        profile: traces steps on request.
        teacher: parameters of the frozen model to learn from; None: without.
        keeper: keeps what stands in for unreadable samples; None: such a sample is an error.
    """

    checked: Checked
    mesh: Mesh
    program: Program
    decisions: Decisions
    events: Events
    goodput: Goodput
    signal: Shutdown
    watchdog: Watchdog
    profile: ProfileOnRequest
    teacher: Params | None
    keeper: Keeper | None

    @functools.cached_property
    def step(self) -> Any:
        """The jitted step: `TrainStep.__call__`, compiled once, or once for each budget of patches."""
        if not patch_menu(self.checked.config):
            return self.program.jit(self.program.abstract_state)
        with self.watchdog.paused("compilation"):
            return self.program.compile_all(processes.announce)

    @functools.cached_property
    def replicas(self) -> ReplicaCheck | None:
        """The check of the copies of the state on several devices; None: it is off, or there are no copies."""
        if self.checked.config.recovery.replica_check_examples is None:
            return None
        check = ReplicaCheck(self.mesh, self.program.abstract_state)
        process_log.info(f"arrays without copies to compare: {', '.join(check.not_covered) or 'none'}")
        return check

    @contextlib.contextmanager
    def phase(self, cause: str, name: str = "") -> Iterator[None]:
        """Count the time of the `with` block under a cause, and allow any time in which some process works.

        Args:
            cause: of the ledger.
            name: of the block in the watchdog's messages; the cause if left out.
        """
        with self.goodput.phase(cause), self.watchdog.paused(name or cause):
            yield

    def send_all(self) -> None:
        """Wait until all that lies in the workdir is where it is kept, if that is a store; all processes call this.

        Raises:
            RunStopped: on all processes: something is not; it lies in the local folder.
        """
        if self.checked.place != str(self.checked.workdir):
            _send_all(self.checked, self.watchdog)

    @property
    def replica_check_every(self) -> int:
        """Steps between two checks of the copies."""
        return steps_between_checks(self.checked.config)


@contextlib.contextmanager
def open_session(checked: Checked, *, record: bool = True) -> Iterator[Session]:
    """Check the devices and prepare the program; the end of the `with` block closes everything.

    Args:
        checked: the run.
        record: keep this start in `run.json` and `events.jsonl`.

    Raises:
        BrokenDevice: a device or link is missing or gives wrong results.
        DamagedCheckpoint: the teacher cannot be restored.
    """
    config, workdir, inputs = checked.config, checked.workdir, checked.inputs
    with contextlib.ExitStack() as stack:
        if checked.exporter is not None:
            stack.callback(checked.exporter.close)
        log = process_log.open_file()
        watchdog = stack.enter_context(
            Watchdog(config.recovery.stuck_seconds, log=log, storage_seconds=_storage_seconds(config.data))
        )
        checked.decisions.patience = watchdog.paused
        events = Events(workdir, enabled=record and processes.is_first(), clock=wall_clock)
        goodput = stack.enter_context(_ledger(checked, events))
        effect = "the run saves and leaves" if record else "nothing is saved; it leaves after the step that it computes"
        signal = Shutdown(log, effect=effect)
        stack.callback(signal.close)
        start_signals.hand_over(signal.receive)
        if record and checked.place != str(workdir):
            stack.enter_context(_mirrored(checked, signal, watchdog))
        mesh = sharding.make_mesh(config.mesh)
        times = device_check.check_devices(mesh)
        if record and processes.is_first():
            run_record.add_to_start(workdir, device_check=times)
        stack.enter_context(jax.set_mesh(mesh))
        teacher = inputs.teacher_checkpoint
        profile = ProfileOnRequest(workdir, say=processes.announce)
        stack.callback(profile.close)
        stack.enter_context(watchdog.training())
        yield Session(
            checked=checked,
            mesh=mesh,
            program=build_program(
                config,
                mesh,
                num_samples=len(inputs.source),
                tx=checked.tx,
                teacher=None if teacher is None else teacher.config,
            ),
            decisions=checked.decisions,
            events=events,
            goodput=goodput,
            signal=signal,
            watchdog=watchdog,
            profile=profile,
            teacher=None if teacher is None else load_params(teacher, mesh),
            keeper=stack.enter_context(open_keeper(checked.decisions, config)) if record else None,
        )


def open_checkpoints(session: Session, on_failure: OnFailure) -> Checkpoints:
    """Open the checkpoints of the workdir; those that are complete are recorded once they are where it is kept.

    Args:
        session: of the run.
        on_failure: gets the step and the reason of each save that fails.
    """
    config, workdir, mirror = session.checked.config, session.checked.workdir, session.checked.mirror

    def record(step: int) -> None:
        run_record.record_commit(workdir, step)

    def send(step: int) -> None:
        assert mirror is not None
        mirror.commit(str(step), then=lambda: record(step))  # a start elsewhere would miss it before

    return Checkpoints(
        workdir,
        config.checkpoint,
        max_failed_saves=config.recovery.max_failed_saves,
        on_failure=on_failure,
        on_commit=record if mirror is None else send,
        copy=mirror if processes.is_first() else None,
        apart=session.checked.apart,
    )


def _storage_seconds(data: DataConfig) -> float:
    """Return the time that reading a batch may take where a store is away: two samples, each with all its tries."""
    places = [data.train, data.image_root or "", *(part.source for part in data.mixture.values())]
    is_remote = any("://" in place for place in places)
    return 2 * (connections.RETRY_SECONDS + connections.REQUEST_SECONDS) if is_remote else 0.0


@contextlib.contextmanager
def _mirrored(checked: Checked, signal: Shutdown, watchdog: Watchdog) -> Iterator[None]:
    """Keep the workdir on its store; at the end of the `with` block all of it is there.

    Raises:
        RunStopped: it is not; what is missing lies in the local folder.
    """
    mirror = checked.mirror
    if mirror is not None:
        mirror.start(say=processes.announce, on_lost=signal.request)
    try:
        yield
    except BaseException:
        if mirror is not None:
            with watchdog.paused("the last upload"):
                left = mirror.flush()
            if left:
                processes.announce(left)
        raise
    _send_all(checked, watchdog)


def _send_all(checked: Checked, watchdog: Watchdog) -> None:
    """Wait until the store has all that lies in the workdir; all processes call this.

    Raises:
        RunStopped: on all processes: it has not.
    """
    with watchdog.paused("the last upload"):
        own = "" if checked.mirror is None else checked.mirror.flush()
        left = exchange.publish(f"mirror/left/{next(_sendings)}", lambda: own)
    if left:
        raise RunStopped(left)


@contextlib.contextmanager
def _ledger(checked: Checked, events: Events) -> Iterator[Goodput]:
    """Open the ledger of this start; record the end of the `with` block."""
    past = run_events.read(checked.workdir) if processes.is_first() else ()
    goodput = Goodput(events, past, devices=jax.device_count())
    if checked.exporter is not None:
        checked.exporter.watch(goodput, events)
    try:
        yield goodput
    except BaseException as error:
        goodput.record("stop", reason=type(error).__name__)
        raise
    goodput.record("stop")
