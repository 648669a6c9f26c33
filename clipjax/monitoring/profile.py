"""Profiles of a few steps on request, into `WORKDIR/profile/STEP/`, for TensorBoard or Perfetto."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from clipjax.runtime import process_log

FOLDER = "profile"
STEPS = 5


class ProfileOnRequest:
    """The profiler of this process: `request` (from a signal handler) lets it trace the next steps. It never raises.

    Args:
        workdir: of the run.
        say: shows a line to the user.
    """

    def __init__(self, workdir: pathlib.Path, *, say: Callable[[str], None] = process_log.info) -> None:
        self._workdir, self._say = workdir, say
        self._requested = False
        self._last_step: int | None = None  # of the trace that runs

    def request(self) -> None:
        """Trace the next steps; safe in a signal handler. Once more while a trace runs: the steps after it."""
        self._requested = True

    def maybe_start(self, step: int) -> None:
        """Begin a trace before this step if one is asked for."""
        if not self._requested or self._last_step is not None:
            return
        self._requested = False
        folder = self._workdir / FOLDER / str(step)
        if jax.process_count() > 1:  # several processes of one machine would write the same file
            folder /= f"rank-{jax.process_index():05d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(folder)
        except Exception as error:  # a full disk, a trace that somebody else has begun: a profile is never worth a run
            self._say(f"no profile from step {step} on: {error}")
            return
        self._last_step = step + STEPS - 1
        self._say(f"profile of steps {step} to {self._last_step}: {folder}")

    def maybe_stop(self, step: int, result: Any = None) -> None:
        """End the trace after its last step, once `result` (arrays of that step) is computed."""
        if self._last_step is None or step < self._last_step:
            return
        jax.block_until_ready(result)
        self.close()

    def close(self) -> None:
        """End a trace that still runs, and write it."""
        if self._last_step is None:
            return
        self._last_step = None
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # see above
            self._say(f"the profile cannot be written: {error}")
