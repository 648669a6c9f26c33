"""Samples of a task as a report shows them: small pictures, their texts, and how the model sees them beside each other.

Axes: n images, m texts, e embed.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from clipjax.data.digests import spread
from clipjax.data.images import make_decoder
from clipjax.data.patches import make_view
from clipjax.data.sample import BadSample, Sample
from clipjax.data.training_stream import per_process
from clipjax.evals.captioned import split_lines
from clipjax.evals.encoder import Encoder
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.runner import Task
from clipjax.evals.zero_shot import ZeroShot, zero_shot_classifier

_SIDE = 96  # of a picture in a report, at most
_QUALITY = 85
_GUESSES = 3
_TRIED = 3  # samples that are read for each one that is shown


@dataclass(frozen=True)
class Example:
    """A sample in a report.

    Attributes:
        picture: JPEG of what the model gets, small.
        text: its caption, or the name of its class.
        guesses: classes with their probabilities, the likeliest first; for other tasks the texts of all examples with
            their cosines.
    """

    picture: bytes
    text: str
    guesses: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Examples:
    """Samples of one task.

    Attributes:
        examples: in the order of the source.
        similarity: cosine of each picture with each example's text, `[n, n]`; None where texts are those of classes.
    """

    examples: Sequence[Example]
    similarity: np.ndarray | None


def collect(task: Task, encoder: Encoder, count: int) -> Examples | None:
    """Return samples of a task, spread evenly over its source; all processes call this.

    Args:
        task: of zero-shot classification or retrieval; others have none.
        encoder: of pictures and texts.
        count: of samples, at most; unusable ones are left out.

    Returns:
        None where there is none, for videos, and for models without embeddings or of pictures of variable aspect.
    """
    view = make_view(encoder.config)
    if (
        task.frames is not None
        or not isinstance(task.measure, ZeroShot | Retrieval)
        or not encoder.has_embeddings
        or not hasattr(view, "size")
    ):
        return None
    found = _read(task, min(count, encoder.config.eval.batch_size))
    if not found:
        return None
    embed = _embed(encoder, [pixels for _, pixels in found])
    pictures = [_small(pixels) for _, pixels in found]
    if isinstance(task.measure, Retrieval):
        by_line = task.measure.by_line
        texts = [split_lines(each.captions[0])[0] if by_line else each.captions[0] for each, _ in found]
        similarity = embed @ encoder.embed_texts(texts).T
        guesses = [_best(texts, row) for row in similarity]
        return Examples([Example(*each) for each in zip(pictures, texts, guesses, strict=True)], similarity)
    names = task.measure.names
    classifier = zero_shot_classifier(encoder.embed_texts, names, task.measure.templates, normalise=encoder.normalise)
    logits = encoder.logit_scale * (embed @ classifier.T).astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    guesses = [_best(names, row) for row in odds / odds.sum(axis=1, keepdims=True)]
    texts = [names[sample.label] for sample, _ in found]
    return Examples([Example(*each) for each in zip(pictures, texts, guesses, strict=True)], None)


def _read(task: Task, count: int) -> list[tuple[Sample, np.ndarray]]:
    """Return samples with what the model gets of their pictures."""
    source, found = task.sources[0], list[tuple[Sample, np.ndarray]]()
    decode, view = make_decoder(task.config.data), make_view(task.config)
    places = spread(min(len(source), task.max_examples or len(source)), _TRIED * count)
    for index in [place for first in range(_TRIED) for place in places[first::_TRIED]]:  # still spread if all are good
        if len(found) == count:
            break
        try:
            sample = source[index]
            pixels = view(decode(sample.image))
        except BadSample:
            continue
        is_usable = sample.captions if isinstance(task.measure, Retrieval) else sample.label >= 0
        if is_usable and isinstance(pixels, np.ndarray):
            found.append((sample, pixels))
    return found


def _embed(encoder: Encoder, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return embeddings of pictures, fewer than a batch, that all processes have. Float32 `[n, e]`."""
    size = encoder.config.eval.batch_size
    local = per_process("eval.batch_size", size, jax.process_count())
    batch = np.zeros((size, *pictures[0].shape), np.uint8)
    batch[: len(pictures)] = pictures
    first = jax.process_index() * local
    return encoder.embed_images(batch[first : first + local])[: len(pictures)]


def _best(texts: Sequence[str], values: np.ndarray) -> list[tuple[str, float]]:
    return [(texts[int(i)], float(values[i])) for i in np.argsort(-values, kind="stable")[:_GUESSES]]


def _small(pixels: np.ndarray) -> bytes:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()
