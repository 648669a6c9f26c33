"""Draw pictures of `scenes` that a model never saw, each with the prompts that it ranks highest.

    python benchmarks/gallery.py --checkpoint=runs/quickstart --output=docs/images/quickstart.png

The picture in the README; the left half shows `val`, the right half `unseen` (combinations that never occur in train).
"""

import argparse

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import clipjax
from clipjax.data.images import decode
from clipjax.data.scenes.language import CLASS_NAMES, TEMPLATES
from clipjax.data.sources import build_source

ROWS, COLUMNS = 3, 3


def labelled(spec: str, data, count: int) -> list:
    source = build_source(spec, data=data)
    samples = (source[i] for i in range(len(source)))
    chosen = (sample for sample in samples if sample.label >= 0)
    return [next(chosen) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    model = clipjax.load(arguments.checkpoint)
    classifier = model.zero_shot_classifier(CLASS_NAMES, TEMPLATES)
    figure, axes = plt.subplots(ROWS, 4 * COLUMNS, figsize=(15, 4.6), width_ratios=[1, 1.25] * (2 * COLUMNS))
    for half, split in enumerate(("val", "unseen")):
        samples = labelled(f"tfds:scenes/{split}", model.config.data, ROWS * COLUMNS)
        pictures = [decode(sample.image, max_pixels=10_000) for sample in samples]
        logits = model.logit_scale * model.encode_image(pictures) @ classifier.T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        for i, (sample, picture, share) in enumerate(zip(samples, pictures, shares, strict=True)):
            row, column = divmod(i, COLUMNS)
            show, bars = axes[row, 2 * (half * COLUMNS + column) : 2 * (half * COLUMNS + column) + 2]
            show.imshow(picture)
            best = np.argsort(-share)[:3]
            colors = ["#2a9d5c" if k == sample.label else "#b8bec6" for k in best]
            bars.barh(range(3), share[best], color=colors, height=0.8)
            for y, k in enumerate(best):
                bars.text(0.03, y, f"{CLASS_NAMES[k]} {share[k]:.0%}", va="center", fontsize=7.5)
            bars.set(xlim=(0, 1), ylim=(2.6, -0.6))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    figure.text(0.26, 0.95, "val: new pictures of combinations seen in training", ha="center", fontsize=11)
    figure.text(0.75, 0.95, "unseen: combinations that never occur in training", ha="center", fontsize=11)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.02, wspace=0.06, hspace=0.08)
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
