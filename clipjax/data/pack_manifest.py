"""The manifest of a folder of packed shards: a line about the whole, and one for each finished shard.

Reading order: `PackedShard`, `manifest_text`, `parse_manifest`.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MANIFEST = "manifest.jsonl"
"""Name of the file."""

FORMATS = {"tar": ".tar", "array_record": ".array_record"}
"""Kinds of shards and the ends of their names."""

MAX_MANIFEST_BYTES = 2**30
"""Larger ones are not read."""


@dataclass(frozen=True)
class PackedShard:
    """A line of the manifest.

    Attributes:
        shard: name of the file.
        samples: in it.
        bytes: of it.
        digest: of all its bytes.
        first: number of its first sample in the source.
        read: samples of the source that it stands for.
        unusable: samples that were left out, by reason.
        renamed: samples that got another key.
    """

    shard: str
    samples: int
    bytes: int
    digest: str
    first: int
    read: int
    unusable: Mapping[str, int]
    renamed: int


def parse_manifest(
    place: pathlib.Path | str, content: bytes | None, about: Mapping[str, Any], size_of: Callable[[str], int | None]
) -> list[PackedShard]:
    """Return the shards of a manifest, up to the first that is not there.

    Args:
        place: of the folder, for messages.
        content: of the manifest; None: there is none.
        about: what its first line has to be.
        size_of: gives the bytes of a file in the folder; None: there is none.

    Raises:
        ValueError: it is of another source, or other choices.
    """
    if content is None:
        return []
    lines = content.splitlines()
    try:
        found_about = json.loads(lines[0]) if lines else None
    except (ValueError, RecursionError):
        found_about = None
    if found_about != about:
        raise ValueError(
            f"--output={place} holds shards of another source, another --format or --samples_per_shard; name an "
            "empty folder, or give what they were made of to go on with them"
        )
    found: list[PackedShard] = []
    for line in lines[1:]:
        try:
            shard = _parse_line(line)
        except (ValueError, TypeError, RecursionError):
            break
        is_next = any(shard.shard == f"{len(found):05d}{ending}" for ending in FORMATS.values())
        if not is_next or size_of(shard.shard) != shard.bytes:
            break
        found.append(shard)
    return found


def _parse_line(line: bytes) -> PackedShard:
    """Return the shard of a line.

    Raises:
        ValueError, TypeError, RecursionError: it is damaged.
    """
    shard = PackedShard(**json.loads(line))
    numbers = (shard.samples, shard.bytes, shard.first, shard.read, shard.renamed)
    if not isinstance(shard.unusable, dict) or any(
        type(number) is not int or number < 0 for number in (*numbers, *shard.unusable.values())
    ):
        raise ValueError("numbers are missing")
    return shard


def manifest_text(about: Mapping[str, Any], shards: Sequence[PackedShard]) -> str:
    """Return the content of a manifest, which `parse_manifest` reads."""
    return "".join([f"{json.dumps(about)}\n", *map(manifest_line, shards)])


def manifest_line(shard: PackedShard) -> str:
    """Return the line of a shard, with its end."""
    return f"{json.dumps(asdict(shard))}\n"
