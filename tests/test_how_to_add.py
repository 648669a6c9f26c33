"""README's "how to add": a tower, a loss option and a task, each added to a copy of the package in few files, and run.

A change is a dict from a file of the package to what is new in it: the text of a new file, or pairs of a pattern and
its replacement.
"""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import clipjax

PACKAGE = pathlib.Path(clipjax.__file__).parent
README = pathlib.Path(__file__).parents[1] / "README.md"

Change = dict[str, str | list[tuple[str, str]]]

TOWER: Change = {
    "config/image.py": [
        (
            r"\n\nImageTower = (.*)\n",
            '''

@dataclass(kw_only=True, slots=True)
class LinearPatchesConfig:
    """A linear map of patches, averaged."""

    KIND: ClassVar[str] = "linear_patches"

    image_size: int = bounded(32, POSITIVE)
    patch_size: int = bounded(8, POSITIVE)
    width: int = bounded(16, POSITIVE)

    def grid(self) -> tuple[int, int]:
        """Return the places before the grid, and its side."""
        return 0, self.image_size // self.patch_size

    def caption_tokens(self, embed_dim: int) -> tuple[int, int]:
        """Return how many tokens a decoder attends to, and their width."""
        return self.grid()[1] ** 2, self.width

    def flops(self, embed_dim: int) -> int:
        """FLOPs of one image."""
        return 2 * self.grid()[1] ** 2 * 3 * self.patch_size**2 * self.width + 2 * self.width * embed_dim

    def num_params(self, embed_dim: int) -> int:
        """Parameters of the tower."""
        return (3 * self.patch_size**2 + embed_dim) * self.width

    def errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields."""
        return [f"{path}.image_size must be a multiple of the patch"] if self.image_size % self.patch_size else []


ImageTower = \\1 | LinearPatchesConfig
''',
        )
    ],
    "config/__init__.py": [
        (r"from clipjax.config.image import ", r"\g<0>LinearPatchesConfig, "),
        (r"__all__ = \[\n", '\\g<0>    "LinearPatchesConfig",\n'),
    ],
    "config/presets.py": [
        (
            r"\n\ndef model\(",
            '\n\nMODELS["Linear/8"] = Preset(ModelConfig(embed_dim=16, image=LinearPatchesConfig()), CLIP)\n\\g<0>',
        ),
        (r"from clipjax.config.image import ", r"\g<0>LinearPatchesConfig, "),
    ],
    "models/towers.py": [
        (
            r"        case ResNetConfig\(\) as tower:\n",
            "        case LinearPatchesConfig() as tower:\n"
            "            return linear_patches.LinearPatches(tower, model, _numerics(model, tower))\n\\g<0>",
        ),
        (r"    \*resnet.RULES,\n", "\\g<0>    *linear_patches.RULES,\n"),
        (r"from clipjax.models import ", r"\g<0>linear_patches, "),
        (r"    ModelConfig,\n", "    LinearPatchesConfig,\n\\g<0>"),
    ],
    "models/linear_patches.py": '''"""A linear map of patches, averaged."""

import flax.linen as nn

from clipjax.config import Projection
from clipjax.models.layers import Linear, torch_uniform, tower_projection
from clipjax.models.vit import patchify

RULES = ((r"image/patches/kernel", (None, None, None, "width")),)


class LinearPatches(nn.Module):
    """Patches, a matrix, their mean, a projection."""

    tower: object
    model: object
    numerics: object

    @nn.compact
    def __call__(self, pixels, *, train=False):
        size, width = self.tower.patch_size, self.tower.width
        init = torch_uniform(3 * size**2)
        x = Linear((size, size, 3), (width,), self.numerics, init, None, name="patches")(patchify(pixels, size))
        return tower_projection(x.mean(1), Projection.LINEAR, width, self.model.embed_dim, self.numerics), x
''',
}

