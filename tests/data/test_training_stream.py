"""Order, shares, resumption and bad samples of the training stream, and the evaluation batches."""

import collections
import functools
import io
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Config, Crop, DataConfig, ModelConfig, SamePair, ViTConfig
from clipjax.data.bad_sample_limit import BadSampleLimit
from clipjax.data.eval_batches import eval_batches
from clipjax.data.images import EvalTransform
from clipjax.data.sample import NUM_COUNTERS, REASONS, BadSample, Sample
from clipjax.data.sources import ArraySource
from clipjax.data.training_batches import TooManyBadSamples
from clipjax.data.training_order import batch_number
from clipjax.data.training_stream import TrainStream
from clipjax.data.webdataset import TarSource

SIZE = 8

pytestmark = pytest.mark.newest


def tokenize(text: str, length: int = 6) -> np.ndarray:
    tokens = np.zeros(length, np.int32)
    codes = list(text.encode()[:length])
    tokens[: len(codes)] = codes
    return tokens


def make_config(batch: int = 8, *, seed: int = 0, crop: Crop = Crop.RANDOM_RESIZED, **data) -> Config:
    model = ModelConfig(image=ViTConfig(image_size=SIZE))
    return Config(
        seed=seed,
        global_batch_size=batch,
        model=model,
        data=DataConfig(train="test", crop=crop, min_crop_area=0.5, **data),
    )


def make_source(size: int = 40) -> ArraySource:
    """Random pictures, so that crops differ, with two captions each that name the sample."""
    images = np.random.default_rng(0).integers(0, 256, (size, 12, 14, 3), dtype=np.uint8)
    return ArraySource(images, [(f"a{i}", f"b{i}") for i in range(size)], labels=list(range(size)))


def take(count: int, source=None, config: Config | None = None, **options) -> list[dict[str, np.ndarray]]:
    stream = TrainStream(source or make_source(), tokenize=tokenize, config=config or make_config(), **options)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_have_the_promised_shapes():
    (batch,) = take(1)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "image": ("uint8", (8, SIZE, SIZE, 3)),
        "tokens": ("int32", (8, 6)),
        "index": ("int64", (8,)),
        "skip_reason": ("int32", (8,)),
    }
    assert all(type(array) is np.ndarray for array in batch.values())


