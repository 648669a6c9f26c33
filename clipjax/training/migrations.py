"""Migrations of checkpoints: what an older format holds, and the newest format's items from it.

A checkpoint's `data` record names its `format`; without a name it is 1, which had a count of the schedule's own, and no
health. Formats 1 and 2 count unusable samples by the 11 reasons that there were. Within one format every array must be
there: Orbax refuses a checkpoint that lacks one that `abstract_items` asks for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax.checkpoints.records import FORMAT
from clipjax.data.sample import NUM_COUNTERS
from clipjax.training.health import Health
from clipjax.training.optimizer import ScaleByStepState

Items = dict[str, Any]


@dataclass(frozen=True)
class Migration:
    """The way from one format to the next.

    Attributes:
        name: of what has changed.
        older: abstract items of the next format -> those of this one.
        newer: items of this format, health to start with -> items of the next one.
    """

    name: str
    older: Callable[[Items], Items]
    newer: Callable[[Items, Health], Items]


def _with_schedule_count(items: Items) -> Items:
    train = {name: item for name, item in items["train"].items() if name != "health"}
    count = optax.ScaleByScheduleState(count=train["step"])
    opt_state = _replace_states(train["opt_state"], ScaleByStepState, count)
    return {**items, "train": {**train, "opt_state": opt_state}}


def _without_schedule_count(items: Items, initial_health: Health) -> Items:
    train = items["train"]
    opt_state = _replace_states(train["opt_state"], optax.ScaleByScheduleState, ScaleByStepState())
    return {**items, "train": {**train, "opt_state": opt_state, "health": vars(initial_health)}}


def _replace_states(opt_state: Any, kind: type, by: Any) -> Any:
    """Return the optimizer's state with another part in the place of those of one kind."""
    is_kind = lambda part: isinstance(part, kind)  # noqa: E731
    return jax.tree.map(lambda part: by if is_kind(part) else part, opt_state, is_leaf=is_kind)


_OLD_REASONS = 11


def _with_a_counter_for_each_reason(items: Items) -> Items:
    counters = items["train"]["samples_skipped"]
    old = jax.ShapeDtypeStruct((_OLD_REASONS,), counters.dtype, sharding=counters.sharding)
    return {**items, "train": {**items["train"], "samples_skipped": old}}


def _with_room_for_reasons(items: Items, initial_health: Health) -> Items:
    del initial_health
    counters = jnp.pad(items["train"]["samples_skipped"], (0, NUM_COUNTERS - _OLD_REASONS))
    return {**items, "train": {**items["train"], "samples_skipped": counters}}


MIGRATIONS: Mapping[int, Migration] = {
    1: Migration("health_and_schedule_by_step", _with_schedule_count, _without_schedule_count),
    2: Migration("room_for_reasons", _with_a_counter_for_each_reason, _with_room_for_reasons),
}
"""By the format from which they lead to the next."""


def check_format(format_: Any) -> int:
    """Return the format of a checkpoint, from the field of its `data` record.

    Raises:
        ValueError: this version knows no such format.
    """
    if type(format_) is not int or not 1 <= format_ <= FORMAT:
        raise ValueError(
            f"the checkpoint's data.format={format_!r} must be a whole number from 1 to {FORMAT}; a newer version of "
            "clipjax may have written it: install that one"
        )
    return format_


def abstract_items(format_: int, items: Items) -> Items:
    """Return the items to ask for in a checkpoint of a format.

    Args:
        format_: of the checkpoint.
        items: shapes of the newest format: `step.to_items` of the abstract state.
    """
    for number in range(FORMAT - 1, check_format(format_) - 1, -1):
        items = MIGRATIONS[number].older(items)
    return items


def migrate(format_: int, items: Items, initial_health: Health) -> Items:
    """Return the items of the newest format, from those that a checkpoint of a format holds.

    Args:
        format_: of the checkpoint.
        items: arrays, as `abstract_items` asks for them.
        initial_health: for formats that have none, placed as the run's state is.
    """
    for number in range(check_format(format_), FORMAT):
        items = MIGRATIONS[number].newer(items, initial_health)
    return items
