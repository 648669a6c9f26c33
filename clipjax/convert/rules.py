"""Tables of weights, and their application in both directions.

A rule pairs some of the peer's arrays with some of ours, and arranges their axes by an einops pattern. Where a name
holds `{layer}`, all layers are stacked along a leading axis `l`; where a side has several names, they are stacked along
an axis of its own. A pattern only rearranges, so every rule works backwards too, and no bit changes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from einops import rearrange

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes of peers' weights; float32 holds all of them exactly."""


@dataclass(frozen=True)
class Rule:
    """A pairing of some of the peer's arrays with the arrays of ours that hold the same numbers.

    Attributes:
        theirs: names, with `{layer}` where every layer has such an array.
        ours: paths.
        pattern: einops, from theirs (layers, several names, then their own axes) to ours (several names first).
        layers: numbers of the layers.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    pattern: str
    layers: Sequence[int] = ()

    def their_names(self) -> list[list[str]]:
        """List the names by layer (one entry where there are no layers), then by part."""
        if not self.layers:
            return [list(self.theirs)]
        return [[name.format(layer=layer) for name in self.theirs] for layer in self.layers]


@dataclass(frozen=True)
class Table:
    """All rules of one model of one peer.

    Attributes:
        rules: pairings of arrays.
        sizes: of axes that patterns split, such as heads `n`.
        ignored: peer's names that hold nothing to keep, with what to write there on the way out (None: nothing).
    """

    rules: Sequence[Rule]
    sizes: Mapping[str, int]
    ignored: Mapping[str, Callable[[], np.ndarray] | None] = field(default_factory=dict)


def rule(theirs: str | Iterable[str], ours: str | Iterable[str], pattern: str, layers: Sequence[int] = ()) -> Rule:
    """Make a rule; a single name needs no tuple."""
    theirs, ours = ((side,) if isinstance(side, str) else tuple(side) for side in (theirs, ours))
    return Rule(theirs, ours, pattern, layers)


def norm(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    """Make the rules of a LayerNorm."""
    lead = "l " if layers else ""
    return [
        rule(f"{theirs}.{name}", f"{ours}/{mine}", f"{lead}w -> {lead}w", layers)
        for name, mine in (("weight", "scale"), ("bias", "bias"))
    ]


def linear(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    """Make the rules of a linear layer: PyTorch's [out, in] to [in, out]."""
    lead = "l " if layers else ""
    return [
        rule(f"{theirs}.weight", f"{ours}/kernel", f"{lead}o i -> {lead}i o", layers),
        rule(f"{theirs}.bias", f"{ours}/bias", f"{lead}o -> {lead}o", layers),
    ]


def heads_out(theirs: str, ours: str, n: str, layers: Sequence[int] = ()) -> list[Rule]:
    """Make the rules of an attention's output projection; `n` is its heads' axis."""
    lead = "l " if layers else ""
    return [
        rule(f"{theirs}.weight", f"{ours}/kernel", f"{lead}w ({n} d) -> {lead}{n} d w", layers),
        rule(f"{theirs}.bias", f"{ours}/bias", f"{lead}w -> {lead}w", layers),
    ]


def attention(theirs: str, ours: str, n: str, layers: Sequence[int] = ()) -> list[Rule]:
    """Make the rules of PyTorch's `MultiheadAttention`, whose query, key and value are one; `n` is its heads' axis."""
    lead = "l " if layers else ""
    return [
        rule(
            f"{theirs}.in_proj_weight",
            [f"{ours}/{name}/kernel" for name in "qkv"],
            f"{lead}(three {n} d) w -> three {lead}w {n} d",
            layers,
        ),
        attention_bias(theirs, ours, n, layers),
        *heads_out(f"{theirs}.out_proj", f"{ours}/out", n, layers),
    ]


def attention_bias(theirs: str, ours: str, n: str, layers: Sequence[int] = ()) -> Rule:
    """Make the rule of the biases of its queries, keys and values."""
    lead = "l " if layers else ""
    biases = [f"{ours}/{name}/bias" for name in "qkv"]
    return rule(f"{theirs}.in_proj_bias", biases, f"{lead}(three {n} d) -> three {lead}{n} d", layers)


