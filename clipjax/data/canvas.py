"""Pictures for the device to crop and resize: pixels on a canvas of one size, and the box to take from it.

Axes: h height, w width, c canvas_size. `clipjax.models.device_resize` is the other half.
"""

import math
from dataclasses import dataclass

import numpy as np

from clipjax.config import Config, Crop
from clipjax.data.augmentations import happens
from clipjax.data.images import EvalTransform, crop_box, resampling

_REACH = 4  # pixels beside the box: twice what the filter sees of them


@dataclass(frozen=True, slots=True)
class CanvasTransform:
    """The crop of a training picture, drawn as on the host but left for the device to make.

    Attributes:
        size: side of the canvas.
        view: the resizing of evaluation, for `crop=center`.
        crop: of training.
        min_area: smallest share of the picture.
        horizontal_flip: probability of a mirrored picture.
    """

    size: int
    view: EvalTransform
    crop: Crop
    min_area: float
    horizontal_flip: float

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the canvas and the box.

        Args:
            image: uint8 [h, w, 3].
            rng: source of the randomness, from which as much is drawn as on the host.

        Returns:
            uint8 [c, c, 3], 0 to the right of the picture and below it, and float32 [7]: top, left, height and width of
            the box in pixels of the canvas, height and width of the picture on it, 1 for a mirrored picture.
        """
        if self.crop is Crop.RANDOM_RESIZED:
            box: tuple[float, float, float, float] = crop_box(image.shape[0], image.shape[1], self.min_area, rng)
        else:
            image, box = self.view.find_box(image)
        flip = happens(self.horizontal_flip, rng)
        part, box = self._fit(image, box)
        canvas = np.zeros((self.size, self.size, 3), np.uint8)
        canvas[: part.shape[0], : part.shape[1]] = part
        return canvas, np.array([*box, *part.shape[:2], flip], np.float32)

    def _fit(
        self, image: np.ndarray, box: tuple[float, float, float, float]
    ) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """Return the part of a picture around a box, reduced if it is larger than the canvas, and the box in it."""
        top, left, height, width = box
        longest = max(height, width)
        reach = math.ceil(_REACH * max(1.0, longest / min(self.view.size, self.size))) + 1
        first = max(0, math.floor(top) - reach), max(0, math.floor(left) - reach)
        part = image[first[0] : math.ceil(top + height) + reach, first[1] : math.ceil(left + width) + reach]
        top, left = top - first[0], left - first[1]
        factor = self.size / max(part.shape[:2])
        if factor >= 1:
            return part, (top, left, height, width)
        from PIL import Image

        rows, columns = (max(1, round(side * factor)) for side in part.shape[:2])
        down, across = rows / part.shape[0], columns / part.shape[1]
        reduced = Image.fromarray(part).resize((columns, rows), resampling(self.view.interpolation))
        return np.asarray(reduced), (top * down, left * across, height * down, width * across)


def make_canvas_transform(config: Config, view: EvalTransform) -> CanvasTransform:
    """Return the crop that a config asks for."""
    data = config.data
    return CanvasTransform(data.canvas_size, view, data.crop, data.min_crop_area, data.augment.horizontal_flip)
