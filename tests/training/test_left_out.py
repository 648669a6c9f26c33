"""Lists of what rollbacks leave out: the samples that the batches had, whoever has read them, at any start."""

import pathlib

import numpy as np
import pytest

from clipjax.config import Config
from clipjax.data.training_order import DISK_ORDER, OrderFormat
from clipjax.data.training_stream import TrainStream
from clipjax.training import left_out
from clipjax.training.decisions import Rollback
from tests.data.test_training_stream import make_config, make_source, tokenize

pytestmark = pytest.mark.newest


def decision(first: int, last: int) -> Rollback:
    return Rollback(to_step=0, first_step=1, last_step=2, first_batch=first, last_batch=last, reason="not finite")


def listed(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines()


def read(config: Config, source, order: OrderFormat | None, first: int, last: int) -> list[str]:
    """The samples that two processes read in some batches, in the form of a list."""
    batches = []
    for rank in range(2):
        stream = TrainStream(
            source,
            tokenize=tokenize,
            config=config,
            order=order,
            process_index=rank,
            process_count=2,
            start_step=first,
        )
        batches.append([next(stream)["index"] for _ in range(first, last + 1)])
        stream.close()
    return [
        f"batch {first + i}: {source.location(int(index))}"
        for i, parts in enumerate(zip(*batches, strict=True))
        for index in np.concatenate(parts)
    ]


@pytest.mark.parametrize("order", [DISK_ORDER, OrderFormat(3, 2, 2), None], ids=str)
def test_every_batch_is_listed_although_nobody_here_has_read_it_and_a_list_stays(tmp_path, order):
    """The streak began before the last start, or a kill came right after the decision."""
    config, source = make_config(), make_source(44)  # five batches an epoch, and four samples beyond
    per_epoch = len(source) // config.global_batch_size
    taken = [decision(1, 2), decision(per_epoch - 1, per_epoch + 1)]
    left_out.write_missing(tmp_path, taken, source, config, order)
    for each in taken:
        path = tmp_path / "left_out" / f"batches-{each.first_batch}-{each.last_batch}.txt"
        assert listed(path) == read(config, source, order, each.first_batch, each.last_batch)
    (tmp_path / "left_out" / "batches-1-2.txt").write_text("looked at\n")
    left_out.write_missing(tmp_path, taken, source, config, order)
    assert listed(tmp_path / "left_out" / "batches-1-2.txt") == ["looked at"]


def test_a_list_is_bounded_and_says_so(tmp_path, monkeypatch):
    config, source = make_config(), make_source(44)  # five batches an epoch, and four samples beyond
    size = config.global_batch_size
    monkeypatch.setattr(left_out, "MOST_SAMPLES", 2 * size + 3)
    left_out.write_missing(tmp_path, [decision(0, 10**12)], source, config, DISK_ORDER)
    lines = listed(tmp_path / "left_out" / f"batches-0-{10**12}.txt")
    assert lines == [
        *read(config, source, DISK_ORDER, 0, 2)[: 2 * size + 3],
        f"and {(10**12 + 1 - 2) * size - 3} samples more",
    ]


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path):
    (tmp_path / "left_out").write_text("a file")
    left_out.write_missing(tmp_path, [decision(0, 0)], make_source(), make_config(), DISK_ORDER)
