"""Retrieval, recall at 1, 5 and 10 both ways: texts of images (any number each), or images of the same thing.

Axes: n images, m texts, e embed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from clipjax.evals.captioned import NO_CAPTION, NeedsCaptions, embed_captioned, embed_once
from clipjax.evals.encoder import Encoder, require_finite
from clipjax.evals.ranks import best_places

DEPTHS = (1, 5, 10)


def _at_all_depths(*ways: str) -> tuple[str, ...]:
    return tuple(f"{way}_r{depth}" for way in ways for depth in DEPTHS)


@dataclass(frozen=True)
class Retrieval(NeedsCaptions):
    """The task between images and texts; see `retrieval`. `metrics` are those that rank a model."""

    by_line: bool = False

    metrics: ClassVar[tuple[str, ...]] = _at_all_depths("image_to_text", "text_to_image")

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return retrieval(encoder, batches, by_line=self.by_line)


class ImageRetrieval(NeedsCaptions):
    """The task between images of the same thing; see `image_retrieval`. `metrics` are those that rank a model."""

    metrics: ClassVar[tuple[str, ...]] = _at_all_depths("source_to_gallery", "gallery_to_source")

    def __call__(self, encoder: Encoder, queries: Iterable[dict], gallery: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return image_retrieval(encoder, queries, gallery)


def retrieval(encoder: Encoder, batches: Iterable[dict], *, by_line: bool = False) -> dict[str, float]:
    """Return `image_to_text_rK` (any caption of the image among the K nearest), `text_to_image_rK`, and their numbers.

    Samples without a caption are left out.

    Args:
        encoder: of pictures and texts.
        batches: of pictures with captions.
        by_line: each line of a caption is a text, blank ones none. Otherwise captions of several lines, which are one
            text each then, are told.

    Raises:
        ValueError: no sample has a caption.
    """
    images = embed_captioned(encoder, batches)
    captions = images.texts(by_line=by_line)
    texts = [caption for own in captions for caption in own]
    if not texts:
        raise ValueError(NO_CAPTION)
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    return recalls(images.embed, embed_once(encoder, texts), owners, encoder.mesh)


def image_retrieval(encoder: Encoder, queries: Iterable[dict], gallery: Iterable[dict]) -> dict[str, float]:
    """Return `source_to_gallery_rK`, `gallery_to_source_rK`: a picture with the same first caption among the K nearest.

    Pictures without a counterpart are no queries but stay in the other side's gallery. `num_examples` counts the
    queries of the first direction.

    Raises:
        ValueError: no picture has a counterpart, or one of the sides has no picture with a caption.
    """
    left, right = embed_captioned(encoder, queries), embed_captioned(encoder, gallery)
    for name, side in (("source", left), ("gallery", right)):
        if not side.captions:
            raise ValueError(f"no usable sample of the {name} has a caption; image retrieval needs one per picture")
    firsts = [own[0] for own in left.captions + right.captions]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(firsts))}
    left_groups, right_groups = (
        np.asarray([numbers[own[0]] for own in side.captions], np.int64) for side in (left, right)
    )
    left_asked, right_asked = np.isin(left_groups, right_groups), np.isin(right_groups, left_groups)
    if not left_asked.any():
        raise ValueError("no picture of the source has the caption of one in the gallery")
    there = best_places(left.embed[left_asked], right.embed, left_groups[left_asked], right_groups, encoder.mesh)
    back = best_places(right.embed[right_asked], left.embed, right_groups[right_asked], left_groups, encoder.mesh)
    return (
        {"num_examples": float(len(there))} | _recalls("source_to_gallery", there) | _recalls("gallery_to_source", back)
    )


def _recalls(name: str, places: np.ndarray) -> dict[str, float]:
    return {f"{name}_r{depth}": float(np.mean(places < depth)) for depth in DEPTHS}


def recalls(
    image_embed: np.ndarray, text_embed: np.ndarray, owners: np.ndarray, mesh: Mesh | None = None
) -> dict[str, float]:
    """Return recalls from embeddings.

    Of equally near ones the first is the nearest. Images without a text count as queries that find nothing.

    Args:
        image_embed: float32 `[n, e]`.
        text_embed: float32 `[m, e]`.
        owners: int `[m]`, the image that each text belongs to, from 0 to n - 1.
        mesh: the devices; see `best_places`.

    Raises:
        ValueError: there is no image or no text, or an owner is none of the images.
        NotFiniteEmbeddings: some embedding is not finite.
    """
    if not len(image_embed) or not len(text_embed):
        raise ValueError(f"recalls of {len(image_embed)} images and {len(text_embed)} texts: give at least one of each")
    if owners.min() < 0 or owners.max() >= len(image_embed):
        raise ValueError(
            f"owners reach from {owners.min()} to {owners.max()}; the images have numbers 0 to {len(image_embed) - 1}"
        )
    require_finite("image embeddings", image_embed)
    require_finite("text embeddings", text_embed)
    images = np.arange(len(image_embed))
    metrics = _recalls("image_to_text", best_places(image_embed, text_embed, images, owners, mesh))
    metrics |= _recalls("text_to_image", best_places(text_embed, image_embed, owners, images, mesh))
    return metrics | {"num_examples": float(len(image_embed)), "num_texts": float(len(text_embed))}
