"""Mixtures: exact counts, epochs of each source, bad samples inside their source, and the same stream everywhere."""

import itertools
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest

from clipjax.config import Config, DataConfig, MixtureSource
from clipjax.data.mixture import MixedSource, MixtureOrder, Proportions
from clipjax.data.order import BlockOrder
from clipjax.data.sample import NUM_COUNTERS, REASONS, BadSample
from clipjax.data.training_order import DISK_ORDER, MixtureFormat, OrderFormat, choose_order, make_order, parse_order
from tests.data.test_training_stream import FlawedSource, assert_same, make_config, make_source, take

pytestmark = pytest.mark.newest

WEIGHTS = [(1, 1), (2, 1), (0.7, 0.2, 0.1), (1, 1e-3), (5,), (1, 1, 1, 1, 1), (0.5, 0.3, 0.1, 0.05, 0.05), (1e6, 3.25)]


def slow_counts(weights, pairs: int) -> list[list[int]]:
    """Counts after each pair: at every pair, the source whose next pair is due first."""
    shares = Proportions.of_weights(weights).shares
    counts, seen = [0] * len(shares), [[0] * len(shares)]
    for _ in range(pairs):
        due = [Fraction(2 * count + 1, share) for count, share in zip(counts, shares, strict=True)]
        counts[due.index(min(due))] += 1
        seen.append(list(counts))
    return seen


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_are_those_of_the_sources_that_are_due(weights):
    proportions = Proportions.of_weights(weights)
    assert [list(proportions.counts(pairs)) for pairs in range(700)] == slow_counts(weights, 699)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("far", [10**4, 10**9 + 7, 3 * 10**15])
def test_far_counts_add_up_stay_near_their_share_and_never_fall(weights, far):
    proportions, total, number = Proportions.of_weights(weights), sum(map(Fraction, weights)), len(weights)
    before = proportions.counts(far)
    for pairs in range(far, far + 40):
        counts = proportions.counts(pairs)
        assert sum(counts) == pairs and all(a <= b for a, b in zip(before, counts, strict=True))
        for count, weight in zip(counts, weights, strict=True):
            share = Fraction(weight) / total
            # Shares are rounded to parts of 2**40, which shows after so many pairs only.
            assert abs(count - share * pairs) <= Fraction(1, 2) + share * number / 2 + Fraction(pairs, 2**39)
        before = counts


def make_mixed(**sizes: int) -> MixedSource:
    return MixedSource({name: make_source(size) for name, size in sizes.items()})


def mixed_config(batch: int = 8, seed: int = 0, **weights: float) -> Config:
    config = make_config(batch, seed=seed)
    config.data = DataConfig(
        mixture={name: MixtureSource(source="test", weight=weight) for name, weight in weights.items()},
        min_crop_area=0.5,
        max_bad_fraction=0.9,
    )
    return config


FORMATS = [
    MixtureFormat((DISK_ORDER, DISK_ORDER)),
    MixtureFormat((OrderFormat(3, 2, 1), DISK_ORDER)),
    MixtureFormat((OrderFormat(4, 2, 2), OrderFormat(1, 1, 2))),
    MixtureFormat((OrderFormat(4, 2, 4), OrderFormat(2, 3, 4))),
]
every_order = pytest.mark.parametrize("order", FORMATS, ids=str)


def samples_of(mixture: MixtureOrder, number: int) -> np.ndarray:
    return mixture.placed(number)[:, 0]


def orders(order: MixtureFormat, sizes, seed: int = 3) -> list[BlockOrder]:
    parts = zip(sizes, order.parts, strict=True)
    return [BlockOrder(size, seed + i, **part.to_record()) for i, (size, part) in enumerate(parts)]


@every_order
def test_a_batch_has_its_share_of_each_source(order):
    mixture = MixtureOrder(orders(order, (43, 17)), (3, 1), 3, 8)
    seen = [0, 0]
    for number in range(120):
        assert mixture.counts(number) == seen
        batch = samples_of(mixture, number)
        assert batch.dtype == np.int64 and batch.shape == (8,) and batch.min() >= 0 and batch.max() < 60
        seen = [seen[0] + int((batch < 43).sum()), seen[1] + int((batch >= 43).sum())]
    assert abs(seen[0] - 0.75 * 960) <= 2 * order.parts[0].lanes and sum(seen) == 960


