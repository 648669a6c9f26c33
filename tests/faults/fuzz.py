"""Hostile inputs from a seed: tars, pictures, JSON of samples, records of checkpoints, overrides of a config.

Each fuzzer takes bytes or values that are right, breaks them (`break_values.py`), and reads them as clipjax does. Only
the errors that the reader promises may come out; anything else is a finding. `FUZZERS` are the readers.
"""

import io
import json
import pathlib
import random
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, features

from clipjax.checkpoints.manifest import UnusableCheckpoint
from clipjax.config import Config, DataConfig
from clipjax.data.images import decode
from clipjax.data.index_store import FOLDER
from clipjax.data.sample import BadSample
from clipjax.data.webdataset import TarSource
from tests.faults import fuzz_records, fuzz_sources
from tests.faults.break_values import break_bytes

SLOW_SECONDS = 5.0
_MAX_PIXELS = 2**20


@dataclass
class Findings:
    """Outcomes of a fuzzer.

    Attributes:
        tries: how many inputs were read.
        outcomes: number of each outcome: "read", or the promised refusal.
        wrong: everything that was not promised, with the number that draws the input again.
    """

    tries: int = 0
    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"tries": self.tries, "outcomes": dict(self.outcomes), "wrong": self.wrong}


_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("RGB", "L", "P"),
    "BMP": ("RGB", "L", "P", "RGBA"),
    "TIFF": ("RGB", "L", "RGBA", "P", "I;16", "CMYK"),
    "AVIF": ("RGB", "RGBA"),
}
_KINDS = tuple(kind for kind in _MODES if kind != "AVIF" or features.check("avif"))
_TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "packbits")


def _picture(rng: random.Random, kind: str) -> bytes:
    size = rng.randint(1, 40), rng.randint(1, 40)
    mode = rng.choice(_MODES[kind])
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    image = (
        Image.fromarray(pixels).convert("L").convert("I;16")
        if mode == "I;16"
        else Image.frombytes("CMYK", size, pixels.tobytes())
        if mode == "CMYK"
        else Image.fromarray(pixels).convert(mode)
    )
    content = io.BytesIO()
    image.save(content, kind, **({"compression": rng.choice(_TIFF_COMPRESSIONS)} if kind == "TIFF" else {}))
    return content.getvalue()


def _tar(rng: random.Random) -> bytes:
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as tar:
        for i in range(rng.randint(1, 5)):
            name = f"{i:04d}" + "long" * rng.choice((0, 0, 40))
            members = [
                ("jpg", _picture(rng, "JPEG")),
                ("txt", b"a caption"),
                ("json", b'{"caption": "c", "label": 3}'),
                ("cls", b"7"),
            ]
            for extension, data in rng.sample(members, rng.randint(1, 4)):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def read_tar(content: bytes, folder: pathlib.Path) -> str:
    """Read a shard in a folder of its own."""
    path = folder / "fuzzed.tar"
    path.write_bytes(content)
    source = TarSource([str(path)], max_caption_bytes=DataConfig().max_caption_bytes, max_image_pixels=_MAX_PIXELS)
    outcome = "read"
    for index in range(len(source)):
        source.location(index).encode()
        try:
            sample = source[index]
            decode(sample.image, max_pixels=_MAX_PIXELS)
        except BadSample as bad:
            outcome = f"left out: {bad.reason}"
    assert {each.name for each in folder.iterdir()} == {path.name, FOLDER}, "another file was written than the index"
    return outcome


def _break_tar(rng: random.Random, folder: pathlib.Path) -> str:
    return read_tar(break_bytes(_tar(rng), rng), folder)


def read_picture(content: bytes, folder: pathlib.Path) -> str:
    """Decode a picture."""
    pixels = decode(content, max_pixels=_MAX_PIXELS, background=(9, 9, 9), exif_orientation=True)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, pixels.shape
    return "read"


def _break_picture(rng: random.Random, folder: pathlib.Path) -> str:
    return read_picture(break_bytes(_picture(rng, rng.choice(_KINDS)), rng), folder)


