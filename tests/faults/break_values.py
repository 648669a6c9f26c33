"""Ways to break bytes and JSON values, from a seed."""

import random
from typing import Any


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    """Flip a few bits."""
    broken = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return content[: rng.randrange(len(content))]


def remove(content: bytes, rng: random.Random) -> bytes:
    """Remove a part in the middle."""
    first = rng.randrange(len(content))
    return content[:first] + content[first + rng.randint(1, 600) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Insert random bytes, or zeros."""
    first, length = rng.randrange(len(content)), rng.randint(1, 600)
    return content[:first] + (rng.randbytes(length) if rng.random() < 0.5 else bytes(length)) + content[first:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """Overwrite a part with bytes that numbers and texts end at."""
    first = rng.randrange(len(content))
    special = rng.choice(
        (b"\xff" * 8, b"\0" * 8, b"7" * 11, b"-1", b"\x80" + b"\xff" * 11, b"1e999", b"NaN", b"\x1b[2J")
    )
    return content[:first] + special + content[first + len(special) :]


def join(content: bytes, rng: random.Random) -> bytes:
    """Repeat a part of it at another place."""
    first, second = rng.randrange(len(content)), rng.randrange(len(content))
    return content[:second] + content[first : first + 1024] + content[second:]


PRIMITIVES = (flip_bits, cut, remove, insert, overwrite, join)


def break_bytes(content: bytes, rng: random.Random) -> bytes:
    """Break bytes in one to three ways."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(PRIMITIVES)(content, rng) or b"\0"
    return content


def break_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Replace, remove or add one value somewhere in a JSON value."""
    odd = [
        None,
        True,
        -1,
        0,
        2**80,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        {},
        [[]],
        {"": 0},
        "\x1b[2J",
        "NaN",
    ]
    if (depth and rng.random() < 0.15) or not isinstance(value, dict | list) or not value:
        return rng.choice(odd)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    match rng.randrange(6):
        case 0 if isinstance(copy, dict):
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[rng.choice(("__class__", "", "seed ", "x.y", key.upper() if isinstance(key, str) else "k"))] = (
                rng.choice(odd)
            )
        case _:
            copy[key] = break_value(copy[key], rng, depth + 1)
    return copy
