"""Limits of trouble: after them a run stops instead of going on; none of them touches the numbers of a healthy run."""

from dataclasses import dataclass

from clipjax.config.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, bounded


@dataclass(kw_only=True, slots=True)
class RecoveryConfig:
    """Trouble that a run bears: bad updates, loss spikes, failed saves, dead loader workers, stuck processes.

    Between two checks of copies (`replica_check_examples`) lie at least 125 steps, so that they cost 0.1 % at most.
    """

    max_skipped_in_a_row: int = bounded(10, AT_LEAST_ONE)  # updates that are not finite, before a rollback
    spike_sigmas: float | None = bounded(8.0, POSITIVE)  # robust deviations above the median loss; None: no rollback
    max_rollbacks: int = bounded(2, NOT_NEGATIVE)  # to the same checkpoint, before the run stops
    max_failed_saves: int = bounded(3, AT_LEAST_ONE)  # in a row, before the run stops
    max_worker_restarts: int = bounded(3, NOT_NEGATIVE)  # of the loader workers, before the run saves and stops
    stuck_seconds: float | None = bounded(60.0, POSITIVE)  # without progress, or 10 steps if longer; None: for ever
    replica_check_examples: int | None = bounded(1_000_000, POSITIVE)  # between two checks of copies; None: no check
