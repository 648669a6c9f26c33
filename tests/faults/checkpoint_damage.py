"""Damage to a checkpoint, from a seed: one bit, a cut, a missing file, two files swapped, a manifest that lies.

Each fault breaks a step directory in place and says what it broke; `damage_run` breaks a copy of a checkpoint in many
ways, one at a time, and collects those that were not noticed.
"""

import json
import os
import pathlib
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from clipjax.checkpoints import manifest
from clipjax.checkpoints.folder import GOOD
from clipjax.checkpoints.manifest import examine
from clipjax.checkpoints.saving import array_handler


@dataclass
class Damage:
    """Outcomes of many damages.

    Attributes:
        tries: how many.
        faults: number of tries of each fault.
        wrong: what was not noticed, with the number that draws it again.
    """

    tries: int = 0
    faults: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"tries": self.tries, "outcomes": dict(self.faults), "wrong": self.wrong}


def flip_bit(step: pathlib.Path, rng: random.Random) -> str:
    """Flip one bit of any file that is not empty."""
    path = rng.choice([each for each in files(step) if each.stat().st_size])
    content = bytearray(path.read_bytes())
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {position} in {path.relative_to(step)}"


def truncate(step: pathlib.Path, rng: random.Random) -> str:
    """Cut the end off a file, or all of it."""
    path = rng.choice([each for each in files(step) if each.stat().st_size])
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.relative_to(step)} cut to {size} bytes"


def grow(step: pathlib.Path, rng: random.Random) -> str:
    """Add a byte to a file."""
    path = rng.choice(files(step))
    with path.open("ab") as file:
        file.write(b"\0")
    return f"a byte more in {path.relative_to(step)}"


def remove(step: pathlib.Path, rng: random.Random) -> str:
    """Remove a file."""
    path = rng.choice(files(step))
    path.unlink()
    return f"{path.relative_to(step)} is gone"


def swap(step: pathlib.Path, rng: random.Random) -> str:
    """Swap the contents of two files that differ."""
    one, other = rng.sample(files(step), 2)
    while one.read_bytes() == other.read_bytes():
        one, other = rng.sample(files(step), 2)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    return f"{one.relative_to(step)} and {other.relative_to(step)} swapped"


def overwrite(step: pathlib.Path, rng: random.Random) -> str:
    """Write noise over a block of a file; its size stays, as after a write that a disk has lost."""
    path = rng.choice([each for each in files(step) if each.stat().st_size > 1])
    content = path.read_bytes()
    start = rng.randrange(len(content))
    noise = bytes(255 - each for each in content[start : start + 4096])
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])
    return f"{len(noise)} bytes from {start} in {path.relative_to(step)}"


def forget_file(step: pathlib.Path, rng: random.Random) -> str:
    """Take a file out of the manifest, which otherwise stays as it is."""
    path = step / manifest.FILE
    record = json.loads(path.read_text())
    name = rng.choice(sorted(record["files"]))
    del record["files"][name]
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    return f"{name} is not in the manifest"


FAULTS: dict[str, Callable[[pathlib.Path, random.Random], str]] = {
    "a bit flipped": flip_bit,
    "a file cut": truncate,
    "a file grown": grow,
    "a file missing": remove,
    "two files swapped": swap,
    "a block lost": overwrite,
    "the manifest lies": forget_file,
}


def files(step: pathlib.Path) -> list[pathlib.Path]:
    """Return all files of a step directory that a save wrote: all but the mark of a good step."""
    return [step / path for path in manifest.list_files(step) if path != GOOD]


def damage_run(step: pathlib.Path, folder: pathlib.Path, *, first: int, count: int) -> Damage:
    """Damage a copy of a step directory again and again, and let it be examined.

    Args:
        step: a directory that is complete; it stays as it is.
        folder: for the copy.
        first: number that the first damage is drawn from.
        count: how many.
    """
    found, copy = Damage(), folder / step.name
    shutil.copytree(step, copy)
    whole = {path: path.read_bytes() for path in files(copy)}
    for seed in range(first, first + count):
        rng = random.Random(seed)
        name = rng.choice((*FAULTS, "a bit flipped"))
        what = FAULTS[name](copy, rng)
        verdict = examine(copy)
        if verdict.usable or not verdict.fault:
            found.wrong.append(f"seed {seed}: {what}: {verdict.state}")
        found.tries += 1
        found.faults[name] += 1
        for path, content in whole.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
    return found


def spoil(step: pathlib.Path) -> None:
    """Make an array of the parameters, and of their average, NaN in a checkpoint, and write the manifest that fits."""
    for group in ("params", "ema"):
        with warnings.catch_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            warnings.simplefilter("ignore")  # where the arrays lay is of no interest
            tree = reader.restore((step / group).absolute())
        leaves, structure = jax.tree.flatten(tree)
        leaves[0] = np.full_like(leaves[0], np.nan)
        shutil.rmtree(step / group)
        with ocp.Checkpointer(array_handler()) as writer:
            writer.save((step / group).absolute(), args=ocp.args.StandardSave(jax.tree.unflatten(structure, leaves)))
    files = [path for path in manifest.list_files(step) if path != manifest.FILE]
    manifest.write(step, manifest.Manifest(int(step.name), None, manifest.hash_files(step, files)))
