"""Memory of batches: what is handed over is not copied, and is used again only when nothing looks at it any more."""

import errno
import os
import pickle
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest

from clipjax.data import batch_memory
from clipjax.data.batch_memory import BatchWriter, ReceivedColumns
from clipjax.data.workers import WorkersDie

ROW = {"image": np.zeros((3, 5), np.uint8), "tokens": np.zeros(7, np.int32), "index": np.int64(0)}


def send(writer: BatchWriter, value: int, count: int = 4) -> bytes:
    sent, columns = writer.columns((ROW, count))
    for column in columns.values():
        column[...] = value
    return pickle.dumps(sent)


def receive(sent: bytes) -> ReceivedColumns:
    return pickle.loads(sent)


@pytest.fixture
def writer():
    writer = BatchWriter()
    yield writer
    writer._end()
    batch_memory.forget_the_dead()
    assert not batch_memory._received


def test_columns_arrive_with_their_shapes_and_types(writer):
    columns = receive(send(writer, 9)).arrays()
    assert {name: (value.shape, value.dtype) for name, value in columns.items()} == {
        "image": ((4, 3, 5), np.uint8),
        "tokens": ((4, 7), np.int32),
        "index": ((4,), np.int64),
    }
    assert all((value == 9).all() for value in columns.values())
    assert all(value.ctypes.data % 64 == 0 for value in columns.values())  # what JAX takes without a copy


def test_memory_is_used_again_once_every_array_is_gone(writer):
    first = receive(send(writer, 1))
    arrays = first.arrays()
    second = receive(send(writer, 2))
    assert second.segment is not first.segment
    view = arrays["image"][1:, ::2]
    del arrays
    third = receive(send(writer, 3))  # the view still looks at the first segment
    assert third.segment not in (first.segment, second.segment)
    assert (view == 1).all()
    del view
    assert receive(send(writer, 4)).segment is first.segment


def test_a_larger_batch_gets_memory_of_its_own(writer):
    small = receive(send(writer, 1))
    small.arrays()
    large = receive(send(writer, 2, count=100))
    assert large.segment is not small.segment
    assert (large.arrays()["image"] == 2).all()


def test_nothing_stays_in_the_file_system(writer):
    opened = receive(send(writer, 1))
    send(writer, 2)
    names = [segment.name for segment in writer._segments]
    with pytest.raises(FileNotFoundError):
        SharedMemory(names[0])
    columns = opened.arrays()
    writer._end()
    send(writer, 3)  # by a thread that still reads ahead
    names = [segment.name for segment in writer._segments]
    assert len(names) == 3
    for name in names:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
    assert (columns["tokens"] == 1).all()


def test_columns_that_were_received_outlive_their_worker(writer):
    waiting = receive(send(writer, 5))
    writer._end()
    batch_memory.forget_the_dead()
    assert (waiting.arrays()["image"] == 5).all()


def test_what_is_left_in_a_queue_can_be_thrown_away(writer):
    left = send(writer, 1)
    writer._end()
    columns = receive(left)
    with pytest.raises(WorkersDie):
        columns.arrays()


def test_both_sides_may_take_it_out_of_the_file_system_at_once(writer, monkeypatch):
    sent = send(writer, 1)
    opened = SharedMemory.__init__

    def open_late(self, *args, **options):
        opened(self, *args, **options)
        writer._end()  # the worker ends between the two calls of the other side

    monkeypatch.setattr(SharedMemory, "__init__", open_late)
    assert (receive(sent).arrays()["tokens"] == 1).all()


def test_too_little_memory_is_told_before_it_kills(writer, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WorkersDie, match=r"No space.*MiB more of shared memory.*--shm-size"):
        send(writer, 1)
    assert not writer._segments


def test_two_writers_of_one_process_are_told_apart(writer):
    other = BatchWriter()
    both = [receive(send(each, value)) for value, each in enumerate((writer, other))]
    assert [int(each.arrays()["index"][0]) for each in both] == [0, 1]
    other._end()
