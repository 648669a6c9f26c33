"""Retrieval, recall at 1, 5 and 10 both ways: texts of images (any number each), or images of the same thing.

Axes: n images, m texts, e embed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from clipjax.data.sample import Sample
from clipjax.evals.encoder import Encoder, require_finite
from clipjax.evals.ranks import best_places
from clipjax.runtime import processes

DEPTHS = (1, 5, 10)
NO_CAPTION = "no sample has a caption; retrieval needs at least one per image"


def _at_all_depths(*ways: str) -> tuple[str, ...]:
    return tuple(f"{way}_r{depth}" for way in ways for depth in DEPTHS)


class _NeedsCaptions:
    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse samples without any caption, if these are all of them.

        Raises:
            ValueError: there is none.
        """
        if is_all and not any(sample.captions for sample in samples):
            raise ValueError(NO_CAPTION)


@dataclass(frozen=True)
class Retrieval(_NeedsCaptions):
    """The task between images and texts; see `retrieval`. `metrics` are those that rank a model."""

    by_line: bool = False

    metrics: ClassVar[tuple[str, ...]] = _at_all_depths("image_to_text", "text_to_image")

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return retrieval(encoder, batches, by_line=self.by_line)


class ImageRetrieval(_NeedsCaptions):
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
    image_embed, captions = _embed(encoder, batches)
    if by_line:
        captions = [tuple(line for caption in own for line in split_lines(caption)) for own in captions]
    elif several := sum(len(split_lines(caption)) > 1 for own in captions for caption in own):
        processes.announce(
            f"{several} captions hold several lines, and each is one text; with captions_by_line=True of the task "
            "(eval.tasks) each line is one, as CLIP_benchmark means them"
        )
    texts = [caption for own in captions for caption in own]
    if not texts:
        raise ValueError(NO_CAPTION)
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    return recalls(image_embed, embed_once(encoder, texts), owners, encoder.mesh)


def embed_once(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Return embeddings of texts, equal ones of which are embedded once and have equal bits. Float32 `[m, e]`."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(text, len(numbers)) for text in texts]
    return encoder.embed_texts(list(numbers))[places]


def split_lines(caption: str) -> list[str]:
    """Return the lines of a caption that are not blank, stripped; they end as those of a text file do."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", caption) if line.strip()]


def image_retrieval(encoder: Encoder, queries: Iterable[dict], gallery: Iterable[dict]) -> dict[str, float]:
    """Return `source_to_gallery_rK`, `gallery_to_source_rK`: a picture with the same first caption among the K nearest.

    Pictures without a counterpart are no queries but stay in the other side's gallery. `num_examples` counts the
    queries of the first direction.

    Raises:
        ValueError: no picture has a counterpart, or one of the sides has no picture with a caption.
    """
    (left, left_captions), (right, right_captions) = _embed(encoder, queries), _embed(encoder, gallery)
    for name, captions in (("source", left_captions), ("gallery", right_captions)):
        if not captions:
            raise ValueError(f"no usable sample of the {name} has a caption; image retrieval needs one per picture")
    firsts = [own[0] for own in left_captions + right_captions]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(firsts))}
    left_groups, right_groups = (
        np.asarray([numbers[own[0]] for own in each], np.int64) for each in (left_captions, right_captions)
    )
    left_asked, right_asked = np.isin(left_groups, right_groups), np.isin(right_groups, left_groups)
    if not left_asked.any():
        raise ValueError("no picture of the source has the caption of one in the gallery")
    require_finite("image embeddings", left)
    require_finite("image embeddings", right)
    there = best_places(left[left_asked], right, left_groups[left_asked], right_groups, encoder.mesh)
    back = best_places(right[right_asked], left, right_groups[right_asked], left_groups, encoder.mesh)
    return (
        {"num_examples": float(len(there))} | _recalls("source_to_gallery", there) | _recalls("gallery_to_source", back)
    )


def _recalls(name: str, places: np.ndarray) -> dict[str, float]:
    return {f"{name}_r{depth}": float(np.mean(places < depth)) for depth in DEPTHS}


def _embed(encoder: Encoder, batches: Iterable[dict]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return embeddings of all usable pictures with a caption, in the order of the source, and their captions."""
    embeds, captions = [], []
    for batch in batches:
        embed = encoder.embed_images(batch["image"])
        index = encoder.gather(batch["index"].astype(np.int32))
        kept = encoder.gather(np.asarray([bool(own) for own in batch["captions"]]) & batch["mask"])
        by_index = _all_captions(encoder, batch)
        order = np.argsort(index[kept], kind="stable")
        embeds.append(embed[kept][order])
        captions += [by_index[int(position)] for position in index[kept][order]]
    return (np.concatenate(embeds) if embeds else np.zeros((0, 0), np.float32)), captions


def _all_captions(encoder: Encoder, batch: dict) -> dict[int, tuple[str, ...]]:
    """Return captions of the whole batch by sample index, from all processes."""
    own = [[int(i), captions] for i, captions in zip(batch["index"], batch["captions"], strict=True)]
    return {index: tuple(captions) for part in encoder.gather_json(own) for index, captions in part}


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
