"""Verdicts of all processes on a checkpoint, and in words: what is refused, and what a person is warned of."""

import pathlib
from collections.abc import Collection, Mapping

import jax

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manifest import DamagedCheckpoint, State, UndecidedCheckpoint, Verdict, examine
from clipjax.runtime import processes


def examine_together(
    path: pathlib.Path,
    key: str,
    *,
    step: int | None = None,
    groups: Collection[str] | None = None,
    apart: bool = False,
) -> Verdict:
    """Return the verdict of all processes, which all of them ask for; each reads a part of the files.

    Args:
        path: of the step directory.
        key: of this conversation.
        step: that it must be of; None: any.
        groups: of arrays that are examined, besides the records; None: all.
        apart: process 0 alone sees it, and reads all of it.
    """
    if apart:
        own = examine(path, step=step, groups=groups) if processes.is_first() else Verdict(State.VERIFIED)
    else:
        own = examine(path, step=step, groups=groups, part=(jax.process_index(), jax.process_count()))
    parts = exchange.gather(f"{key}/parts", [own.state.value, own.fault])
    verdicts = [Verdict(State(state), fault) for state, fault in parts]
    verdicts.sort(key=lambda verdict: not verdict.undecided)  # one that cannot read speaks for all
    worst = next((verdict for verdict in verdicts if not verdict.usable), own)
    state, fault = exchange.publish(f"{key}/verdict", lambda: [worst.state.value, worst.fault])
    return Verdict(State(state), fault)


def refuse_damaged(path: pathlib.Path, verdict: Verdict) -> None:
    """Refuse a checkpoint with a fault, and warn of one that cannot be verified.

    Raises:
        DamagedCheckpoint: it is damaged or incomplete; with the file.
        UndecidedCheckpoint: its storage does not give it, or it is of a newer format.
    """
    refuse_undecided(path, verdict)
    if verdict.state is State.UNVERIFIED:
        warn(f"checkpoint {path} is of an older format, without checksums: its content is not verified")
    elif not verdict.usable:
        raise DamagedCheckpoint(
            f"checkpoint {path} is {verdict.state}: {verdict.fault}; bring back a good copy, or name another step"
        )


def refuse_undecided(path: pathlib.Path, verdict: Verdict) -> None:
    """Refuse a checkpoint that may be good: nothing of it is set aside, and no older one is taken instead.

    Raises:
        UndecidedCheckpoint: its storage does not give it, or it is of a newer format.
    """
    if verdict.state is State.UNREADABLE:
        raise UndecidedCheckpoint(
            f"checkpoint {path} cannot be read: {verdict.fault}; it may be whole: see to the storage and start "
            "again, or move it away to go on from an older one"
        )
    if verdict.state is State.NEWER:
        raise UndecidedCheckpoint(f"checkpoint {path}: {verdict.fault}; install the version that wrote it")


def going_on(bad: pathlib.Path, verdict: Verdict, good: pathlib.Path) -> str:
    """Return the warning that one checkpoint is taken instead of another."""
    return f"checkpoint {bad} is {verdict.state} ({verdict.fault}); going on from {good}"


def all_damaged(place: pathlib.Path, bad: Mapping[int, Verdict]) -> str:
    """Return the message that no checkpoint of a folder is good."""
    found = ", ".join(f"{step} ({verdict.state}: {verdict.fault})" for step, verdict in bad.items())
    return f"no checkpoint in {place} is good: {found}; bring back a good copy of one, or take another workdir"


def warn(text: str) -> None:
    """Tell a person; every process logs it."""
    processes.announce(f"warning: {text}")
