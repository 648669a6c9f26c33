"""Random changes of training pictures, besides the crop; all are off by default."""

from dataclasses import dataclass

from clipjax.config.ranges import FRACTION, NOT_NEGATIVE, bounded

_MAX_HUE = 0.5  # of the circle, in either direction


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Probabilities per picture, and strengths. The changes follow the crop, in the order of the fields.

    Attributes:
        horizontal_flip: probability of a mirrored picture; captions that tell left from right become wrong.
        color_jitter: strengths of brightness, contrast, saturation and hue: factors from 1 - strength to 1 + strength,
            and a turn of the hue by at most so much of its circle (0.5 is all colours). OpenCLIP's recipe has
            (0.32, 0.32, 0.32, 0.08) with probability 0.8.
        color_jitter_probability: probability of all four together, in a random order.
        grayscale: probability of a picture without colours.
        erasing: probability of a rectangle in the mean colour, 2 to 33 % of the area.
    """

    horizontal_flip: float = bounded(0.0, FRACTION)
    color_jitter: tuple[float, float, float, float] = bounded((0.0, 0.0, 0.0, 0.0), NOT_NEGATIVE)
    color_jitter_probability: float = bounded(0.0, FRACTION)
    grayscale: float = bounded(0.0, FRACTION)
    erasing: float = bounded(0.0, FRACTION)

    def errors(self, path: str) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        strengths, probability = self.color_jitter, self.color_jitter_probability
        if len(strengths) != 4 or strengths[3] > _MAX_HUE:
            return [
                f"{path}.color_jitter={strengths} must have four numbers, for brightness, contrast, saturation and "
                f"hue, and the hue may turn by {_MAX_HUE} at most"
            ]
        if (probability > 0) != any(strengths):
            return [
                f"{path}.color_jitter={strengths} with {path}.color_jitter_probability={probability} changes nothing; "
                "set both, or neither"
            ]
        return []
