"""Processes: starting them, telling the first one, and the signal to stop.

A run with several processes is started by a launcher (Slurm, Kubernetes, TPU pods, or `launch/`), which leaves its
traces in the environment; `start` reads them.
"""

import os
import signal
import types
from collections.abc import Mapping

import jax

SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started several processes: its variables name a coordinator or more than one worker."""
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or int(environment.get("SLURM_NTASKS", "1")) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if a launcher started any.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say it outright; what is missing of
    them JAX finds out from the cluster by itself.
    """
    if not is_launched(environment):
        return
    if "JAX_COORDINATOR_ADDRESS" in environment:
        count, index = (environment.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            None if count is None else int(count),
            None if index is None else int(index),
        )
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


class ShutdownSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save and leave; a second signal ends the process at once.

    With several processes JAX's own notifier catches SIGTERM (it looks once a second) and lets all of them agree on the
    step at which to stop; so SIGTERM is left to it, and SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._several = jax.process_count() > 1
        caught = (signal.SIGINT,) if self._several else SHUTDOWN_SIGNALS
        self._previous = {number: signal.signal(number, self._receive) for number in caught}

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self, step: int) -> bool:
        """Whether to stop after this step; in a run of several processes, the same answer on all of them."""
        if not self._several:
            return self.number is not None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.number = self.number or signal.SIGTERM
            return True
        return False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it; 0 without a signal."""
        return 0 if self.number is None else 128 + self.number

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