@pytest.mark.parametrize("order", FORMATS[:2], ids=str)
def test_a_source_gives_each_sample_once_an_epoch_of_its_own(order):
    mixture = MixtureOrder(orders(order, (43, 17)), (3, 1), 3, 8)
    seen = np.zeros(60, np.int64)
    for number in range(120):
        np.add.at(seen, samples_of(mixture, number), 1)
        for given, counts in zip(mixture.counts(number + 1), (seen[:43], seen[43:]), strict=True):
            assert counts.sum() == given and set(counts) <= {given // len(counts), given // len(counts) + 1}


@pytest.mark.parametrize("order", FORMATS[2:], ids=str)
def test_a_lane_gives_no_sample_twice_an_epoch_and_every_sample_in_some(order):
    """Each lane has epochs of its own; those of one number hold every sample once, whoever is ahead."""
    sizes, lanes = (43, 17), order.parts[0].lanes
    parts = orders(order, sizes)
    mixture = MixtureOrder(parts, (3, 1), 3, lanes)  # one of each lane at a time, so that they come in their order
    streams: list[tuple[list[int], list[int]]] = [([], []) for _ in range(lanes)]
    for number in range(1000):
        for lane, index in enumerate(samples_of(mixture, number).tolist()):
            streams[lane][index >= 43].append(index if index < 43 else index - 43)
    for part, (size, block_order) in enumerate(zip(sizes, parts, strict=True)):
        ends = [block_order.lane_size(lane) for lane in range(lanes)]
        for epoch in range(10):
            spans = [stream[part][epoch * n : epoch * n + n] for stream, n in zip(streams, ends, strict=True)]
            assert sorted(itertools.chain(*spans)) == list(range(size))


@pytest.mark.parametrize("order", FORMATS, ids=str)
def test_rows_are_a_cut_of_the_batch_and_lie_in_their_blocks(order):
    mixture = MixtureOrder(orders(order, (43, 17)), (3, 1), 3, 8)
    for number in range(40):
        whole = mixture.placed(number)
        for begin, end in ((0, 8), (2, 5), (3, 3), (7, 8)):
            np.testing.assert_array_equal(mixture.placed(number, range(begin, end)), whole[begin:end])
        sample, first, length = whole.T
        assert ((first <= sample) & (sample < first + length)).all() and ((first < 43) == (first + length <= 43)).all()


def test_neighbours_in_a_batch_come_from_all_sources():
    mixture = MixtureOrder(orders(FORMATS[0], (1000, 1000)), (1, 1), 3, 64)
    halves = [(samples_of(mixture, number)[:32] < 1000).sum() for number in range(200)]
    assert 15.5 < np.mean(halves) < 16.5  # the mean of 200; its standard deviation is 0.14
    assert np.std(halves) > 1  # and not one after the other


@every_order
def test_a_run_goes_on_exactly_with_any_number_of_processes(order):
    source, config = make_mixed(a=45, b=20), mixed_config(a=3, b=1)
    whole = take(20, source, config, order=order)
    for step, processes in ((0, 1), (3, 2), (7, 4), (13, 8)):
        parts = [
            take(4, source, config, order=order, process_index=p, process_count=processes, start_step=step)
            for p in range(processes)
        ]
        assert_same(
            [{n: np.concatenate([part[n] for part in row]) for n in row[0]} for row in zip(*parts, strict=True)],
            whole[step : step + 4],
        )


def test_workers_do_not_change_the_stream():
    source, order = make_mixed(a=45, b=20), FORMATS[2]
    pickle.loads(pickle.dumps(source))
    config = mixed_config(a=3, b=1)
    expected = take(5, source, config, order=order)
    config.data.num_workers, config.data.num_threads = 2, 1
    assert_same(take(5, source, config, order=order), expected)


def test_a_bad_sample_is_replaced_inside_its_source_and_counted_there():
    flaws = {3: "truncated_tar", 10: "empty_caption"}
    source = MixedSource({"a": make_source(40), "b": FlawedSource(make_source(20), flaws)})
    config = mixed_config(a=1, b=1)
    good = take(5, make_mixed(a=40, b=20), config, order=FORMATS[0])
    batches = take(5, source, config, order=FORMATS[0])  # 40 pairs: an epoch of b
    reasons = np.concatenate([batch["skip_reason"] for batch in batches])
    assert sorted(reasons[reasons >= 0]) == sorted(NUM_COUNTERS + REASONS.index(reason) for reason in flaws.values())
    for a, b in zip(good, batches, strict=True):
        used = b["skip_reason"] < 0
        np.testing.assert_array_equal(a["index"][used], b["index"][used])
        assert (b["index"][~used] >= 40).all() and not np.isin(b["index"][~used] - 40, list(flaws)).any()


def test_a_mixed_source_is_its_sources_one_after_the_other():
    parts = {"a": make_source(3), "b": make_source(2)}
    mixed = MixedSource(parts)
    assert len(mixed) == 5 and [mixed.find(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [mixed[i].captions for i in range(5)] == [
        parts[n][i].captions for n, i in zip("aaabb", (0, 1, 2, 0, 1), strict=True)
    ]
    assert mixed.location(4) == f"b: {parts['b'].location(1)}"
    assert mixed.digests() == [*parts["a"].digests(), *parts["b"].digests()]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            mixed[index]


@every_order
def test_a_format_is_its_record(order):
    assert parse_order(json.loads(json.dumps(order.to_record()))) == order


@pytest.mark.parametrize(
    "record",
    [
        {"parts": [DISK_ORDER.to_record()]},
        {"parts": [DISK_ORDER.to_record()], "shards": [1.0]},
        {"parts": [DISK_ORDER.to_record()], "shards": 1},
        {"parts": []},
        {"parts": {}},
        {"parts": [{}]},
        {"parts": [None]},
        {"parts": [DISK_ORDER.to_record()], "more": 1},
        {"parts": [DISK_ORDER.to_record(), OrderFormat(1, 1, 2).to_record()]},
    ],
)
def test_a_damaged_record_is_refused(record):
    with pytest.raises(ValueError, match="^data.order"):
        parse_order(record)


def test_one_source_of_a_store_gives_all_of_them_lanes():
    config = mixed_config(4096, a=1, b=1)
    assert choose_order(config, (10**6, 10**6), [False, False]) == MixtureFormat((DISK_ORDER, DISK_ORDER))
    mixed = choose_order(config, (10**6, 10**6), [True, False])
    assert isinstance(mixed, MixtureFormat)
    assert [part.block for part in mixed.parts] == [64, 1] and {part.lanes for part in mixed.parts} == {128}


def test_sources_that_do_not_fit_the_order_are_refused():
    config = mixed_config(8, a=1, b=1)
    with pytest.raises(ValueError, match="begun with 2 sources, and now there are 3"):
        make_order((40, 40, 40), config, FORMATS[0])
    message = "source 1 of data.mixture, sorted by name, has 3 samples, too few for the 4 lanes"
    with pytest.raises(ValueError, match=message):
        make_order((3, 40), config, FORMATS[3])


@pytest.mark.parametrize("sizes", [(10**6, 3000), (10**6, 70), (10**6, 5), (64, 1), (130, 127)])
def test_a_small_source_beside_a_large_one_has_samples_for_all_lanes(sizes):
    config = mixed_config(512, a=1, b=1)
    for is_remote in ((True, True), (True, False), (False, True)):
        order = choose_order(config, sizes, is_remote)
        placed = make_order(sizes, config, order).placed(7)
        assert len(placed) == 512 and placed[:, 0].max() < sum(sizes)


def test_every_reason_has_a_counter():
    assert len(REASONS) <= NUM_COUNTERS and len(set(REASONS)) == len(REASONS)
    with pytest.raises(AssertionError):
        BadSample("no such reason")
