"""Rows of patches: the budget of a step, grids that fit together, and batches that no split of the work changes."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from clipjax.config import AugmentConfig, Config, Crop, DataConfig, ModelConfig, ViTConfig, flops_per_pair
from clipjax.data.loading_speed import measure_loading
from clipjax.data.patch_rows import budget_of_step, fit_row, make_patch_rows, mean_flops_per_pair
from clipjax.data.patches import cut_patches, fit_grid
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.training_batches import Share
from clipjax.data.training_order import OrderFormat
from clipjax.data.training_stream import TrainStream
from tests.data.test_training_stream import assert_same, take

P, MOST, BATCH = 4, 24, 8
PIXELS = ("patches", "segment", "place", "grid")


class Pictures(ArraySource):
    """Pictures of many sizes, two captions each."""

    def __init__(self, size: int = 40) -> None:
        rng = np.random.default_rng(0)
        sizes = rng.integers(5, 40, (size, 2))
        self.pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
        super().__init__(
            np.zeros((size, 1, 1, 3), np.uint8), [(f"a{i}", f"b{i}") for i in range(size)], labels=list(range(size))
        )

    def __getitem__(self, index: int):
        return dataclasses.replace(super().__getitem__(index), image=self.pictures[index])


def make_config(max_patches: int | None = MOST, *, seed: int = 0, batch: int = BATCH, **data) -> Config:
    image = ViTConfig(image_size=16, patch_size=P, max_patches=max_patches)
    data = {"crop": Crop.RANDOM_RESIZED, "min_crop_area": 0.5} | data
    return Config(
        seed=seed, global_batch_size=batch, model=ModelConfig(image=image), data=DataConfig(train="test", **data)
    )


def packed(**data) -> Config:
    return make_config(**{"images_per_row": 4, "enlarge": False, "patch_menu": (8, 12), **data})


def num_patches(grids) -> int:
    return sum(rows * columns for rows, columns in grids)


def test_the_budget_depends_on_seed_and_step_alone():
    config, menu = packed(patch_menu=(8, 12, 24)), (8, 12, 24)
    drawn = [budget_of_step(config, step) for step in range(1, 601)]
    assert all(abs(drawn.count(patches) - 200) < 60 for patches in menu)
    assert drawn == [budget_of_step(make_config(patch_menu=menu), step) for step in range(1, 601)]
    assert drawn != [budget_of_step(packed(patch_menu=menu, seed=1), step) for step in range(1, 601)]


def test_without_a_menu_all_steps_have_the_most_patches():
    assert {budget_of_step(make_config(), step) for step in range(1, 50)} == {MOST}


def test_flops_count_the_budgets_of_the_steps():
    config = packed()
    by_budget = {patches: flops_per_pair(config, patches) for patches in (8, 12)}
    assert by_budget[8] < by_budget[12] == flops_per_pair(config) < flops_per_pair(make_config())
    expected = np.mean([by_budget[budget_of_step(config, step)] for step in range(3, 12)])
    assert mean_flops_per_pair(config, 3, 11) == pytest.approx(expected)
    squares = make_config(None)
    assert mean_flops_per_pair(squares, 3, 11) == flops_per_pair(squares) == squares.model.flops()


def test_pictures_that_fit_have_the_grid_of_their_own():
    sizes = [(8, 12), (40, 8), (5, 5)]
    grids = fit_row(sizes, 27, max_patches=20, patch_size=4, enlarge=False)
    assert grids == [fit_grid(8, 12, 6, 4), fit_grid(40, 8, 20, 4), (1, 1)]
    assert num_patches(grids) == 27


def test_enlarged_pictures_fill_their_budget():
    assert fit_row([(5, 5)], 16, max_patches=16, patch_size=4, enlarge=True) == [(4, 4)]
    assert fit_row([(5, 5)], 16, max_patches=16, patch_size=4, enlarge=False) == [(1, 1)]


def test_a_picture_alone_has_the_grid_of_its_budget():
    for height, width in np.random.default_rng(0).integers(1, 400, (100, 2)).tolist():
        grids = fit_row([(height, width)], 37, max_patches=300, patch_size=4, enlarge=True)
        assert grids == [fit_grid(height, width, 37, 4)]


def test_pictures_that_do_not_fit_shrink_by_one_factor():
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = [(int(h), int(w)) for h, w in random.integers(20, 400, (4, 2))]
        grids = fit_row(sizes, 64, max_patches=100, patch_size=4, enlarge=False)
        total = num_patches(grids)
        assert 48 < total <= 64, (sizes, grids)
        wanted = [min(100, h * w // 16) for h, w in sizes]
        if sum(wanted) > 80:  # grids round, each by a row or a column
            for (rows, columns), want in zip(grids, wanted, strict=True):
                assert abs(rows * columns - want * 64 / sum(wanted)) < max(rows, columns) + 6


def test_no_picture_is_left_without_a_patch():
    assert fit_row([(400, 400)] * 3 + [(1, 1)], 4, max_patches=100, patch_size=4, enlarge=False) == [(1, 1)] * 4
    assert fit_row([(1, 5000)], 3, max_patches=100, patch_size=4, enlarge=True)[0][0] == 1


def test_a_row_holds_the_patches_of_its_pictures():
    config = packed(crop=Crop.CENTER, patch_menu=())
    rows = make_patch_rows(config)
    assert rows is not None
    pictures = Pictures().pictures[:4]
    row = rows([(picture, np.random.default_rng(i)) for i, picture in enumerate(pictures)], 1)
    assert {name: (row[name].dtype.name, row[name].shape) for name in PIXELS} == {
        "patches": ("uint8", (4 * MOST, 3 * P * P)),
        "segment": ("int32", (4 * MOST,)),
        "place": ("int32", (4 * MOST, 2)),
        "grid": ("int32", (4, 2)),
    }
    for number, (picture, (down, across)) in enumerate(zip(pictures, row["grid"].tolist(), strict=True)):
        here = row["segment"] == number
        assert here.sum() == down * across
        whole = cut_patches(picture, down, across, P, config.data.interpolation)
        np.testing.assert_array_equal(row["patches"][here], whole)
        np.testing.assert_array_equal(row["place"][here], [(i // across, i % across) for i in range(down * across)])
    padding = row["segment"] == -1
    assert padding.any() and not row["patches"][padding].any()


def test_patches_are_cut_from_changed_pictures():
    """A certain flip mirrors the resized picture before it is cut."""
    plain, flipped = packed(crop=Crop.CENTER), packed(crop=Crop.CENTER, augment=AugmentConfig(horizontal_flip=1.0))
    picture = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    first, second = (
        make_patch_rows(config)([(picture, np.random.default_rng(0)) for _ in range(4)], 1)  # type: ignore[misc]
        for config in (plain, flipped)
    )
    down, across = first["grid"][0]
    before, after = (
        row["patches"][: down * across].reshape(down, across, P, P, 3).swapaxes(1, 2).reshape(down * P, across * P, 3)
        for row in (first, second)
    )
    np.testing.assert_array_equal(after, before[:, ::-1])


def test_crops_keep_the_aspect_and_at_least_the_least_area():
    rows = make_patch_rows(make_config(min_crop_area=0.25))
    assert rows is not None
    picture, boxes = np.zeros((200, 400, 3), np.uint8), []
    for seed in range(300):
        top, left, height, width = rows._crop(picture, np.random.default_rng(seed))
        assert 0 <= top <= 200 - height and 0 <= left <= 400 - width
        assert width / height == pytest.approx(2, rel=0.02)
        boxes.append(height * width / 80_000)
    assert 0.24 < min(boxes) < 0.3 and 0.95 < max(boxes) <= 1
    assert np.mean(boxes) == pytest.approx(0.625, abs=0.05)


def test_batches_have_the_promised_shapes():
    config = packed()
    for step, batch in enumerate(take(6, Pictures(), config), 1):
        places = 4 * budget_of_step(config, step)
        assert {name: array.shape for name, array in batch.items()} == {
            "patches": (2, places, 3 * P * P),
            "segment": (2, places),
            "place": (2, places, 2),
            "grid": (2, 4, 2),
            "tokens": (8, 6),
            "index": (8,),
            "skip_reason": (8,),
        }


def test_pairs_and_captions_are_those_of_the_squares():
    for batch, square in zip(take(12, Pictures(), packed()), take(12, Pictures(), make_config(None)), strict=True):
        for name in ("tokens", "index", "skip_reason"):
            np.testing.assert_array_equal(batch[name], square[name], err_msg=name)


def test_a_packed_picture_is_that_of_a_row_of_its_own():
    """Where nothing has to shrink, packing changes the place of a picture and nothing else."""
    alone = take(6, Pictures(), make_config(enlarge=False))
    for row, one in zip(take(6, Pictures(), packed(patch_menu=())), alone, strict=True):
        for i in range(BATCH):
            here, there = row["segment"][i // 4] == i % 4, one["segment"][i] == 0
            np.testing.assert_array_equal(row["patches"][i // 4][here], one["patches"][i][there])
            np.testing.assert_array_equal(row["grid"][i // 4, i % 4], one["grid"][i, 0])


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_has_the_same_global_batch(processes):
    config = packed(batch=16)
    whole = take(4, Pictures(), config)
    parts = [take(4, Pictures(), config, process_index=i, process_count=processes) for i in range(processes)]
    joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in whole[0]} for i in range(4)]
    assert_same(joined, whole)


@pytest.mark.parametrize("blocks", [False, True])
def test_any_step_resumes_exactly_with_any_number_of_workers(blocks):
    config, order = packed(), OrderFormat(4, 3, 1) if blocks else OrderFormat()
    whole = take(7, Pictures(), config, order=order)
    for start, num_workers, num_threads in [(3, 0, 1), (5, 3, 2)]:
        data = dataclasses.replace(config.data, num_workers=num_workers, num_threads=num_threads)
        other = dataclasses.replace(config, data=data)
        assert_same(take(7 - start, Pictures(), other, order=order, start_step=start), whole[start:])


def test_pieces_of_workers_are_whole_rows():
    share = Share(24, process_index=1, slices=4, unit=4)
    pieces = [share.rows(piece) for piece in range(4)]
    assert [row for piece in pieces for row in piece] == list(range(24, 48))
    assert all(len(piece) and len(piece) % 4 == 0 for piece in pieces)


def test_the_budget_is_that_of_the_step_when_batches_are_left_out():
    config = packed()
    budgets = [batch["patches"].shape[1] for batch in take(6, Pictures(80), config, left_out=[(1, 2)])]
    assert budgets == [4 * budget_of_step(config, step) for step in range(1, 7)]


def test_rows_that_two_processes_would_share_are_refused():
    with pytest.raises(ValueError, match=r"data\.images_per_row=4 must divide the 2 pairs of each process"):
        TrainStream(Pictures(), tokenize=len, config=packed(), process_count=4)  # type: ignore[arg-type]


def test_an_order_of_an_older_version_is_refused():
    with pytest.raises(ValueError, match=r"model\.image\.max_patches: the run began with the order of an older"):
        TrainStream(Pictures(), tokenize=len, config=packed(), order=None)  # type: ignore[arg-type]


def test_pillow_leaves_a_picture_of_the_right_size_as_it_is():
    """`cut_patches` resizes what already has its size."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    same = np.asarray(Image.fromarray(picture).resize((12, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(same, picture)


def test_loading_is_measured_with_whole_rows():
    config = packed(images_per_row=5, batch=30)
    rates = list(measure_loading(Pictures(), BytesTokenizer(), config, is_remote=[False], seconds=0.01))
    assert all(rate.images for rate in rates) and rates[-1].images % 5 == 0
