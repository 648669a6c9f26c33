"""Samples that storage does not give: an error, or others stand in for them, at those places in every later start."""

import errno
import pickle

import numpy as np
import pytest

from clipjax.config import MixtureSource
from clipjax.data import file_errors
from clipjax.data.array_records import ArrayRecordSource, write_array_records
from clipjax.data.block_reader import read_block
from clipjax.data.file_errors import FileErrors
from clipjax.data.mixture import MixedSource
from clipjax.data.sample import NUM_COUNTERS, REASONS, BadSample, ChangedData, Sample, UnreadableData
from clipjax.data.training_order import MixtureFormat, OrderFormat
from clipjax.data.training_stream import TrainStream
from clipjax.runtime.objects import FileChanged
from tests.data.test_training_stream import assert_same, make_config, make_source, take, tokenize

pytestmark = pytest.mark.newest

SIZE = 64
AWAY = OSError(errno.EIO, "Input/output error", "a.tar")
UNREADABLE = REASONS.index("unreadable")


class Broken:
    """A source of which some samples raise an error, each time or the first few times."""

    def __init__(self, errors, *, times: float = np.inf, blocks: bool = False):
        self._source, self._errors, self._times = make_source(SIZE), errors, times
        self._seen = dict.fromkeys(errors, 0)
        if blocks:
            self.read_block = self._read_block

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Sample:
        if index in self._errors and self._seen[index] < self._times:
            self._seen[index] += 1
            raise self._errors[index]
        return self._source[index]

    def _read_block(self, first: int, count: int) -> list[Sample | BadSample]:
        return [self[index] for index in range(first, first + count)]

    def location(self, index: int) -> str:
        return f"sample {index}"

    def digests(self):
        return self._source.digests()

    def files(self):
        return []


class Kept(dict):
    """What a run keeps."""

    def keep(self, more) -> None:
        assert not self.keys() & more.keys()  # a place is decided once
        self.update(more)


def errors_at(*indices: int, error: Exception = AWAY):
    return dict.fromkeys(indices, error)


def columns(batches, name: str):
    return np.concatenate([batch[name] for batch in batches])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_sample_is_an_error_of_its_own_class(num_workers):
    with pytest.raises(UnreadableData, match=r"sample 5 of the source cannot be read: a.tar: Input/output error"):
        take(8, Broken(errors_at(5)), make_config(num_workers=num_workers))


def test_others_stand_in_and_all_else_is_as_it_was():
    kept, places = Kept(), range(3 * SIZE)
    undisturbed = take(24, Broken({}))
    batches = take(24, Broken(errors_at(5, 9, 33)), keep_stand_ins=kept.keep)
    due, used = columns(undisturbed, "index"), columns(batches, "index")
    skipped = columns(batches, "skip_reason") == UNREADABLE
    assert sorted(due[skipped]) == sorted([5, 9, 33] * 3) and not np.isin(used, [5, 9, 33]).any()
    assert kept == {place: used[place] for place in places if skipped[place]}
    np.testing.assert_array_equal(due[~skipped], used[~skipped])
    np.testing.assert_array_equal(columns(undisturbed, "image")[~skipped], columns(batches, "image")[~skipped])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_same_stands_in_once_the_storage_is_well_again(num_workers, blocks):
    """Each kind of sight is there: one that fails once, one that always fails, and a stand-in beside a block."""
    order = OrderFormat(block=8, window=4, lanes=1) if blocks else OrderFormat()
    config, kept = make_config(num_workers=num_workers), Kept()
    batches = take(24, Broken(errors_at(5, 9), blocks=blocks), config, order=order, keep_stand_ins=kept.keep)
    assert len(kept) >= 6
    well = Broken({}, blocks=blocks)
    resumed = take(9, well, config, order=order, stand_ins=dict(kept), start_step=15)
    assert_same(resumed, batches[15:])
    for parts in (1, 2, 4):
        again = [
            take(24, well, order=order, stand_ins=dict(kept), process_index=part, process_count=parts)
            for part in range(parts)
        ]
        joined = [
            {name: np.concatenate([batch[name] for batch in each]) for name in each[0]}
            for each in zip(*again, strict=True)
        ]
        assert_same(joined, batches)


