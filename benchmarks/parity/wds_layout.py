"""Data in CLIP_benchmark's WebDataset layout, with labels or with captions.

    ROOT/SPLIT/0.tar, 1.tar ..., ROOT/SPLIT/nshards.txt
    ROOT/classnames.txt, ROOT/zeroshot_classification_templates.txt, ROOT/dataset_type.txt

Source: LAION-AI/CLIP_benchmark, `clip_benchmark/datasets/builder.py`, `build_wds_dataset`.
"""

import io
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.data.packed_samples import PackedSample, write_tar
from clipjax.data.sample import Sample

PER_SHARD = 500


def write_labelled(
    root: pathlib.Path, splits: dict[str, Sequence[Sample]], names: Sequence[str], templates: Sequence[str]
) -> None:
    """Write a data set for classification.

    Args:
        root: folder that is made.
        splits: samples by split; those without a label are left out.
        names: of the classes.
        templates: each with one `{}` for the name.

    Raises:
        ValueError: a name or template that a line of a text file, stripped, does not hold; a split without a label.
    """
    _check_lines([*names, *templates])
    for split, samples in splits.items():
        packed = [
            PackedSample(f"{number:06d}", _encoded(sample), None, None, str(sample.label).encode())
            for number, sample in enumerate(samples)
            if sample.label >= 0
        ]
        _write_split(root / split, packed)
    _write_prompts(root, names, templates)


def write_multi_labelled(
    root: pathlib.Path,
    samples: Sequence[Sample],
    labels: Sequence[Sequence[int]],
    names: Sequence[str],
    templates: Sequence[str],
) -> None:
    """Write a data set of images with several classes, of one split `test`.

    Each image has its classes twice: a vector of 0 and 1 in `KEY.npy`, which CLIP_benchmark reads, and the list of
    their numbers as `label` in `KEY.json`, which clipjax reads.

    Args:
        root: folder that is made.
        samples: with an image each.
        labels: class numbers of each sample.
        names: of the classes.
        templates: each with one `{}` for the name.

    Raises:
        ValueError: a text that a line, stripped, does not hold; no sample.
    """
    _check_lines([*names, *templates])
    packed = []
    for number, (sample, own) in enumerate(zip(samples, labels, strict=True)):
        stream = io.BytesIO()
        np.save(stream, np.isin(np.arange(len(names)), own).astype(np.int64), allow_pickle=False)
        described = json.dumps({"label": list(own)}).encode()
        packed.append(_WithTargets(f"{number:06d}", _encoded(sample), None, described, None, stream.getvalue()))
    _write_split(root / "test", packed)
    _write_prompts(root, names, templates)
    (root / "dataset_type.txt").write_text("multilabel\n")


@dataclass(frozen=True, slots=True)
class _WithTargets(PackedSample):
    """A sample with the content of its `KEY.npy`."""

    targets: bytes

    def members(self) -> Iterable[tuple[str, bytes]]:
        yield from PackedSample.members(self)
        yield "npy", self.targets


def write_captioned(root: pathlib.Path, samples: Sequence[Sample], *, most: int) -> None:
    """Write a data set for retrieval, of one split `test`: the captions of an image are lines of its text.

    Args:
        root: folder that is made.
        samples: with a caption each.
        most: captions of an image.
    """
    packed = [
        PackedSample(f"{number:06d}", _encoded(sample), "\n".join(sample.captions[:most]).encode(), None, None)
        for number, sample in enumerate(samples)
    ]
    _write_split(root / "test", packed)
    (root / "dataset_type.txt").write_text("retrieval\n")


def with_own_captions(samples: Sequence[Sample], *, most: int) -> list[Sample]:
    """Return the samples none of whose first captions, so many as `most`, occurs anywhere else among all samples.

    Equal captions are exact ties: which of them is found first is no property of the weights.
    """
    known = Counter(caption for sample in samples for caption in sample.captions[:most])
    return [sample for sample in samples if all(known[caption] == 1 for caption in sample.captions[:most])]


def _check_lines(texts: Sequence[str]) -> None:
    for text in texts:
        if text != text.strip() or len(text.splitlines()) != 1:
            raise ValueError(f"{text!r} does not survive as a line of a text file; CLIP_benchmark would read another")


def _write_prompts(root: pathlib.Path, names: Sequence[str], templates: Sequence[str]) -> None:
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    lines = "".join(f"{template.replace('{}', '{c}')}\n" for template in templates)
    (root / "zeroshot_classification_templates.txt").write_text(lines)


def _write_split(folder: pathlib.Path, samples: Sequence[PackedSample]) -> None:
    if not samples:
        raise ValueError(f"{folder}: there is no sample to write")
    folder.mkdir(parents=True)
    starts = range(0, len(samples), PER_SHARD)
    for number, start in enumerate(starts):
        write_tar(folder / f"{number}.tar", samples[start : start + PER_SHARD])
    (folder / "nshards.txt").write_text(f"{len(starts)}\n")


def _encoded(sample: Sample) -> bytes:
    if not isinstance(sample.image, bytes):
        raise ValueError(f"sample {sample.key}: the image is not encoded; take a source of files")
    return sample.image
