"""Image-text retrieval: recall at 1, 5 and 10, both ways, with any number of captions per image.

Axes: n images, m texts, e embed.
"""

from collections.abc import Iterable

import numpy as np

from clipjax.evals.encoder import Encoder

DEPTHS = (1, 5, 10)
_BLOCK = 1024  # rows of the similarity matrix held at once


def retrieval(encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
    """`image_to_text_rK` (any caption of the image among the K nearest), `text_to_image_rK`, `num_examples`, `num_texts`.

    Samples without a caption are left out.

    Raises:
        ValueError: no sample has a caption.
    """
    images, owners, texts = [], [], []
    total = 0
    for batch in batches:
        embed = encoder.embed_images(batch["image"])
        index = encoder.gather(batch["index"].astype(np.int32))
        kept = encoder.gather(np.asarray([bool(captions) for captions in batch["captions"]]) & batch["mask"])
        captions = _all_captions(batch)
        order = np.argsort(index[kept], kind="stable")
        images.append(embed[kept][order])
        for position in index[kept][order]:
            texts.extend(captions[int(position)])
            owners.extend([total] * len(captions[int(position)]))
            total += 1
    if not texts:
        raise ValueError("no sample has a caption; retrieval needs at least one per image")
    text_embed = encoder.embed_texts(texts)
    return recalls(np.concatenate(images), text_embed, np.asarray(owners))


def _all_captions(batch: dict) -> dict[int, tuple[str, ...]]:
    """Captions of the whole batch by sample index, from all processes."""
    import jax

    own = {int(i): captions for i, captions in zip(batch["index"], batch["captions"], strict=True)}
    if jax.process_count() == 1:
        return own
    import json

    from jax.experimental import multihost_utils

    content = np.frombuffer(json.dumps(list(own.items())).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([content.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    merged: dict[int, tuple[str, ...]] = {}
    for row, size in zip(rows, sizes.ravel(), strict=True):
        merged |= {int(i): tuple(captions) for i, captions in json.loads(bytes(row[: int(size)]))}
    return merged


def recalls(image_embed: np.ndarray, text_embed: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    """Recalls from embeddings.

    Args:
        image_embed: float32 `[n, e]`.
        text_embed: float32 `[m, e]`.
        owners: int `[m]`, the image that each text belongs to.
    """
    image_ranks = np.full(len(image_embed), np.iinfo(np.int64).max)
    text_ranks = np.zeros(len(text_embed), np.int64)
    for start in range(0, len(image_embed), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(image_embed)))
        place = np.argsort(np.argsort(-(image_embed[rows] @ text_embed.T), axis=1, kind="stable"), axis=1)
        own = (owners >= rows[0]) & (owners <= rows[-1])
        np.minimum.at(image_ranks, owners[own], place[owners[own] - start, np.flatnonzero(own)])
    for start in range(0, len(text_embed), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(text_embed)))
        place = np.argsort(np.argsort(-(text_embed[rows] @ image_embed.T), axis=1, kind="stable"), axis=1)
        text_ranks[rows] = place[np.arange(len(rows)), owners[rows]]
    metrics = {f"image_to_text_r{depth}": float(np.mean(image_ranks < depth)) for depth in DEPTHS}
    metrics |= {f"text_to_image_r{depth}": float(np.mean(text_ranks < depth)) for depth in DEPTHS}
    return metrics | {"num_examples": float(len(image_embed)), "num_texts": float(len(text_embed))}