def _hostile_json(rng: random.Random) -> bytes:
    values: list[Any] = [
        "a caption",
        3,
        -1,
        2**70,
        1.5,
        None,
        True,
        [],
        {},
        ["x"],
        {"caption": "y"},
        "\ud800",
        "\0",
        "x" * 70_000,
    ]
    text = json.dumps({rng.choice(("caption", "captions", "label", "url", "")): rng.choice(values) for _ in range(3)})
    odd = (
        "[" * 100_000,
        '{"label": ' + "9" * 5_000 + "}",
        '{"caption": NaN}',
        '{"label": 1e400}',
        "\ufeff{}",
        "[]",
        "",
    )
    return text.encode() if rng.random() < 0.5 else rng.choice(odd).encode()


def _break_json(rng: random.Random, folder: pathlib.Path) -> str:
    content = _hostile_json(rng)
    return read_json(break_bytes(content or b"{}", rng) if rng.random() < 0.5 else content, folder)


def read_json(content: bytes, folder: pathlib.Path) -> str:
    """Read a sample whose captions and label are in JSON."""
    path = folder / "json.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", b"not decoded here"), ("a.json", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sample = TarSource([str(path)], max_caption_bytes=65_536, max_image_pixels=_MAX_PIXELS)[0]
    assert all(isinstance(caption, str) and caption.encode() for caption in sample.captions)
    assert -1 <= sample.label < 2**31
    return "read"


def _read_override(rng: random.Random, folder: pathlib.Path) -> str:
    from clipjax.cli.overrides import override, split_overrides

    names = (
        "seed",
        "optim.learning_rate",
        "model.image.width",
        "data.train",
        "mesh.data",
        "eval.tasks",
        "eval.tasks.a.source",
        "optim.freeze",
        "x",
        "",
    )
    name = rng.choice(names)
    values = (
        "1",
        "-1",
        "1e999",
        "nan",
        "None",
        "True",
        "[1,2]",
        "('a',)",
        "{}",
        "__import__('os')",
        "'",
        '"',
        "\0",
        "\x1b[2J",
        "9" * 5000,
        "(" * 300,
        "a=b",
        "",
    )
    text = f"--config.{name}={rng.choice(values)}"
    if rng.random() < 0.3:
        text = break_bytes(text.encode(), rng).decode("utf-8", "surrogateescape")
    overrides, rest = split_overrides([text])
    if rest:
        return "not an override"
    override(Config(), overrides)
    return "read"


FUZZERS: dict[str, tuple[Callable[[random.Random, pathlib.Path], str], type[Exception]]] = {
    "tar": (_break_tar, ValueError),
    "picture": (_break_picture, BadSample),
    "Parquet": (fuzz_sources.read_parquet, ValueError),
    "table": (fuzz_sources.read_table, ValueError),
    "ArrayRecord": (fuzz_sources.read_array_records, ValueError),
    "JSON of a sample": (_break_json, ValueError),
    "config record of a checkpoint": (fuzz_records.read_config, ValueError),
    "data record of a checkpoint": (fuzz_records.read_data, ValueError),
    "manifest of a checkpoint": (fuzz_records.read_manifest, UnusableCheckpoint),
    "records of a workdir": (fuzz_records.read_workdir, ValueError),
    "config override": (_read_override, ValueError),
}


def fuzz(name: str, *, first: int, count: int) -> Findings:
    """Read so many broken inputs of a kind; input i is drawn from the seed i alone."""
    read, promised = FUZZERS[name]
    found = Findings()
    with tempfile.TemporaryDirectory() as place:
        for seed in range(first, first + count):
            folder = pathlib.Path(place) / "inside"
            folder.mkdir(exist_ok=True)
            start = time.perf_counter()
            try:
                outcome = read(random.Random(f"{name} {seed}"), folder)
            except promised as error:
                outcome = getattr(error, "reason", type(error).__name__)
            except Exception as error:
                outcome = f"{type(error).__name__}"
                found.wrong.append(f"{name} {seed}: {error!r}")
            if time.perf_counter() - start > SLOW_SECONDS:
                found.wrong.append(f"{name} {seed}: took {time.perf_counter() - start:.1f} s")
            found.tries += 1
            found.outcomes[outcome] += 1
    return found