LOSS_OPTION: Change = {
    "config/loss.py": [
        (
            r"    dtype: Dtype",
            "    margin: float = bounded(0.0, AT_LEAST_ZERO, used_by=LossKind.SOFTMAX)\n\\g<0>",
        )
    ],
    "losses/build.py": [
        (r"    rho: float \| None = None,\n", "\\g<0>    margin: float = 0.0,\n"),
        (
            r"    (\w+) = _\w+\(kind, positives, epsilon, distill_weight\)\n",
            "\\g<0>    \\1 = MarginSoftmax(margin) if margin else \\1\n",
        ),
        (r"        rho=config.rho,\n", "\\g<0>        margin=config.margin,\n"),
        (r"from clipjax.losses.partitioning", "from clipjax.losses.margin import MarginSoftmax\n\\g<0>"),
    ],
    "losses/margin.py": '''"""Softmax with a margin."""

from dataclasses import dataclass

from clipjax.losses.softmax import Softmax


@dataclass(frozen=True)
class MarginSoftmax(Softmax):
    """The positive logit must exceed the others by a margin."""

    margin: float

    def finish(self, images, texts, own):
        return super().finish(images, texts, own._replace(positive=own.positive - self.margin))
''',
}

TASK: Change = {
    "config/evaluation.py": [(r'    RETRIEVAL = "retrieval"\n', '\\g<0>    SPREAD = "spread"\n')],
    "evals/spread.py": '''"""How far images lie from each other."""

import numpy as np


class Spread:
    """One less the mean similarity of two images."""

    metrics = ("spread",)

    def check_samples(self, samples, *, is_all):
        """Refuse nothing: pictures are enough."""

    def __call__(self, encoder, batches):
        embed = np.concatenate([encoder.embed_images(batch["image"]) for batch in batches])
        return {"spread": float(1 - np.mean(embed @ embed.T)), "num_examples": float(len(embed))}
''',
    "evals/runner.py": [
        (r"Measure = ", r"\g<0>Spread | "),
        (
            r"        case TaskKind.RETRIEVAL:\n",
            "        case TaskKind.SPREAD:\n            return Spread()\n\\g<0>",
        ),
        (r"from clipjax.evals.zero_shot import", "from clipjax.evals.spread import Spread\n\\g<0>"),
    ],
}

CONFIG = """
from clipjax.config import *

def get_config():
    return Config(
        total_examples=8,
        global_batch_size=4,
        model=ModelConfig(
            embed_dim=16,
            image=LinearPatchesConfig(image_size=16, patch_size=8, width=16),
            text=TextTransformerConfig(context_length=8, vocab_size=260, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
        ),
        loss=LossConfig(margin=100.0),
        data=DataConfig(train="pairs.tar"),
        eval=EvalConfig(
            batch_size=4, every_examples=8, tasks={"val": TaskConfig(kind=TaskKind.SPREAD, source="pairs.tar")}
        ),
        checkpoint=CheckpointConfig(best_metric="val:spread"),
        log=LogConfig(every_examples=4, tensorboard=False),
    )
"""


def apply(change: Change, package: pathlib.Path) -> None:
    """Make a change in a copy of the package; every pattern matches once."""
    for name, edits in change.items():
        path = package / name
        if isinstance(edits, str):
            assert not path.exists()
            path.write_text(edits)
            continue
        text = path.read_text()
        for pattern, replacement in edits:
            assert len(re.findall(pattern, text)) == 1, (name, pattern)
            text = re.sub(pattern, replacement, text)
        path.write_text(text)


def write_pairs(path: pathlib.Path, count: int = 8) -> None:
    """Write a tar of small pictures with captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            picture = io.BytesIO()
            Image.fromarray(pixels[number]).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("txt", f"no {number}".encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.process
def test_a_tower_a_loss_option_and_a_task_touch_few_files_and_work(tmp_path):
    assert (len(TOWER), len(LOSS_OPTION), len(TASK)) == (5, 3, 3)
    package = tmp_path / "clipjax"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for change in (TOWER, LOSS_OPTION, TASK):
        apply(change, package)
    write_pairs(tmp_path / "pairs.tar")
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "clipjax", "train", "--config=config.py", "--workdir=run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())["tasks"]["val"]
    assert 0 < results["spread"] < 2 and results["num_examples"] == 8
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # With a scale of 14.3, a loss without the margin of 100 is at most 28.6 + log 4.
    assert next(line["loss"] for line in lines if "loss" in line) > 60


def test_the_readme_names_the_files_that_an_addition_touches():
    bullets = README.read_text().split("## Layout", 1)[1].split("\n* **")
    for word, change in (("A tower", TOWER), ("A loss option", LOSS_OPTION), ("An evaluation task", TASK)):
        bullet = next(text for text in bullets if text.startswith(word))
        assert [name for name, edits in change.items() if not isinstance(edits, str) and name not in bullet] == []