def test_each_process_keeps_its_own_places():
    whole, parts = Kept(), [Kept(), Kept()]
    take(8, Broken(errors_at(5, 9, 33, 50)), keep_stand_ins=whole.keep)
    for part, kept in enumerate(parts):
        source = Broken(errors_at(5, 9, 33, 50))
        take(8, source, process_index=part, process_count=2, keep_stand_ins=kept.keep)
    assert parts[0] and parts[1] and parts[0] | parts[1] == whole


def test_places_count_batches_that_are_left_out():
    kept, left_out = Kept(), [(1, 2)]
    batches = take(4, Broken(errors_at(*range(0, SIZE, 9))), left_out=left_out, keep_stand_ins=kept.keep)
    assert kept and not any(8 <= place < 24 for place in kept)
    assert_same(take(4, Broken({}), left_out=left_out, stand_ins=dict(kept)), batches)


def test_nothing_is_used_before_it_is_kept():
    def fail(_):
        raise UnreadableData("the disk is full")

    stream = TrainStream(Broken(errors_at(*range(32))), tokenize=tokenize, config=make_config(), keep_stand_ins=fail)
    with pytest.raises(UnreadableData, match="the disk is full"):
        next(stream)
    stream.close()


def test_a_stand_in_of_a_bad_sample_is_kept_too():
    """A corrupt sample has a fixed substitute; where that cannot be read, the next one depends on the storage."""
    kept = Kept()
    undisturbed = take(8, Broken(errors_at(5, error=BadSample("corrupt_image"))))
    (usual,) = columns(undisturbed, "index")[columns(undisturbed, "skip_reason") != -1]
    errors = errors_at(5, error=BadSample("corrupt_image")) | errors_at(int(usual))
    batches = take(8, Broken(errors), keep_stand_ins=kept.keep)
    assert len(kept) == 2 and (columns(batches, "skip_reason") == UNREADABLE).sum() == 2
    assert_same(take(8, Broken(errors_at(5, error=BadSample("corrupt_image"))), stand_ins=dict(kept)), batches)


@pytest.mark.parametrize("error", [FileChanged(None, "another program has written it anew"), ChangedData("it changed")])
def test_nothing_stands_in_for_changed_data(error):
    with pytest.raises(ChangedData, match="another program has written it anew|it changed"):
        take(8, Broken(errors_at(5, error=error)), keep_stand_ins=Kept().keep)


def test_a_storage_that_gives_nothing_ends_the_run_soon():
    source = Broken(errors_at(*range(SIZE)))
    with pytest.raises(UnreadableData, match="10 samples from all over the source in a row cannot be read, so its"):
        take(1, source, make_config(num_threads=1, prefetch_batches=1), keep_stand_ins=Kept().keep)
    assert sum(source._seen.values()) <= 8 * 10


def test_a_store_that_is_away_is_waited_for_twice():
    """Each of these errors takes minutes."""
    source = Broken(errors_at(*range(SIZE), error=TimeoutError(errno.ETIMEDOUT, "the store cannot be reached")))
    with pytest.raises(UnreadableData, match="2 samples from all over the source in a row cannot be read, so its"):
        take(1, source, make_config(num_threads=1, prefetch_batches=1), keep_stand_ins=Kept().keep)
    assert sum(source._seen.values()) <= 8 * 2


def test_a_block_of_a_store_that_is_away_is_tried_once():
    source = Broken(errors_at(*range(8, 16), error=OSError(errno.EBUSY, "the server answers 503")))
    found = read_block(source, 4, 20)
    assert [type(each) for each in found] == [Sample] * 4 + [UnreadableData] * 16
    assert sum(source._seen.values()) == 1 and found[4].is_away


def test_a_file_that_is_away_is_not_asked_for_again_at_once(monkeypatch):
    errors, asked = FileErrors("shard"), []
    now = [100.0]
    monkeypatch.setattr(file_errors.time, "monotonic", lambda: now[0])

    def read(path: str, error: OSError | None) -> bool:
        with errors.reading(path):
            asked.append(path)
            if error is not None:
                raise error
        return True

    away = TimeoutError(errno.ETIMEDOUT, "the store cannot be reached")
    with pytest.raises(
        UnreadableData, match="shard a.tar cannot be read as it was opened: the store cannot be"
    ) as seen:
        read("a.tar", away)
    assert seen.value.is_away
    with pytest.raises(
        UnreadableData, match="shard a.tar cannot be read as it was opened: the store cannot be"
    ) as seen:
        read("a.tar", None)
    assert not seen.value.is_away  # it took no time
    assert read("b.tar", None) and asked == ["a.tar", "b.tar"]
    now[0] += 301
    assert read("a.tar", None)
    for error in (FileNotFoundError(errno.ENOENT, "there is no object"), OSError(errno.EIO, "Input/output error")):
        with pytest.raises(UnreadableData):
            read("c.tar", error)
        assert read("c.tar", None)  # it may be there again


