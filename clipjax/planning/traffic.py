"""Collectives of a compiled step: axes, bytes, and overlap with computation.

Bytes are those that one chip has to send in one step, whatever the algorithm: (n - 1) / n of the result of an
all-gather over n chips, as much of the input of a reduce-scatter, twice that of an all-reduce, all of a permutation.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from clipjax.config import Config, Dtype, TextTransformerConfig, ViTConfig
from clipjax.planning.hlo import HloModule, Instruction, arrays_of, bytes_of
from clipjax.runtime.chips import Chip, Tpu
from clipjax.runtime.sharding import hardware_slices

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_SLICES = ("send", "recv")
_STARTS = "AsyncCollectiveStart"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes.

    Attributes:
        kind: "all-gather", ...; "send" between slices.
        axis: mesh axes along which it runs, joined by "+"; "part of NAME" where it runs along part of one.
        bytes: sent by one chip in a step.
        count: runs in a step.
        overlapped: true if the program computes while they run.
        seconds: the least that the links need.
    """

    kind: str
    axis: str
    bytes: int
    count: int
    overlapped: bool
    seconds: float


def collectives(program: HloModule, mesh: Any, chip: Chip) -> list[Collective]:
    """List the collectives of a compiled step, the largest first.

    Args:
        program: the compiled step, parsed.
        mesh: of the compilation; positions in it are the chips' numbers in the text.
        chip: one of the mesh's.
    """
    sums: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for kind, instruction, times, overlapped in _found(program):
        if kind in _SLICES:
            if kind == "recv":  # the other end of a send
                continue
            size = sum(bytes_of(program.shape(name)) for name in instruction.operands[:1])
            moved, groups = _sent_to_slices(instruction, size, mesh.shape["slice"]), None
        else:
            groups = replica_groups(instruction, mesh.devices.size)
            moved = _sent(kind, _whole_bytes(kind, instruction, program), groups.shape[1] if groups is not None else 2)
        axis, seconds = _route(groups, mesh, chip, moved, kind)
        total = sums[kind, axis, overlapped]
        total[0] += times * moved
        total[1] += times
        total[2] += times * seconds
    found = [
        Collective(kind, axis, int(moved), int(count), overlapped, seconds)
        for (kind, axis, overlapped), (moved, count, seconds) in sums.items()
        if moved
    ]
    return sorted(found, key=lambda collective: -collective.bytes)


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _found(program: HloModule) -> list[tuple[str, Instruction, int, bool]]:
    """List every collective once: kind, instruction, number of runs, and true if computation hides it.

    The TPU compiler spreads a hidden collective over several fusions, which repeat its instruction: the fusion that
    starts it counts. A fusion of a collective that nothing has started runs by itself: the compiler writes a
    reduce-scatter so, as an all-reduce of which each chip keeps its part.
    """
    found, parts, hidden = [], [], program.overlapped()
    for instruction, times in program.executed():
        kind = _kind(instruction)
        if kind in KINDS or kind in _SLICES:
            found.append((kind, instruction, times, instruction.name in hidden))
        elif instruction.opcode == "fusion":
            fused = list(program.fused_instructions(instruction))
            starts = any(_STARTS in part.attributes for part in fused)
            parts += [(instruction, part, times, starts) for part in fused if _kind(part) in KINDS]
    started = {_identity(part) for _, part, _, starts in parts if starts}
    for fusion, part, times, starts in parts:
        if starts or _identity(part) not in started:
            scatters = _kind(part) == "all-reduce" and bytes_of(fusion.shape) < bytes_of(part.shape)
            found.append(("reduce-scatter" if scatters else _kind(part), part, times, starts))
    return found


def _identity(collective: Instruction) -> tuple[str, str]:
    """Identify a collective that is written several times; different ones may share a channel, so shapes count too."""
    return collective.attribute(r"channel_id=(\d+)"), str(arrays_of(collective.shape))


def _whole_bytes(kind: str, instruction: Instruction, program: HloModule) -> int:
    """Count the bytes of an all-gather's result, or of another collective's operands."""
    if kind == "all-gather":
        shape = instruction.shape
        if instruction.opcode.endswith("-start"):  # (inputs, results)
            arrays = arrays_of(shape)
            half = len(arrays) // 2
            shape = " ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in arrays[half : 2 * half])
        return bytes_of(shape)
    return sum(bytes_of(program.shape(name)) for name in instruction.operands)


def _sent(kind: str, size: int, n: int) -> int:
    match kind:
        case "all-reduce":
            return 2 * size * (n - 1) // n
        case "all-gather" | "reduce-scatter" | "all-to-all":
            return size * (n - 1) // n
        case _:
            return size


def _sent_to_slices(send: Instruction, size: int, n: int) -> int:
    """Count the bytes that a chip sends for a send between slices, which stands for the whole collective."""
    match send.attribute(r'_xla_megascale_transfer_type="(\w+)"'):
        case "ALL_REDUCE":
            return _sent("all-reduce", size, n)
        case "ALL_GATHER":
            return _sent("all-gather", n * size, n)
        case "REDUCE_SCATTER" | "ALL_TO_ALL":
            return _sent("all-to-all", size, n)
        case _:
            return size