def test_image_and_caption_belong_together():
    source = make_source()
    for batch in take(5, source, make_config(crop=Crop.CENTER)):
        for image, tokens, index in zip(batch["image"], batch["tokens"], batch["index"], strict=True):
            assert bytes(tokens).replace(b"\0", b"").decode()[1:] == str(index)
            center = Image.fromarray(source[index].image).resize((9, 8), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(image, np.asarray(center)[:, :8])


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    batches = take(15)
    epochs = [np.concatenate([batch["index"] for batch in batches[i : i + 5]]) for i in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
        assert list(epoch) != list(range(40))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_ends_with_a_whole_batch():
    batches = take(10, make_source(45))
    for epoch in (batches[:5], batches[5:]):
        assert len(np.unique(np.concatenate([batch["index"] for batch in epoch]))) == 40
    left_out = [set(range(45)) - set(np.concatenate([b["index"] for b in part])) for part in (batches[:5], batches[5:])]
    assert left_out[0] != left_out[1]  # no sample is left out for ever


def test_the_seed_decides_everything():
    assert_same(take(6), take(6))
    other = take(6, config=make_config(seed=1))
    assert any((a["index"] != b["index"]).any() for a, b in zip(take(6), other, strict=True))


def test_batch_numbers_leave_out_what_a_slow_loop_leaves_out():
    random = np.random.default_rng(0)
    for _ in range(200):
        left_out = [
            (first, first + int(random.integers(4))) for first in random.integers(0, 40, random.integers(6)).tolist()
        ]
        used = [n for n in range(100) if not any(first <= n <= last for first, last in left_out)]
        assert [batch_number(position, left_out) for position in range(len(used))] == used, left_out


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_without_some_batches_is_the_rest_of_the_whole(count):
    left_out = [(6, 8), (1, 1)]  # across the end of the epoch of five batches
    for process in range(count):
        share = {"process_index": process, "process_count": count}
        whole = take(12, **share)
        rest = [batch for number, batch in enumerate(whole) if number not in (1, 6, 7, 8)]
        assert_same(take(8, left_out=left_out, **share), rest)
        assert_same(take(3, left_out=left_out, start_step=5, **share), rest[5:])


@pytest.mark.parametrize("impossible", [(-1, 2), (3, 2)])
def test_impossible_ranges_are_refused(impossible):
    with pytest.raises(ValueError, match="must be ranges of batch numbers"):
        take(1, left_out=[(0, 0), impossible])


def test_neighbouring_seeds_share_no_epoch():
    orders = [
        tuple(np.concatenate([b["index"] for b in take(10, config=make_config(seed=seed))[i : i + 5]]))
        for seed in (0, 1)
        for i in (0, 5)
    ]
    assert len(set(orders)) == 4


def test_captions_and_crops_are_drawn_anew_each_epoch():
    rows: dict[int, list[tuple[bytes, bytes]]] = {}
    for batch in take(40):
        for image, tokens, index in zip(batch["image"], batch["tokens"], batch["index"], strict=True):
            rows.setdefault(int(index), []).append((bytes(tokens)[:1], image.tobytes()))
    first_letters = [[letter for letter, _ in seen] for seen in rows.values()]
    assert all(len(seen) == 8 for seen in first_letters)
    share = np.mean([letter == b"a" for seen in first_letters for letter in seen])
    assert 0.4 < share < 0.6  # 320 fair draws; three standard deviations are 0.08
    assert sum(len(set(seen)) == 2 for seen in first_letters) > 35
    assert all(len({image for _, image in seen}) > 4 for seen in rows.values())


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_any_number_of_processes_sees_the_same_global_batches(processes, start):
    parts = [take(4, process_index=p, process_count=processes, start_step=start) for p in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(4, start_step=start))


@pytest.mark.parametrize("step", [1, 5, 7])
def test_resumed_is_uninterrupted(step):
    whole = take(12)
    assert_same(take(12 - step, start_step=step), whole[step:])


def test_resuming_far_away_is_immediate():
    counted = CountingSource(make_source())
    take(1, counted, make_config(num_threads=1, prefetch_batches=1), start_step=10**9)
    assert counted.reads < 50


def test_threads_do_not_change_the_stream():
    expected = take(8, config=make_config(num_threads=0))
    for threads, prefetch in ((1, 1), (4, 2), (2, 7)):
        assert_same(take(8, config=make_config(num_threads=threads, prefetch_batches=prefetch)), expected)


@pytest.mark.process
def test_workers_do_not_change_the_stream():
    assert_same(take(5, config=make_config(num_workers=2, num_threads=1)), take(5))


class CountingSource:
    def __init__(self, source):
        self.source, self.reads = source, 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return self.source[index]

    def location(self, index: int) -> str:
        return f"shard s.tar, key k{index}"


class EndlessSource:
    """One sample, many times."""

    def __init__(self, size: int):
        self._size, self._inner = size, make_source(1)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        return self._inner[0]

    def location(self, index: int) -> str:
        return self._inner.location(0)

    def digests(self):
        return self._inner.digests()


class FlawedSource(CountingSource):
    """Some samples are bad."""

    def __init__(self, source, flaws: dict[int, str]):
        super().__init__(source)
        self.flaws = flaws

    def __getitem__(self, index: int) -> Sample:
        if index in self.flaws:
            raise BadSample(self.flaws[index])
        return super().__getitem__(index)


def count_reasons(batches) -> dict[str, int]:
    reasons = np.concatenate([batch["skip_reason"] for batch in batches])
    return dict(collections.Counter(REASONS[reason] for reason in reasons if reason >= 0))


FLAWS = {3: "truncated_tar", 10: "empty_caption", 11: "empty_caption", 12: "duplicate_key", 39: "missing_image"}


def test_bad_samples_are_replaced_and_counted_once_per_epoch():
    config = make_config(max_bad_fraction=0.5)
    batches = take(10, FlawedSource(make_source(), FLAWS), config)
    counts = {"truncated_tar": 2, "empty_caption": 4, "duplicate_key": 2, "missing_image": 2}
    assert count_reasons(batches) == counts
    clean = take(10, config=config)
    for batch, reference in zip(batches, clean, strict=True):
        was_bad = np.isin(reference["index"], list(FLAWS))
        assert not np.isin(batch["index"], list(FLAWS)).any()
        assert ((batch["skip_reason"] >= 0) == was_bad).all()
        for name in batch:  # the others are untouched
            np.testing.assert_array_equal(batch[name][~was_bad], reference[name][~was_bad])
    asked, used = (np.concatenate([batch["index"] for batch in part]) for part in (clean, batches))
    pairs = {(int(a), int(u)) for a, u in zip(asked, used, strict=True) if a in FLAWS}
    assert len(pairs) == len(FLAWS)  # always the same substitute


def test_bad_samples_keep_the_stream_the_same_for_processes_and_resumption():
    source, config = FlawedSource(make_source(), FLAWS), make_config(max_bad_fraction=0.5)
    whole = take(8, source, config)
    assert_same(take(3, source, config, start_step=5), whole[5:])
    parts = [take(8, source, config, process_index=p, process_count=2) for p in range(2)]
    assert_same([{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*parts, strict=True)], whole)


def make_limit(num_samples: int, start_step: int = 0, already: int = 0, **data) -> BadSampleLimit:
    """Of a run with batches of 8."""
    return BadSampleLimit(make_config(8, **data), num_samples=num_samples, start_step=start_step, skipped=bad(already))


def bad(corrupt: int, empty: int = 0) -> np.ndarray:
    counts = np.zeros(NUM_COUNTERS, np.int32)
    counts[REASONS.index("corrupt_image")], counts[REASONS.index("empty_caption")] = corrupt, empty
    return counts


def test_too_many_bad_samples_are_told_with_their_places():
    stream = TrainStream(FlawedSource(make_source(), FLAWS), tokenize=tokenize, config=make_config())
    for _ in range(5):
        next(stream)
    stream.close()
    with pytest.raises(TooManyBadSamples) as caught:
        make_limit(40).check(5, bad(1, 4), stream.latest_bad)
    assert "data.max_bad_fraction=0.05: 5 of the 40 samples read are unusable, 12.5%" in str(caught.value)
    assert "(corrupt_image 1, empty_caption 4)" in str(caught.value)
    places = re.findall(
        r"(truncated_tar|empty_caption|duplicate_key|missing_image) in shard s\.tar, key k(\d+)", str(caught.value)
    )
    assert len(places) == 3 and all(FLAWS[int(key)] == reason for reason, key in places)
    assert "Raise data.max_bad_fraction to go on without them, or repair or remove them and start anew" in str(
        caught.value
    )
    with pytest.raises(TooManyBadSamples, match="other processes name them"):
        make_limit(40).check(5, bad(1, 4), list)


def test_the_limit_is_exact():
    make_limit(40).check(5, bad(2), list)  # 5.0 % is not above 5 %
    make_limit(40).check(10, bad(4), list)
    with pytest.raises(TooManyBadSamples, match="3 of the 8 samples"):
        make_limit(40).check(1, bad(3), list)
    with pytest.raises(TooManyBadSamples, match="1 of the 8 samples"):
        make_limit(40, max_bad_fraction=0.0).check(1, bad(1), list)


def test_a_few_early_bad_samples_of_a_large_source_do_not_stop_it():
    limit = make_limit(3000)
    limit.check(1, bad(8), list)
    limit.check(125, bad(50), list)
    with pytest.raises(TooManyBadSamples):
        limit.check(125, bad(51), list)
    limit.check(126, bad(100), list)  # the next thousand has begun


def test_what_an_earlier_process_met_is_not_held_against_the_next():
    limit = make_limit(40, start_step=5, already=20)
    limit.check(10, bad(22), list)
    with pytest.raises(TooManyBadSamples, match="3 of the 40 samples"):
        limit.check(10, bad(23), list)


def read_until_error(stream: TrainStream) -> str:
    with pytest.raises(TooManyBadSamples) as caught:
        next(stream)
    stream.close()
    return str(caught.value)


def test_hopeless_sources_are_named():
    source = FlawedSource(make_source(), dict.fromkeys(range(40), "missing_image"))
    stream = TrainStream(source, tokenize=tokenize, config=make_config())
    assert "40 samples in a row are unusable, the last: missing_image in shard s.tar, key k" in read_until_error(stream)
    no_captions = ArraySource(np.zeros((8, 4, 4, 3), np.uint8), [()] * 8)
    stream = TrainStream(no_captions, tokenize=tokenize, config=make_config())
    assert "8 samples in a row are unusable, the last: missing_caption in array, index" in read_until_error(stream)


@pytest.mark.parametrize(
    ("size", "batch", "processes", "message"),
    [
        (7, 8, 1, r"global_batch_size=8 is larger than the 7 samples of data.train='test'; set .* at most 7"),
        (40, 9, 2, r"global_batch_size=9 must be divisible by 2 processes; nearest: 8"),
        (40, 2, 4, r"global_batch_size=2 must be divisible by 4 processes; nearest: 4"),
    ],
)
def test_construction_refuses(size, batch, processes, message):
    with pytest.raises(ValueError, match=message):
        TrainStream(make_source(size), tokenize=tokenize, config=make_config(batch), process_count=processes)


@pytest.mark.parametrize(("size", "same_pair"), [(2**31, "index"), (2**31 + 1, "caption")])
def test_groups_by_index_are_exact(size, same_pair):
    config = make_config()
    config.loss.same_pair = SamePair(same_pair)
    stream = TrainStream(EndlessSource(size), tokenize=tokenize, config=config)
    assert len(np.unique(next(stream)["index"])) == config.global_batch_size
    stream.close()


def test_groups_by_index_are_refused_where_two_samples_would_share_one():
    config = make_config()
    config.loss.same_pair = SamePair.INDEX
    with pytest.raises(ValueError, match=r"loss.same_pair=index .* 2,147,483,648 .* has 2,147,483,649; set .* caption"):
        TrainStream(EndlessSource(2**31 + 1), tokenize=tokenize, config=config)


def test_the_smallest_source_and_batch():
    assert [batch["index"].tolist() for batch in take(3, make_source(1), make_config(1))] == [[0]] * 3


def test_waiting_is_measured():
    stream = TrainStream(make_source(), tokenize=tokenize, config=make_config(num_threads=0))
    assert stream.wait_seconds == 0
    next(stream)
    first = stream.wait_seconds
    next(stream)
    stream.close()
    assert 0 < first < stream.wait_seconds < 10


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (10, 200, 90)).save(stream, "JPEG")
    return stream.getvalue()


def bomb() -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(4) + b"IDAT"
    )


