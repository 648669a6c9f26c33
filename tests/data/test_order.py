"""The order of training data: against a slow implementation of its specification, and what it promises."""

import itertools
import math
import random

import numpy as np
import pytest

from clipjax.data.order import BlockOrder, derive_key, permute


def permutation(size: int, *key: int) -> list[int]:
    return permute(np.arange(size), size, derive_key(*key)).tolist() if size else []


def slow_lane(order: BlockOrder, epoch: int, lane: int) -> list[int]:
    """The samples of a lane, one at a time, as the specification says it."""
    n, b = order.size, order.block
    count, tail = divmod(n, b)
    pi = permutation(count, order.seed, 0, epoch)
    ranks = list(range(lane, count, order.lanes))
    stream = [[b * pi[rank] + i for i in range(b)] for rank in ranks]
    if tail and lane == count % order.lanes:  # it is dealt out as one more block
        place = derive_key(order.seed, 1, epoch) % (len(ranks) + 1)
        stream.insert(place, [b * count + i for i in range(tail)])
    samples = list(itertools.chain.from_iterable(stream))
    if b == 1:
        return samples
    span = order.window * b
    shuffled = []
    for window in range(math.ceil(len(samples) / span)):
        part = samples[window * span : (window + 1) * span]
        shuffled += [part[q] for q in permutation(len(part), order.seed, 2, epoch, lane, window)]
    return shuffled


def slow_epoch(order: BlockOrder, epoch: int, batch_size: int) -> list[list[int]]:
    """All batches of an epoch."""
    lanes = order.lanes
    streams = [slow_lane(order, epoch, lane) for lane in range(lanes)]
    share = batch_size // lanes
    full = min(map(len, streams)) // share
    batches = [
        list(itertools.chain.from_iterable(stream[t * share : (t + 1) * share] for stream in streams))
        for t in range(full)
    ]
    rest = list(itertools.chain.from_iterable(stream[full * share :] for stream in streams))
    return batches + [rest[i : i + batch_size] for i in range(0, len(rest) - batch_size + 1, batch_size)]


def epoch_of(order: BlockOrder, epoch: int, batch_size: int) -> list[list[int]]:
    count = order.num_batches(batch_size)
    return [order.batch(epoch, number, batch_size).tolist() for number in range(count)]


def draw(rng: random.Random) -> tuple[BlockOrder, int]:
    lanes = rng.choice((1, 1, 2, 4))
    batch_size = lanes * rng.randint(1, 12)
    block = rng.choice((1, 1, 2, 3, 8, 64))
    size = rng.randint(batch_size, 700)
    return BlockOrder(size, rng.randint(0, 2**31), block, rng.randint(1, 9), lanes), batch_size


@pytest.mark.parametrize("seed", range(100))
def test_it_is_its_specification_and_gives_each_sample_once(seed):
    order, batch_size = draw(random.Random(seed))
    for epoch in (0, 7):
        found = epoch_of(order, epoch, batch_size)
        assert found == slow_epoch(order, epoch, batch_size), order
        samples = list(itertools.chain.from_iterable(found))
        assert len(samples) == len(set(samples)) == order.size - order.size % batch_size
        assert set(samples) <= set(range(order.size))


@pytest.mark.parametrize("lanes", [1, 4])
def test_what_an_epoch_drops_changes(lanes):
    order = BlockOrder(1003, 5, block=8, window=4, lanes=lanes)
    dropped = [set(range(1003)) - set(itertools.chain.from_iterable(epoch_of(order, e, 100))) for e in range(6)]
    assert [len(each) for each in dropped] == [3] * 6
    assert len(set().union(*dropped)) >= 12


@pytest.mark.parametrize("seed", range(60))
def test_rows_of_a_batch_are_a_cut_of_it_and_lanes_cover_all_samples(seed):
    rng = random.Random(1000 + seed)
    order, batch_size = draw(rng)
    for number in range(order.num_batches(batch_size)):
        whole = order.batch(3, number, batch_size)
        begin, end = sorted(rng.choices(range(batch_size + 1), k=2))
        np.testing.assert_array_equal(order.batch(3, number, batch_size, range(begin, end)), whole[begin:end])
    sizes = [order.lane_size(lane) for lane in range(order.lanes)]
    assert sum(sizes) == order.size and order._shortest_lane == min(sizes) and max(sizes) - min(sizes) <= order.block
    found = [order.in_lane(3, lane, np.arange(size)) for lane, size in enumerate(sizes)]
    assert sorted(np.concatenate(found).tolist()) == list(range(order.size))


