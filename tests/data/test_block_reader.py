"""Reading in blocks: the same samples with a fraction of the requests, each block by one worker of one process."""

import collections
import errno
import pickle
import threading

import numpy as np
import pytest

from clipjax.config import Config, Crop
from clipjax.data.augmentations import make_augmentations
from clipjax.data.block_reader import BlockReader, _Block, read_block
from clipjax.data.images import Decoder, EvalTransform
from clipjax.data.mixture import MixedSource
from clipjax.data.order import blocks_of
from clipjax.data.sample import BadSample, ChangedData, Sample, Source, UnreadableData
from clipjax.data.training_batches import Augment, Batches, MixedSamples, Share, SubstitutedSamples, substituted
from clipjax.data.training_order import MixtureFormat, OrderFormat, choose_order, make_order
from clipjax.data.training_stream import _most_blocks
from clipjax.data.webdataset import TarSource
from clipjax.runtime.objects import FileChanged
from tests.data.test_mixture import mixed_config
from tests.data.test_training_stream import (
    FLAWS,
    FlawedSource,
    assert_same,
    jpeg,
    make_config,
    make_source,
    take,
    tokenize,
)
from tests.data.test_webdataset import entry, write

pytestmark = pytest.mark.newest


class CountedBlocks:
    """A source that notes each request."""

    def __init__(self, size: int, flaws: dict[int, str] | None = None):
        self.size, self.flaws = size, flaws or {}
        self.requests: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        if index in self.flaws:
            raise BadSample(self.flaws[index])
        return Sample(image=np.full((4, 4, 3), index % 251, np.uint8), captions=(str(index),), key=str(index))

    def __getitem__(self, index: int) -> Sample:
        with self.lock:
            self.requests.append((index, 1))
        return self.sample(index)

    def read_block(self, first: int, count: int) -> list[Sample | BadSample]:
        with self.lock:
            self.requests.append((first, count))
        found: list[Sample | BadSample] = []
        for index in range(first, first + count):
            try:
                found.append(self.sample(index))
            except BadSample as bad:
                found.append(bad)
        return found

    def location(self, index: int) -> str:
        return str(index)

    def files(self) -> list[str]:
        return []


def decoded(source: Source) -> SubstitutedSamples | MixedSamples:
    return substituted(source, Decoder(10**6))


def augment() -> Augment:
    return Augment(tokenize, EvalTransform(4), Crop.CENTER, 0.9, make_augmentations(Config()))


class Announced(BlockReader):
    """A reader that counts what it would read, and reads nothing."""

    def __init__(self, most: int):
        super().__init__(CountedBlocks(1), most)
        self.requests = 0

    def count(self, placed: np.ndarray, ahead: np.ndarray | None) -> None:
        """Announce the blocks of a later batch, and take all samples of this one."""
        for blocks in () if ahead is None else (ahead,):
            for first, count in np.unique(blocks[:, 1:], axis=0).tolist():
                self._find(first, count)
        for _, first, count in placed.tolist():
            block = self._find(first, count)
            block.left -= 1
            if not block.left:
                self._blocks.pop((first, count), None)

    def _find(self, first: int, count: int) -> _Block:
        if (first, count) not in self._blocks:
            self.requests += 1
            self._blocks[first, count] = _Block(None, count)  # pyright: ignore[reportArgumentType]
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)
        return self._blocks[first, count]