@pytest.fixture
def flawed_tar(tmp_path) -> TarSource:
    """64 samples of which eight are bad in eight ways; the tar is cut in the last one."""
    members = []
    for i in range(64):
        members += [(f"{i:03d}.jpg", jpeg()), (f"{i:03d}.txt", b"green")]
    flaws = {
        "004.jpg": jpeg()[:200],
        "012.jpg": b"<html>404</html>",
        "020.jpg": bomb(),
        "028.txt": b"",
        "036.txt": b"x" * 10_000_000,
        "044.txt": b"gr\xfcn",
    }
    members = [(name, flaws.get(name, content)) for name, content in members if name not in ("050.jpg", "058.txt")]
    path = tmp_path / "flawed-00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    with path.open("r+b") as file:
        file.truncate(last.offset + 100)
    return TarSource([str(path)], max_caption_bytes=65_536, max_image_pixels=25_000_000)


COUNTS = {
    "corrupt_image": 2,
    "image_too_large": 1,
    "empty_caption": 1,
    "caption_too_long": 1,
    "caption_not_utf8": 1,
    "missing_image": 1,
    "missing_caption": 1,
    "truncated_tar": 1,
}


def test_planted_flaws_in_a_tar_are_counted_exactly(flawed_tar):
    config = make_config(16, max_bad_fraction=0.2)
    streams = []
    for _ in range(2):
        stream = TrainStream(flawed_tar, tokenize=tokenize, config=config)
        streams.append([next(stream) for _ in range(4)])
        stream.close()
        assert count_reasons(streams[-1]) == COUNTS
        assert re.fullmatch(r"\w+ in shard .*flawed-00000\.tar, key 0\d\d", stream.latest_bad()[0])
    assert_same(*streams)
    bad = {4, 12, 20, 28, 36, 44, 50, 58, 63}
    assert set(np.concatenate([batch["index"] for batch in streams[0]])) == set(range(64)) - bad


