"""Names for the types that parts exchange, and the legend of array axes.

Axes: b batch (global unless said otherwise), h height, w width (of images), l tokens, c channels, e embed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Params = Mapping[str, Any]
"""Parameters: a nested dict of float32 arrays."""

Batch = Mapping[str, Any]
"""`image` uint8 [b, h, w, 3], `tokens` int32 [b, l], `skip_reason` int32 [b] (why another pair stands in for this one,
an index into `data.sample.REASONS`; -1: none does). Where configured, `group` int32 [b] (equal for pairs that are no
negatives of each other), `index` int32 [b] (of the sample in its source). With k texts of each image, `tokens` is
int32 [b, k, l], and `group` int32 [b, k] where it depends on the text. With `data.resize_on=device` `image` is a canvas
uint8 [b, c, c, 3], and `crop` float32 [b, 7] tells its part (`data.canvas`): the step resizes them first. Where images
are of variable aspect, the fields of `Patches` by name stand in for `image`, and the step joins them to one."""

Metrics = dict[str, Any]
"""Scalars by name."""

Key = jax.Array
"""A typed JAX PRNG key."""


class Encoded(NamedTuple):
    """Results of encoding a batch.

    Attributes:
        image_embed: unit-norm float32 [b, e].
        text_embed: unit-norm float32 [b, e], or [b, k, e] with k texts of each image.
        logit_scale: multiplier of similarities, a scalar.
        logit_bias: added to logits, a scalar, or None.
        nll: negative log-likelihood of each caption, float32 [b], or None where nothing predicts captions.
        num_tokens: number of tokens that each of them counts, float32 [b], or None.
        batch_stats: running statistics of BatchNorm after this batch; empty in other models.
    """

    image_embed: jax.Array
    text_embed: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array | None
    nll: jax.Array | None = None
    num_tokens: jax.Array | None = None
    batch_stats: Params = {}  # noqa: RUF012


class Patches(NamedTuple):
    """Images of variable aspect as rows of patches, r rows of t places with g images each.

    Image i of the batch is number i % g of row i // g.

    Attributes:
        patches: uint8 or normalised pixels [r, t, p * p * 3].
        segment: number of the patch's image in its row, int32 [r, t]; -1: padding.
        place: row and column of the patch in its image, int32 [r, t, 2].
        grid: rows and columns of each image, int32 [r, g, 2].
    """

    patches: jax.Array
    segment: jax.Array
    place: jax.Array
    grid: jax.Array
