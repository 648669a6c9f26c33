"""Rows of patches of pictures that keep their aspect: how many each picture gets, and where they stand.

g pictures that are neighbours in the global batch share a row of `g * budget` places, so a row depends on them alone.
Axes: t places of a row, g pictures of a row, p patch_size.

Source: NaFlex of SigLIP 2 (arXiv 2502.14786, section 2.4.2); several pictures in a row as in NaViT (arXiv 2307.06304).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.config import Config, Crop, Interpolation, ViTConfig, flops_per_pair, patch_menu
from clipjax.data.augmentations import Augmentations, make_augmentations
from clipjax.data.images import resampling
from clipjax.data.order import derive_key
from clipjax.data.patches import PADDING, cut, fit_grid

_BUDGET_KEY = 17  # what a key is for, beside those of an order and of augmentations
_STEPS = 256  # of the common factor that shrinks the pictures of a row


def budget_of_step(config: Config, step: int) -> int:
    """Return the patches per image of a step, drawn by the seed: the same on all processes, whatever the pictures.

    Args:
        config: the run, with `model.image.max_patches`.
        step: number of the update, from 1.
    """
    menu = patch_menu(config)
    if len(menu) == 1:
        return menu[0]
    key = np.array([derive_key(config.seed, _BUDGET_KEY), step], np.uint64)
    return menu[int(np.random.Generator(np.random.Philox(key=key)).integers(len(menu)))]


def mean_flops_per_pair(config: Config, first: int, last: int) -> float:
    """Return the mean FLOPs per pair of steps, from one to another, by the budget of each; see `flops_per_pair`."""
    menu = patch_menu(config)
    if len(menu) < 2:
        return flops_per_pair(config, *menu)
    budgets = [budget_of_step(config, step) for step in range(first, last + 1)]
    return sum(flops_per_pair(config, patches) * budgets.count(patches) for patches in menu) / len(budgets)


def fit_row(
    sizes: Sequence[tuple[int, int]], num_places: int, *, max_patches: int, patch_size: int, enlarge: bool
) -> list[tuple[int, int]]:
    """Return the grid, rows and columns, of each picture of a row.

    Each picture wants as many patches as it may have. If they do not fit together, all wants are multiplied by the
    largest k / 256 by which they do.

    Args:
        sizes: height and width of the pictures in pixels.
        num_places: patches of the row, at least one for each picture.
        max_patches: most patches of a picture.
        patch_size: side of a patch in pixels.
        enlarge: False: a picture wants no more patches than its own pixels fill.
    """
    most = min(max_patches, num_places - len(sizes) + 1)  # the others have one each at least
    wanted = [most if enlarge else max(1, min(most, height * width // patch_size**2)) for height, width in sizes]

    def fit(steps: int) -> list[tuple[int, int]]:
        limits = [max(1, patches * steps // _STEPS) for patches in wanted]
        return [fit_grid(*size, limit, patch_size) for size, limit in zip(sizes, limits, strict=True)]

    def fits(grids: Sequence[tuple[int, int]]) -> bool:
        return sum(rows * columns for rows, columns in grids) <= num_places

    grids = fit(_STEPS)
    if fits(grids):
        return grids
    low, high = 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(fit(middle)) else (low, middle)
    return fit(low)


@dataclass(frozen=True, slots=True)
class PatchRows:
    """Rows of patches out of decoded pictures.

    Attributes:
        config: the run; its seed draws the budget of each step.
        image: the image tower.
        augmentations: changes of the resized pictures, before they are cut.
    """

    config: Config
    image: ViTConfig
    augmentations: Augmentations

    @property
    def images_per_row(self) -> int:
        """Number g of pictures in a row."""
        return self.config.data.images_per_row

    def __call__(self, pictures: Sequence[tuple[np.ndarray, np.random.Generator]], step: int) -> dict[str, np.ndarray]:
        """Return one row of a batch.

        Args:
            pictures: g of them, uint8 [h, w, 3], each with its source of randomness.
            step: number of the update, from 1.

        Returns:
            `patches` uint8 [t, p * p * 3], `segment` int32 [t], `place` int32 [t, 2], `grid` int32 [g, 2]: see
            `clipjax.typing.Patches`.
        """
        data, patch_size = self.config.data, self.image.patch_size
        assert self.image.max_patches is not None
        num_places = self.images_per_row * budget_of_step(self.config, step)
        boxes = [self._crop(picture, rng) for picture, rng in pictures]
        grids = fit_row(
            [(height, width) for _, _, height, width in boxes],
            num_places,
            max_patches=self.image.max_patches,
            patch_size=patch_size,
            enlarge=data.enlarge,
        )
        patches = np.zeros((num_places, 3 * patch_size**2), np.uint8)
        segment = np.full(num_places, PADDING, np.int32)
        place = np.zeros((num_places, 2), np.int32)
        first = 0
        for number, ((picture, rng), box, (rows, columns)) in enumerate(zip(pictures, boxes, grids, strict=True)):
            resized = _resize(picture, box, (rows * patch_size, columns * patch_size), data.interpolation)
            here = slice(first, first + rows * columns)
            patches[here] = cut(self.augmentations(resized, rng), patch_size)
            segment[here] = number
            place[here] = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
            first = here.stop
        return {"patches": patches, "segment": segment, "place": place, "grid": np.array(grids, np.int32)}

    def _crop(self, picture: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of the part of a picture, in the picture's own aspect."""
        height, width = picture.shape[:2]
        if self.config.data.crop is Crop.CENTER:
            return 0, 0, height, width
        side = rng.uniform(self.config.data.min_crop_area, 1.0) ** 0.5
        down, across = max(1, round(height * side)), max(1, round(width * side))
        top, left = int(rng.integers(0, height - down + 1)), int(rng.integers(0, width - across + 1))
        return top, left, down, across


def _resize(
    picture: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """Return a part of a picture, uint8 [rows * p, columns * p, 3]; the filter sees the pixels around it."""
    from PIL import Image

    top, left, height, width = box
    part = (left, top, left + width, top + height)
    image = Image.fromarray(picture).resize((size[1], size[0]), resampling(interpolation), box=part)
    return np.asarray(image)


def make_patch_rows(config: Config) -> PatchRows | None:
    """Return the rows that a config asks for; None where its images are squares."""
    if not isinstance(config.model.image, ViTConfig) or config.model.image.max_patches is None:
        return None
    return PatchRows(config, config.model.image, make_augmentations(config))