def evaluate(source, **options) -> list[dict]:
    return list(
        eval_batches(
            source,
            **{"view": EvalTransform(SIZE), "batch_size": 16, "max_image_pixels": 1000, "num_threads": 2} | options,
        )
    )


def test_eval_batches_are_whole_and_in_order():
    source = make_source(40)
    batches = evaluate(source)
    assert [batch["index"].tolist() for batch in batches] == [
        list(range(16)),
        list(range(16, 32)),
        [*range(32, 40), *[-1] * 8],
    ]
    last = batches[-1]
    assert last["mask"].tolist() == [True] * 8 + [False] * 8
    assert last["label"].tolist() == [*range(32, 40), *[-1] * 8]
    assert last["captions"] == [(f"a{i}", f"b{i}") for i in range(32, 40)] + [()] * 8
    assert {name: last[name].dtype.name for name in ("image", "label", "mask", "index", "skip_reason")} == {
        "image": "uint8", "label": "int32", "mask": "bool", "index": "int64", "skip_reason": "int32",
    }  # fmt: skip
    assert last["image"].shape == (16, SIZE, SIZE, 3)
    assert not last["image"][8:].any()
    center = Image.fromarray(source[33].image).resize((9, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(last["image"][1], np.asarray(center)[:, :8])


@pytest.mark.parametrize("processes", [2, 4])
def test_eval_batches_interleave_processes(processes):
    whole = evaluate(make_source(37))
    for p in range(processes):
        parts = evaluate(make_source(37), process_index=p, process_count=processes)
        assert len(parts) == len(whole)
        for part, batch in zip(parts, whole, strict=True):
            for name in ("image", "label", "mask", "index", "skip_reason"):
                np.testing.assert_array_equal(part[name], batch[name][p::processes])
            assert part["captions"] == batch["captions"][p::processes]


def test_eval_masks_bad_samples(flawed_tar):
    batches = evaluate(flawed_tar, max_image_pixels=25_000_000)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in ("mask", "index", "skip_reason")}
    bad = joined["index"][~joined["mask"]]
    # The sample without a caption stays: evaluation by class needs none.
    assert bad.tolist() == [4, 12, 20, 28, 36, 44, 50, 63]
    assert [REASONS[reason] for reason in joined["skip_reason"][bad]] == [
        "corrupt_image", "corrupt_image", "image_too_large", "empty_caption", "caption_too_long", "caption_not_utf8",
        "missing_image", "truncated_tar",
    ]  # fmt: skip
    assert (joined["skip_reason"][joined["mask"]] == -1).all()
    assert batches[3]["captions"][58 - 48] == ()


def test_eval_without_a_view_reads_texts_alone_and_every_row_has_its_key():
    batches = evaluate(make_source(20), view=None)
    assert all("image" not in batch for batch in batches)
    last = batches[-1]
    assert last["captions"] == [(f"a{i}", f"b{i}") for i in range(16, 20)] + [()] * 12
    assert last["key"] == [str(i) for i in range(16, 20)] + [""] * 12
    assert last["key"] == evaluate(make_source(20))[-1]["key"]


def test_eval_limits():
    assert [batch["index"].tolist() for batch in evaluate(make_source(), max_examples=3, batch_size=2)] == [
        [0, 1],
        [2, -1],
    ]
    assert len(evaluate(make_source(), max_examples=1000)) == 3
    assert evaluate(make_source(), max_examples=0) == []
    with pytest.raises(ValueError, match="batch_size=6 must be divisible by 4 processes; nearest: 8"):
        eval_batches(
            make_source(), view=EvalTransform(8), batch_size=6, process_count=4, max_image_pixels=9, num_threads=1
        )


def test_eval_reads_a_bounded_way_ahead_and_stops_when_dropped():
    source = CountingSource(make_source(4000))
    batches = eval_batches(source, view=EvalTransform(SIZE), batch_size=16, max_image_pixels=1000, num_threads=2)
    next(batches)
    batches.close()
    assert source.reads <= 32


def test_a_tokenizer_may_be_a_partial():
    stream = TrainStream(make_source(), tokenize=functools.partial(tokenize, length=3), config=make_config())
    assert next(stream)["tokens"].shape == (8, 3)
    stream.close()