def replica_groups(instruction: Instruction, num_devices: int) -> np.ndarray | None:
    """Parse the groups of chips that take part together, [groups, chips of each]; None for a permutation.

    The text is a list, or an iota that is reshaped and transposed, or axes of a mesh that is an iota.

    Raises:
        ValueError: the text is in none of these forms.
    """
    text = instruction.attributes
    if "source_target_pairs" in text:
        return None
    written = re.search(r"replica_groups=(.*)", text)
    if written is None or written[1].startswith("{}"):
        return np.arange(num_devices)[None]
    if iota := re.match(r"\[([\d,]+)\]<=" + _IOTA, written[1]):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", written[1]):
        return np.asarray([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", listed[1])])
    if named := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", written[1]):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        along = re.findall(r"'([^']+)'(?!:)", named[4])
        order = _iota(named[2], named[3]) if named[2] else np.arange(num_devices)
        if len(along) == named[4].count("'") // 2:
            others = [place for place, name in enumerate(sizes) if name not in along]
            own = [place for place, name in enumerate(sizes) if name in along]
            grid = order.reshape(tuple(sizes.values())).transpose([*others, *own])
            return grid.reshape(-1, math.prod(sizes[name] for name in along))
    raise ValueError(f"replica groups in a form that is not known: {written[0][:200]}")


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    """Return 0, 1, 2, ... in this shape, transposed and flattened."""
    order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (order.transpose(_numbers(transposed)) if transposed else order).reshape(-1)


def _route(groups: np.ndarray | None, mesh: Any, chip: Chip, moved: int, kind: str) -> tuple[str, float]:
    """Return the names of the axes, and the least seconds that the links need."""
    if kind in _SLICES:
        return "slice", moved / chip.network_bandwidth
    if groups is None:
        return "neighbours", moved / chip.link_bandwidth
    group = groups[0]
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    names = []
    for name, along, size in zip(mesh.axis_names, places, mesh.devices.shape, strict=True):
        reached = len(set(along.tolist()))
        if reached > 1:
            names.append(name if reached == size else f"part of {name}")
    devices = [mesh.devices.flat[i] for i in group]
    return "+".join(names) or "none", moved / _bandwidth(chip, devices)


def _bandwidth(chip: Chip, devices: Sequence[Any]) -> float:
    """Return the bytes per second that each of a group of chips can send to the others."""
    if isinstance(chip, Tpu):
        if hardware_slices(devices) > 1:
            return chip.network_bandwidth
        coordinates = [getattr(device, "coords", (0,)) for device in devices]
        sides = sum(len(set(along)) > 1 for along in zip(*coordinates, strict=True))
        return 2 * max(1, sides) * chip.link_bandwidth
    hosts = {device.process_index for device in devices}
    if len(hosts) == 1:
        return chip.link_bandwidth
    together = len(devices) / len(hosts)  # of one host, which share out what goes to others
    return min(chip.link_bandwidth, together * chip.network_bandwidth)


def min_traffic_bytes(config: Config, params: Any, mesh: Any) -> dict[str, int]:
    """Return a lower bound of the bytes that one chip sends in a step, by axis, whatever the program.

    Gradients are summed in float32: scattered over `fsdp`, where the parameter is split, then summed over `data`, then
    over `slice`. Parameters are gathered once over `fsdp`, embeddings once over all axes of the batch. A block's
    activations are summed twice forward and twice backward over `tensor`.

    Args:
        config: the run.
        params: shapes of the parameters, each with its sharding.
        mesh: of the shardings.
    """
    sizes = dict(mesh.shape)
    slices, data, fsdp, tensor = (sizes[axis] for axis in ("slice", "data", "fsdp", "tensor"))
    least: dict[str, float] = defaultdict(float)
    for leaf in jax.tree.leaves(params):
        own = 4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
        split = any("fsdp" in (axes if isinstance(axes, tuple) else (axes,)) for axes in leaf.sharding.spec)
        whole = own * fsdp if split else own
        least["fsdp"] += whole * (fsdp - 1) / fsdp * (1.5 if split else 2)  # in bfloat16 there, as gradients back
        part = whole / fsdp
        least["data"] += 2 * part * (data - 1) / data
        least["slice"] += 2 * part / data * (slices - 1) / slices
    n = config.global_batch_size
    chips = slices * data * fsdp
    axes = "+".join(axis for axis in ("slice", "data", "fsdp") if sizes[axis] > 1)
    texts = config.data.captions_per_image
    embeddings = (1 + texts) * n * config.model.embed_dim * (2 if config.loss.dtype is Dtype.BFLOAT16 else 4)
    least[axes] += embeddings * (chips - 1) / chips
    least["tensor"] += (tensor - 1) / tensor * 2 * 4 * n / chips * _activation_bytes(config)
    return {axis: round(size) for axis, size in least.items() if axis and round(size)}


def _activation_bytes(config: Config) -> float:
    """Count one image's bytes, and those of its texts, between two blocks, times the number of blocks."""
    size = 2 if config.model.compute_dtype is Dtype.BFLOAT16 else 4
    image, text = config.model.image, config.model.text
    total = 0
    if isinstance(image, ViTConfig):
        total += image.depth * ((image.image_size // image.patch_size) ** 2 + image.class_token) * image.width
    if isinstance(text, TextTransformerConfig):
        total += config.data.captions_per_image * text.depth * text.context_length * text.width
    return size * total