def test_a_record_file_that_was_away_is_read_again(tmp_path):
    """The library's reader fails for ever, and says of a failing disk what it says of damaged bytes."""
    pytest.importorskip("array_record")
    path = tmp_path / "a.array_record"
    write_array_records(path, [make_source()[i] for i in range(10)])
    whole = ArrayRecordSource([str(path)], max_caption_bytes=100, max_image_pixels=10**6)
    source = pickle.loads(pickle.dumps(whole))
    path.rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError):
        source[3]
    (tmp_path / "aside").rename(path)
    assert source[3].captions == ("a3", "b3") and source[4].captions == ("a4", "b4")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(BadSample, match="corrupt_record"):
        pickle.loads(pickle.dumps(whole))[9]


def test_a_stand_in_that_is_gone_is_no_other():
    kept = Kept()
    take(8, Broken(errors_at(5)), keep_stand_ins=kept.keep)
    (stand_in,) = kept.values()
    gone, told = Broken(errors_at(stand_in)), f"sample {stand_in} of the source cannot be read: a.tar: .*; see to its"
    with pytest.raises(UnreadableData, match=told):
        take(8, gone, stand_ins=dict(kept))
    with pytest.raises(UnreadableData, match=rf"{told} storage \(it stands in for sample 5, as decided before\)"):
        take(8, gone, stand_ins=dict(kept), keep_stand_ins=Kept().keep)
    corrupt = errors_at(stand_in, error=BadSample("corrupt_image"))
    with pytest.raises(ChangedData, match=f"corrupt_image in sample {stand_in}, which stood in for another sample"):
        take(8, Broken(corrupt), stand_ins=dict(kept))


def test_a_mixture_takes_a_stand_in_of_the_same_source_and_counts_it_there():
    config = make_config()
    config.data.train = ""
    config.data.mixture = {"a": MixtureSource(source="a"), "b": MixtureSource(source="b")}
    order, kept = MixtureFormat((OrderFormat(), OrderFormat())), Kept()

    def mixed(errors):
        return MixedSource({"a": Broken({}), "b": Broken(errors)})

    batches = take(16, mixed(errors_at(5, 9)), config, order=order, keep_stand_ins=kept.keep)
    skipped = columns(batches, "skip_reason") == NUM_COUNTERS + UNREADABLE
    assert kept and skipped.sum() == len(kept) and min(kept.values()) >= SIZE
    assert_same(take(16, mixed({}), config, order=order, stand_ins=dict(kept)), batches)


def test_a_worker_that_dies_meanwhile_decides_nothing_twice(monkeypatch):
    import os

    from tests.data.test_worker_processes import worker_pids

    kept, config = Kept(), make_config(num_workers=2, prefetch_batches=1)
    stream = TrainStream(
        Broken(errors_at(*range(0, SIZE, 7))), tokenize=tokenize, config=config, keep_stand_ins=kept.keep
    )
    batches = [next(stream) for _ in range(4)]
    os.kill(worker_pids()[0], 9)
    batches += [next(stream) for _ in range(12)]
    stream.close()
    assert_same(take(16, Broken({}), config, stand_ins=dict(kept)), batches)


def test_warnings_tell_the_reason_once(caplog):
    take(16, Broken(errors_at(5, 9)), keep_stand_ins=Kept().keep)
    told = [record.getMessage() for record in caplog.records if "on_unreadable" in record.getMessage()]
    assert sorted(told) == [
        f"data.on_unreadable=skip: sample {i} of the source cannot be read: a.tar: Input/output error; see to its "
        "storage"
        for i in (5, 9)
    ]


def test_the_order_of_older_runs_cannot_keep_them():
    with pytest.raises(ValueError, match=r"data.on_unreadable=skip: the run began with the order of an older version"):
        take(1, Broken({}), order=None, keep_stand_ins=Kept().keep)