@pytest.mark.parametrize(
    ("size", "batch_size", "processes", "workers"),
    [(10**6, 4096, 4, 4), (64 * 4096, 512, 4, 4), (300_017, 1024, 4, 4), (10**6, 8192, 16, 8), (10**6, 4096, 1, 8)],
)
def test_an_epoch_costs_a_request_a_block_whoever_reads_it(size, batch_size, processes, workers):
    """Processes of several workers, which share no memory: at most 1.1 requests a 64 samples, evictions included."""
    config, ahead = make_config(batch_size), 4
    order = choose_order(config, [size], [True])
    assert isinstance(order, OrderFormat)
    numbers, steps, requests = make_order((size,), config, order), size // batch_size, 0
    some = range(processes) if processes < 8 else (0, 7)  # all are alike
    for process in some:
        share = Share(batch_size // processes, process, workers)
        most = _most_blocks([order], share, batch_size)
        for piece in range(workers):
            reader, rows = Announced(most), share.rows(piece)
            placed = [numbers.placed(step, rows) for step in range(steps)]
            for step in range(steps):
                reader.count(placed[step], placed[step + ahead] if step + ahead < steps else None)
            requests += reader.requests
    assert requests <= 1.1 * size / 64 * len(some) / processes


@pytest.mark.parametrize("most", [200, 10**6])
def test_workers_read_their_blocks_once(most):
    size, batch_size, ahead = 64 * 128, 256, 4
    config = make_config(batch_size)
    numbers = make_order((size,), config, choose_order(config, [size], [True]))
    steps, seen = size // batch_size - ahead - 1, collections.Counter()
    for process in range(2):
        for piece in range(2):
            source, share = CountedBlocks(size), Share(batch_size // 2, process, 2)
            reader = BlockReader(source, most)
            batches = Batches(decoded(source), augment(), numbers, config, share=share, reader=reader)
            for step in range(steps):
                seen.update(batches[step * 2 + piece]["index"].tolist())
            reader.close()
            assert len(set(source.requests)) == len(source.requests) <= size / 64 / 4
            assert {count for _, count in source.requests} == {64}
    assert max(seen.values()) == 1 and len(seen) == steps * batch_size


@pytest.mark.parametrize("order", [OrderFormat(5, 2, 2), OrderFormat(8, 3, 1), OrderFormat(16, 2, 8)], ids=str)
@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_stream_is_that_of_single_reads(order, most, monkeypatch):
    """However few blocks are kept, and with bad samples among them."""
    source = CountedBlocks(83, {3: "truncated_tar", 10: "empty_caption", 11: "missing_image"})
    config = make_config(8, max_bad_fraction=0.5)
    numbers = make_order((83,), config, order)

    def read(reader: BlockReader | None) -> list[dict[str, np.ndarray]]:
        share = Share(8)
        batches = Batches(decoded(source), augment(), numbers, config, share=share, reader=reader)
        return [batches[position] for position in range(25)]

    single = read(None)
    assert_same(read(BlockReader(source, most)), single)
    assert sum((batch["skip_reason"] >= 0).sum() for batch in single) > 5


@pytest.mark.parametrize("most_bytes", [0, 100, 1000])
def test_few_bytes_are_kept_and_the_stream_stays(most_bytes):
    source, config = CountedBlocks(83, {3: "truncated_tar"}), make_config(8, max_bad_fraction=0.5)
    numbers = make_order((83,), config, OrderFormat(8, 3, 1))

    def read(reader: BlockReader | None) -> list[dict[str, np.ndarray]]:
        batches = Batches(decoded(source), augment(), numbers, config, share=Share(8), reader=reader)
        return [batches[position] for position in range(15)]

    assert_same(read(BlockReader(source, 100, most_bytes)), read(None))


def test_the_oldest_blocks_go_where_bytes_are_short(caplog):
    source = CountedBlocks(64)
    size = sum(np.asarray(source[i].image).nbytes for i in range(8))
    reader = BlockReader(source, 100, 2 * size)
    for first in (0, 8, 16, 24):  # one after the other
        reader.take(first, first, 8)
    assert list(reader._blocks) == [(16, 8), (24, 8)] and reader._bytes == 2 * size
    assert caplog.text.count("read twice") == 1
    for index in range(17, 24):
        reader.take(index, 16, 8)
    assert list(reader._blocks) == [(24, 8)] and reader._bytes == size
    assert reader.take(0, 0, 8).key == "0"  # is read again
    reader.close()
    assert reader._bytes == 0


def test_a_mixture_is_read_in_blocks_too():
    order = MixtureFormat((OrderFormat(4, 2, 2), OrderFormat(1, 1, 2)))
    parts = {"a": CountedBlocks(43), "b": CountedBlocks(17)}
    config = mixed_config(8, a=3, b=1)
    source = MixedSource(parts)
    numbers = make_order(source.sizes, config, order)

    def read(reader: BlockReader | None) -> list[dict[str, np.ndarray]]:
        batches = Batches(decoded(source), augment(), numbers, config, share=Share(8), reader=reader)
        return [batches[position] for position in range(30)]

    single = read(None)
    singles = len(parts["a"].requests)
    parts["a"].requests.clear()
    assert_same(read(BlockReader(source, 100)), single)
    # Three of four pairs are a's; its blocks have four samples, but some go around the end of the numbers in two parts.
    assert singles == 180 and len(parts["a"].requests) < 0.4 * singles
    assert max(count for _, count in parts["a"].requests) == 4
    assert all(first >= 0 and first + count <= 43 for first, count in parts["a"].requests)


@pytest.mark.parametrize(("size", "block"), [(43, 4), (17, 2), (8, 8), (7, 8), (1, 3), (64, 1)])
def test_blocks_cover_every_sample_once(size, block):
    found = blocks_of(np.arange(size), size, block)
    spans = sorted({tuple(row) for row in found.tolist()})
    assert [i for first, count in spans for i in range(first, first + count)] == list(range(size))
    assert all(first <= sample < first + count for sample, (first, count) in enumerate(found.tolist()))
    assert all(count <= block for _, count in spans) and len(spans) == -(-size // block)


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_and_their_slices_do_not_change_the_stream(num_workers):
    source, order = make_source(), OrderFormat(4, 2, 4)
    expected = take(5, source, order=order)
    config = make_config(num_workers=num_workers, num_threads=1)
    assert_same(take(5, source, config, order=order), expected)
    assert_same(take(3, source, config, order=order, start_step=2), expected[2:])
    assert_same(take(3, source, config, order=order, left_out=[(1, 2)]), [expected[0], *expected[3:]])


def test_an_error_of_the_storage_is_raised_where_the_sample_is_needed():
    class Broken(CountedBlocks):
        def read_block(self, first: int, count: int) -> list[Sample | BadSample]:
            raise OSError("the storage is gone")

    reader = BlockReader(Broken(64), 4)
    reader.announce(np.array([[0, 8]]))
    with pytest.raises(OSError, match="the storage is gone"):
        reader.take(3, 0, 8)
    reader.close()


def test_a_reader_goes_to_workers_without_what_it_holds():
    reader = BlockReader(CountedBlocksWithoutLock(64), 4)
    reader.take(3, 0, 8)
    again = pickle.loads(pickle.dumps(reader))
    assert again.take(3, 0, 8).key == "3"
    for each in (reader, again):
        each.close()


class CountedBlocksWithoutLock(CountedBlocks):
    def __getstate__(self) -> dict:
        return {"size": self.size, "flaws": self.flaws}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["size"], state["flaws"])


def test_sources_without_blocks_are_read_one_by_one():
    found = read_block(FlawedSource(make_source(), FLAWS), 2, 10)
    assert [sample.reason if isinstance(sample, BadSample) else sample.key for sample in found] == [
        "2",
        "truncated_tar",
        *(str(i) for i in range(4, 10)),
        "empty_caption",
        "empty_caption",
    ]


def test_tars_give_blocks_as_they_give_samples(tmp_path):
    from tests.data.test_webdataset import pair, write

    for name, count in (("a", 5), ("b", 3), ("c", 7)):
        write(tmp_path / f"{name}.tar", [member for i in range(count) for member in pair(f"{name}{i}")])
    source = TarSource([str(tmp_path / f"{n}.tar") for n in "abc"], max_caption_bytes=100, max_image_pixels=10**6)
    singles = [source[i] for i in range(15)]
    for first in range(15):
        for count in range(1, 16 - first):
            found = source.read_block(first, count)
            assert [each for each in found if not isinstance(each, BadSample)] == singles[first : first + count]


def test_errors_of_storage_stand_in_their_places(tmp_path):
    """A block may reach into the next shard, or be made of single files: what is well is not lost with the rest."""
    kinds = {"jpg": jpeg(), "txt": b"x"}
    for n in range(3):
        members = [entry(f"{n}{i}.{kind}", content) for i in range(8) for kind, content in kinds.items()]
        write(tmp_path / f"{n}.tar", members)
    source = TarSource([str(tmp_path / f"{n}.tar") for n in range(3)], max_caption_bytes=100, max_image_pixels=10**6)
    (tmp_path / "1.tar").unlink()
    found = read_block(source, 4, 16)
    assert [type(each) for each in found] == [Sample] * 4 + [UnreadableData] * 8 + [Sample] * 4
    reader = BlockReader(source, 4)
    assert reader.take(5, 4, 16).key == "05" and reader.take(17, 4, 16).key == "21"
    with pytest.raises(UnreadableData, match=r"shard .*1.tar cannot be read as it was opened: No such file"):
        reader.take(9, 4, 16)
    reader.close()


def test_an_error_of_one_file_is_not_that_of_its_block():
    class Files(CountedBlocks):
        read_block = None

        def __getitem__(self, index: int) -> Sample:
            if index == 3:
                raise PermissionError(errno.EACCES, "the store refuses access", "gs://b/3.jpg")
            if index == 4:
                raise FileChanged(None, "another program has written it anew", "gs://b/4.jpg")
            return self.sample(index)

    found = read_block(Files(8), 0, 8)
    assert [type(each) for each in found] == [Sample] * 3 + [UnreadableData, ChangedData] + [Sample] * 3
    assert (
        str(found[3])
        == "sample 3 of the source cannot be read: gs://b/3.jpg: the store refuses access; see to its storage"
    )
