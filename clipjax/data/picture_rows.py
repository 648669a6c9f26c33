"""Perceptual hashes of samples one by one, with the reason where a picture cannot be used. Axis: n samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipjax.config import DataConfig
from clipjax.data.images import make_decoder
from clipjax.data.picture_hash import hash_picture
from clipjax.data.sample import REASONS, BadSample, Source

USABLE = -1
"""The reason of a sample that has a hash."""


class PictureHashes(NamedTuple):
    """The hashes of consecutive samples.

    Attributes:
        values: uint64 [n].
        reasons: int8 [n], `USABLE` or an index into `REASONS`.
    """

    values: np.ndarray
    reasons: np.ndarray

    @staticmethod
    def join(parts: Sequence["PictureHashes"]) -> "PictureHashes":
        """Return one after the other."""
        if not parts:
            return PictureHashes(np.empty(0, np.uint64), np.empty(0, np.int8))
        return PictureHashes(
            np.concatenate([part.values.astype(np.uint64) for part in parts]),
            np.concatenate([part.reasons for part in parts]),
        )


def hash_rows(source: Source, rows: range) -> PictureHashes:
    """Read, decode and hash samples.

    Raises:
        UnreadableData: the data cannot be read.
    """
    decoder = make_decoder(DataConfig())
    values, reasons = np.zeros(len(rows), np.uint64), np.full(len(rows), USABLE, np.int8)
    for place, row in enumerate(rows):
        try:
            values[place] = hash_picture(decoder(source[row].image))
        except BadSample as bad:
            reasons[place] = REASONS.index(bad.reason)
    return PictureHashes(values, reasons)