def test_a_batch_that_is_not_there_and_lanes_that_do_not_fit_are_refused():
    order = BlockOrder(100, 0, lanes=4)
    for number in (-1, 12):
        with pytest.raises(IndexError):
            order.batch(0, number, 8)
    with pytest.raises(ValueError, match="batches of 6 do not divide by 4 lanes"):
        order.batch(0, 0, 6)
    with pytest.raises(ValueError, match="window=0 of an order must be 1 or more"):
        BlockOrder(100, 0, window=0)


@pytest.mark.parametrize("size", [1, 2, 3, 65_535, 65_536, 65_537, 131_072, 300_001])
def test_a_permutation_takes_each_value_once(size):
    found = permute(np.arange(size), size, derive_key(1, size))
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [2**32 - 5, 4 * 10**8, 5 * 10**12])
def test_a_long_permutation_is_one_where_it_is_looked_at(size):
    items = np.concatenate([np.arange(200_000), size - 1 - np.arange(200_000)])
    found = permute(items, size, derive_key(2))
    assert len(np.unique(found)) == len(items) and found.min() >= 0 and found.max() < size
    # Sums of uniform draws: within five standard deviations.
    assert abs(found.mean() / size - 0.5) < 5 / math.sqrt(12 * len(items))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(len(items))


@pytest.mark.parametrize(("size", "draws"), [(2, 4000), (3, 6000), (5, 24_000)])
def test_all_permutations_of_a_few_are_equally_likely(size, draws):
    counts: dict[tuple[int, ...], int] = {}
    for key in range(draws):
        found = tuple(permutation(size, 9, key))
        counts[found] = counts.get(found, 0) + 1
    kinds = math.factorial(size)
    assert len(counts) == kinds
    expected = draws / kinds
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))  # five standard deviations above its mean


@pytest.mark.parametrize("size", [1000, 70_001])
def test_a_position_holds_every_sample_equally_often_over_the_epochs(size):
    """Also the images of neighbours, which a weak network keeps close."""
    epochs = 4000
    first = np.stack([permute(np.array([0, 1, size - 1]), size, derive_key(4, epoch)) for epoch in range(epochs)])
    for values in (*first.T, (first[:, 0] - first[:, 1]) % size):
        counts = np.bincount(values * 20 // size, minlength=20)
        chi_square = float(((counts - epochs / 20) ** 2 / (epochs / 20)).sum())
        assert chi_square < 19 + 5 * math.sqrt(2 * 19)


def test_a_process_fetches_few_blocks_and_none_of_another():
    """Requests of four processes, each with a cache of a window: at most 1.1 a block."""
    order = BlockOrder(64 * 4096 + 13, 1, block=64, window=64, lanes=4)
    batch_size, requests = 512, 0
    owners: dict[int, int] = {}
    cached: list[list[int]] = [[] for _ in range(4)]
    batches = 64 * 4096 // batch_size
    for number in range(batches):
        for process, share in enumerate(order.batch(0, number, batch_size).reshape(4, -1)):
            for block in dict.fromkeys((share // 64).tolist()):
                assert owners.setdefault(block, process) == process
                if block not in cached[process]:
                    requests += 1
                    cached[process] = [*cached[process][-2 * 64 :], block]
    assert requests <= 1.1 * batches * batch_size / 64


def test_keys_depend_on_every_part_and_on_their_order():
    keys = [derive_key(*parts) for parts in itertools.product(range(6), repeat=3)] + [derive_key(1), derive_key(1, 0)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def test_the_order_of_a_run_stays_the_same_for_ever():
    """Checkpoints hold only the step; these numbers were written down when the order was new."""
    assert derive_key(3, 1, 4) == 15_327_609_207_613_219_433
    assert permute(np.arange(8), 8, 5).tolist() == [4, 5, 3, 6, 1, 0, 2, 7]
    assert permute(np.arange(4), 10**9, 5).tolist() == [184546415, 211370735, 874025276, 364346151]
    assert BlockOrder(1000, 7, block=8, window=4, lanes=2).batch(1, 3, 8).tolist() == [
        202,
        708,
        207,
        627,
        363,
        276,
        902,
        897,
    ]
