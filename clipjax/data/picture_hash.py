"""Perceptual hash of a picture: 64 bits that hardly change when it is scaled, compressed or slightly cropped.

`clipjax.data.near_pairs` finds hashes that are alike. Axes: h height, w width.
"""

import numpy as np

HASH_FORMAT = "dct64-1"
"""Name of the formula; stored hashes of another one are not used."""

BITS = 64
_SIDE, _LOW = 32, 8
_MARGIN = 4.0  # above the noise of JPEG and resizing in a coefficient; the largest possible one is about 4,000

# DCT-II with orthonormal rows, rows 1 to 8: C[k, x] = sqrt(2/32) cos(pi (2x + 1) k / 64). Row 0, the mean, is left out.
_ROWS = np.sqrt(2 / _SIDE) * np.cos(
    np.pi / (2 * _SIDE) * np.arange(1, _LOW + 1)[:, None] * (2 * np.arange(_SIDE)[None] + 1)
)


def hash_picture(pixels: np.ndarray) -> int:
    """Return the hash of a picture.

    With g the grey picture of 32 x 32 pixels (ITU-R BT.601 luma, antialiased by Lanczos), D = C g C^T holds the 64
    lowest frequencies of its DCT-II, without those that are constant along a row or a column. Bit 8 u + v, counted
    from the highest one, is 1 where D[u, v] exceeds the median of D by more than 4: half of the frequencies of a
    symmetric picture are 0, and their signs would be noise. Pictures of one colour give 0.

    Args:
        pixels: uint8 [h, w, 3].

    Source:
        C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1, as in
        pHash's `ph_dct_imagehash`, which blurs by a 7 x 7 mean and takes the nearest pixels instead of Lanczos, and
        has no margin.
    """
    from PIL import Image

    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    low = _ROWS @ np.asarray(grey, np.float64) @ _ROWS.T
    bits = np.packbits((low > np.median(low) + _MARGIN).ravel())
    return int.from_bytes(bits.tobytes(), "big")