def to_ours(table: Table, weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return our arrays by path, all float32.

    Args:
        table: the peer's.
        weights: the peer's arrays by name.
        shapes: of our arrays by path; exactly these come out.

    Raises:
        ValueError: everything that is missing, left over, misshapen, not finite or of a strange dtype, a line each.
    """
    errors, ours, used = [], {}, set()
    for item in table.rules:
        names = item.their_names()
        used |= {name for layer in names for name in layer}
        found = _gather(weights, item)
        errors += found.errors
        if found.arrays is None:
            continue
        try:
            arranged = rearrange(found.arrays, item.pattern, **_sizes(item.pattern, table))
        except Exception as error:  # einops raises its own kind, with the shape and the pattern in its text
            errors.append(f"{names[0][0]}: shape {weights[names[0][0]].shape} does not fit: {_first_line(error)}")
            continue
        parts = [arranged] if len(item.ours) == 1 else list(arranged)
        for path, array in zip(item.ours, parts, strict=True):
            ours[path] = np.array(array, order="C")
            if shapes.get(path) != array.shape:
                errors.append(f"{names[0][0]}: {path} would have shape {array.shape}, but needs {shapes.get(path)}")
    errors += [f"{name}: no rule for it" for name in sorted(weights.keys() - used - table.ignored.keys())]
    covered = {path for item in table.rules for path in item.ours}
    errors += [f"{path}: no rule gives it" for path in sorted(shapes.keys() - covered)]
    if errors:
        raise ValueError("\n".join(errors))
    return ours


def to_theirs(table: Table, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the peer's arrays by name.

    Raises:
        ValueError: arrays of ours that no rule takes, all of them.
    """
    covered = {path for item in table.rules for path in item.ours}
    if left := sorted(ours.keys() - covered):
        raise ValueError("\n".join(f"{path}: the other format has no place for it" for path in left))
    theirs: dict[str, np.ndarray] = {}
    for item in table.rules:
        before, after = (side.strip() for side in item.pattern.split("->"))
        arrays = [ours[path] for path in item.ours]
        whole = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        whole = rearrange(whole, f"{after} -> {before}")
        by_layer = list(whole) if item.layers else [whole]
        for names, layer in zip(item.their_names(), by_layer, strict=True):
            parts = [layer] if len(names) == 1 else list(layer)
            theirs |= {name: np.array(part, order="C") for name, part in zip(names, parts, strict=True)}
    for name, make in table.ignored.items():
        if make is not None:
            theirs[name] = make()
    return theirs


@dataclass(frozen=True)
class _Found:
    arrays: np.ndarray | None
    errors: list[str]


def _gather(weights: Mapping[str, np.ndarray], item: Rule) -> _Found:
    """Stack the arrays of a rule by layer and part as float32, or return what is wrong with them."""
    errors, rows = [], []
    for layer in item.their_names():
        row = []
        for name in layer:
            if name not in weights:
                errors.append(f"{name}: missing")
                continue
            array = weights[name]
            if array.dtype.name not in FLOATS:
                errors.append(f"{name}: dtype {array.dtype.name} must be one of {', '.join(FLOATS)}")
                continue
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                errors.append(f"{name}: holds NaN or infinity")
            row.append(array)
        rows.append(row)
    if not errors:
        named = [
            (name, array.shape)
            for layer, row in zip(item.their_names(), rows, strict=True)
            for name, array in zip(layer, row, strict=True)
        ]
        usual = Counter(shape for _, shape in named).most_common(1)[0][0]
        errors += [f"{name}: shape {shape}, where others have {usual}" for name, shape in named if shape != usual]
    if errors:
        return _Found(None, errors)
    layers = [row[0] if len(row) == 1 else np.stack(row) for row in rows]
    return _Found(np.stack(layers) if item.layers else layers[0], [])


def _sizes(pattern: str, table: Table) -> dict[str, int]:
    axes = pattern.replace("(", " ").replace(")", " ").split()
    return {name: size for name, size in table.sizes.items() if name in axes}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
