"""Traffic of the loss between devices and memory on each, read from the compiled program; nothing is run.

    python -m benchmarks.collectives --devices 8 64 256 --output=benchmarks/results/collectives.json
    python -m benchmarks.collectives --tpu v5e:8x8 v5p:4x8x8 v5e:16x16*2     # needs libtpu, but no TPU; *2: two slices

Forward and backward together, 128 pairs a device. Devices are simulated on the CPU, or compiled for ahead of time.
Numbers are counted, not bytes: of a gather, what a device receives; of an all-reduce, its operand (which moves about
twice); of a permute, what is passed on. A loop's body counts as often as it runs.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
PAIRS_PER_DEVICE, EMBED = 128, 512


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: one of `KINDS`.
        numbers: how many it moves, each time.
        times: how often it runs.
        between: whether it joins devices of different slices. A TPU program that passes numbers on to another slice
            has a `send` there.
    """

    kind: str
    numbers: int
    times: int
    between: bool


_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)(.*)")
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


def collectives(text: str, slice_devices: int | None = None) -> list[Collective]:
    """Those of an optimized HLO module.

    Args:
        text: `compiled.as_text()`.
        slice_devices: devices of a slice, numbered one after the other; None: there are no slices.
    """
    bodies = _computations(text)
    runs = _runs(bodies)
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    num_devices = int(partitions.group(1)) if partitions else 1
    found = []
    for name, body in bodies.items():
        for line in body.splitlines():
            match = _INSTRUCTION.match(line)
            if match:
                result, kind = match.groups()
                if "-start(" in line:  # (operand, result, ...)
                    result = result[result.rindex("(") if result.startswith("((") else 0 :]
                    shapes = _SHAPE.findall(result)
                    shapes = shapes[: max(1, len(shapes) // 2)] if kind == "all-reduce" else shapes[1:2]
                else:
                    shapes = _SHAPE.findall(result)
                numbers = sum(map(_size, shapes))
                if kind == "send":
                    found.append(Collective(kind, _size(shapes[0]), runs[name], True))
                    continue
                groups = _groups(line, num_devices)
                if kind == "all-gather":
                    numbers -= numbers // len(groups[0])  # what was there already
                found.append(Collective(kind, numbers, runs[name], _cross(groups, slice_devices)))
    return found


def _size(shape: str) -> int:
    return math.prod(int(length) for length in shape.split(",") if length)


def _computations(text: str) -> dict[str, str]:
    """Bodies by name."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _runs(bodies: dict[str, str]) -> dict[str, int]:
    """How often each computation runs. Only loops repeat; their trip count is known to the compiler."""
    runs = dict.fromkeys(bodies, 1)
    loops = []
    for name, body in bodies.items():
        for condition, inside, rest in _WHILE.findall(body):
            known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', rest)
            bounds = re.findall(r"constant\((\d+)\)", bodies[condition])
            loops.append((name, inside, int(known.group(1)) if known else max(map(int, bounds))))
    for _ in loops:  # deep enough for any nesting
        for outer, inside, count in loops:
            runs[inside] = runs[outer] * count
    return runs


def _cross(groups: list[list[int]], slice_devices: int | None) -> bool:
    """Whether a group of devices, or a pair of source and target, reaches over slices."""
    return slice_devices is not None and any(len({device // slice_devices for device in group}) > 1 for group in groups)


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """Groups of devices, or pairs of source and target."""
    from clipjax.planning.hlo import Instruction
    from clipjax.planning.traffic import replica_groups

    groups = replica_groups(Instruction("", "", "", (), line, ""), num_devices)
    if groups is not None:
        return groups.tolist()
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line)
    if pairs is None:
        raise ValueError(f"pairs are not understood: {line[:300]}")
    return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))]


def total(found: Sequence[Collective], kind: str, *, between: bool | None = None) -> int:
    """Numbers that all collectives of a kind move, inside slices or between them (None: both)."""
    return sum(c.numbers * c.times for c in found if c.kind == kind and between in (None, c.between))


def compile_loss(mesh: Any, *, pairs: int, embed: int = EMBED, **options: Any) -> Any:
    """Loss and gradients for a mesh, compiled; `options` of `make_loss`."""
    import jax
    import jax.numpy as jnp

    from clipjax.losses import make_loss
    from clipjax.runtime.sharding import batch_sharding, replicated

    loss = jax.value_and_grad(make_loss(mesh=mesh, **options), argnums=(0, 1, 2), has_aux=True)
    rows = jax.ShapeDtypeStruct((pairs, embed), jnp.float32, sharding=batch_sharding(mesh))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    # Without this a TPU's one gather shows as several instructions inside fusions.
    plain = {"xla_tpu_enable_async_collective_fusion": "false"} if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(loss).lower(rows, rows, scale).compile(compiler_options=plain)


def measure(mesh: Any, method: str, slices: int) -> dict[str, Any]:
    """One row of the table."""
    devices = mesh.devices.size
    pairs = PAIRS_PER_DEVICE * devices
    compiled = compile_loss(mesh, pairs=pairs, method=method)
    found = collectives(compiled.as_text(), devices // slices if slices > 1 else None)
    inside, between = ({kind: total(found, kind, between=far) for kind in KINDS} for far in (False, True))
    return {
        "method": method,
        "devices": devices,
        "slices": slices,
        "pairs": pairs,
        "embed": EMBED,
        "inside": {kind: count for kind, count in inside.items() if count},
        "between": {kind: count for kind, count in between.items() if count},
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": [dataclasses.asdict(c) for c in found],
    }


def describe(row: dict[str, Any]) -> str:
    """One line; what moves in multiples of n e, the size of all embeddings of one kind."""
    size = row["pairs"] * row["embed"]
    moved = [
        f"{kind}{where} {count / size:.4f} n e"
        for where, part in (("", row["inside"]), (" between slices", row["between"]))
        for kind, count in part.items()
    ]
    slices = f" in {row['slices']} slices" if row["slices"] > 1 else ""
    way = f"{row['devices']:4} devices{slices} {row['method']:8}"
    return f"{way} {row['temporary_bytes'] / 2**20:7.1f} MiB  {', '.join(moved)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 64, 256], help="simulated on the CPU")
    parser.add_argument("--tpu", nargs="*", default=[], help="topologies such as v5e:16x16, or v5e:16x16*2: two slices")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max([1, *arguments.devices])}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from clipjax.config import MeshConfig
    from clipjax.runtime.sharding import make_mesh

    rows = []

    def add(mesh: Any, method: str, slices: int, target: str) -> None:
        row = {"target": target, **measure(mesh, method, slices)}
        rows.append(row)
        print(f"{target:12} {describe(row)}", flush=True)

    for devices in arguments.devices:
        for method, slices in (("gathered", 1), ("gathered", 2), ("ring", 1)):
            add(make_mesh(MeshConfig(slice=slices), jax.devices()[:devices]), method, slices, "cpu")
    for topology in arguments.tpu:
        from jax.experimental import topologies

        name, _, slices = topology.partition("*")
        slices = int(slices or 1)
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices)
        for method in ("gathered", "ring")[: 2 if slices == 1 else 1]:
            add(make_mesh(MeshConfig(slice=slices), described.devices), method, slices, topology)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "pairs_per_device": PAIRS_PER_DEVICE}
        arguments.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
