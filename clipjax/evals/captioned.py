"""Pictures with their captions, as retrieval and its kin need them: embeddings of one, texts of the other.

Axes: n images, m texts, e embed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.encoder import Encoder, require_finite
from clipjax.runtime import processes

NO_CAPTION = "no sample has a caption; retrieval needs at least one per image"


class NeedsCaptions:
    """The check of tasks that need captions."""

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse samples without any caption, if these are all of them.

        Raises:
            ValueError: there is none.
        """
        if is_all and not any(sample.captions for sample in samples):
            raise ValueError(NO_CAPTION)


@dataclass(frozen=True)
class Captioned:
    """All usable pictures of a source that have a caption, in its order; the same on all processes.

    Attributes:
        embed: unit norm, float32 `[n, e]`.
        captions: of each, at least one.
        labels: of each, -1 for none, int32 `[n]`.
    """

    embed: np.ndarray
    captions: list[tuple[str, ...]]
    labels: np.ndarray

    def texts(self, *, by_line: bool) -> list[tuple[str, ...]]:
        """Return the texts of each picture: its captions, or with `by_line` their lines.

        Captions of several lines that are one text each are told.
        """
        if by_line:
            return [tuple(line for caption in own for line in split_lines(caption)) for own in self.captions]
        if several := sum(len(split_lines(caption)) > 1 for own in self.captions for caption in own):
            processes.announce(
                f"{several} captions hold several lines, and each is one text; with captions_by_line=True of the task "
                "(eval.tasks) each line is one, as CLIP_benchmark means them"
            )
        return self.captions


def embed_captioned(encoder: Encoder, batches: Iterable[dict]) -> Captioned:
    """Return the pictures of all batches that are usable and have a caption.

    Raises:
        NotFiniteEmbeddings: some embedding is not finite.
    """
    embeds, captions, labels = [], [], []
    for batch in batches:
        embed = encoder.embed_images(batch["image"])
        kept = np.asarray([bool(own) for own in batch["captions"]]) & batch["mask"]
        facts = encoder.gather(np.stack([batch["index"], batch["label"], kept], axis=1).astype(np.int32))
        by_index = _all_captions(encoder, batch)
        rows = np.flatnonzero(facts[:, 2])
        rows = rows[np.argsort(facts[rows, 0], kind="stable")]
        embeds.append(embed[rows])
        labels.append(facts[rows, 1])
        captions += [by_index[int(index)] for index in facts[rows, 0]]
    if not captions:
        return Captioned(np.zeros((0, 0), np.float32), [], np.zeros(0, np.int32))
    return Captioned(require_finite("image embeddings", np.concatenate(embeds)), captions, np.concatenate(labels))


def _all_captions(encoder: Encoder, batch: dict) -> dict[int, tuple[str, ...]]:
    """Return captions of the whole batch by sample index, from all processes."""
    own = [[int(i), captions] for i, captions in zip(batch["index"], batch["captions"], strict=True)]
    return {index: tuple(captions) for part in encoder.gather_json(own) for index, captions in part}


def embed_once(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Return embeddings of texts, equal ones of which are embedded once and have equal bits. Float32 `[m, e]`.

    Raises:
        NotFiniteEmbeddings: some embedding is not finite.
    """
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(text, len(numbers)) for text in texts]
    return require_finite("text embeddings", encoder.embed_texts(list(numbers)))[places]


def split_lines(caption: str) -> list[str]:
    """Return the lines of a caption that are not blank, stripped; they end as those of a text file do."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", caption) if line.strip()]
