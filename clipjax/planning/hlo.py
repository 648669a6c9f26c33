"""Reader of a compiled program's text: every instruction, and how often it runs.

`parse` turns the text of `compiled.as_text()` into computations, `executed` walks from the entry through loops, calls
and branches. A loop's body counts as often as the loop runs, which XLA's own `cost_analysis` does not do.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "token": 0, "opaque": 0,
}  # fmt: skip
FUSIONS = ("fusion", "fusion-start")
_WORK = ("fusion", "custom-call", "dot", "convolution", "while", "call", "conditional")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in the program.
        opcode: "fusion", "all-gather-start", ...
        shape: of the result, as text; a tuple's shape in parentheses.
        operands: names of the instructions whose results enter.
        attributes: text after the operands.
        arguments: text between the parentheses.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every array of the result."""
        return arrays_of(self.shape)

    @property
    def op_name(self) -> str:
        """Path in the traced function; "" if the compiler made the instruction."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def estimated_cycles(self) -> int:
        """The TPU compiler's estimate; 0 where it makes none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    def attribute(self, pattern: str) -> str:
        """Return the first group of a pattern in the attributes; "" without a match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def called(self, role: str) -> list[str]:
        """List the computations to which it refers as `role` ("calls", "body", ...)."""
        return [
            name
            for found in _CALLED.finditer(self.attributes)
            if found[0].startswith(role + "=")
            for name in _NAME.findall(found[1])
        ]


@dataclass(frozen=True)
class HloModule:
    """Computations by name, each a list of instructions in scheduled order."""

    computations: Mapping[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def _shapes(self) -> dict[str, str]:
        return {i.name: i.shape for instructions in self.computations.values() for i in instructions}

    def shape(self, name: str) -> str:
        """Return the shape of an instruction's result, as text."""
        return self._shapes[name]

    def trip_count(self, loop: Instruction) -> int:
        """Return how often a `while` runs its body: the compiler's count, else the bound in its condition.

        Raises:
            ValueError: the condition has no constant bound.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        bounds = [
            int(i.arguments)
            for computation in self._reachable(loop.called("condition"))
            for i in self.computations[computation]
            if i.opcode == "constant" and re.fullmatch(r"[su](32|64)\[\]\S*", i.shape)
        ]
        if not bounds:
            raise ValueError(f"the loop {loop.name} has no constant bound")
        return max(bounds)

    def _reachable(self, names: list[str]) -> Iterator[str]:
        for name in names:
            yield name
            for instruction in self.computations[name]:
                yield from self._reachable(instruction.called("calls") + instruction.called("to_apply"))

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Yield every instruction that is scheduled by itself, in order, and how often one call of the program runs it.

        A fusion counts as one instruction; `fused_instructions` lists its parts.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations[computation]:
            yield instruction, times
            match instruction.opcode:
                case "while":
                    body = times * self.trip_count(instruction)
                    for name in instruction.called("body"):
                        yield from self._walk(name, body)
                case "conditional":
                    for name in instruction.called("branch_computations"):
                        yield from self._walk(name, times)
                case "call" | "async-start":
                    for name in instruction.called("to_apply") + instruction.called("calls"):
                        yield from self._walk(name, times)

    def overlapped(self) -> set[str]:
        """Return the names of instructions that run while others compute: a start with work before its done."""
        names = set()
        for instructions in self.computations.values():
            begun: dict[str, tuple[Instruction, bool]] = {}
            for instruction in instructions:
                if instruction.opcode.endswith("-done") and instruction.operands[0] in begun:
                    start, worked = begun.pop(instruction.operands[0])
                    if worked:
                        names.add(start.name)
                        names |= {part.name for name in start.called("calls") for part in self.computations[name]}
                elif instruction.opcode in _WORK:
                    begun = {name: (start, True) for name, (start, _) in begun.items()}
                elif instruction.opcode.endswith("-update") and instruction.operands[0] in begun:
                    begun[instruction.name] = begun.pop(instruction.operands[0])
                elif instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv"):
                    begun[instruction.name] = (instruction, False)
        return names

    def fused_instructions(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield the instructions of a fusion, or the instruction itself if it is no fusion."""
        if instruction.opcode not in FUSIONS:
            yield instruction
            return
        for name in instruction.called("calls"):
            for part in self.computations[name]:
                yield from self.fused_instructions(part)

    def flops(self) -> float:
        """Count the FLOPs of all matrix products and convolutions in one call; a multiply-add is two."""
        return float(
            sum(
                times * self.product_flops(part)
                for instruction, times in self.executed()
                for part in self.fused_instructions(instruction)
            )
        )

    def bytes_accessed(self, instruction: Instruction) -> int:
        """Count the bytes that one run reads and writes; of an array that it indexes, only the part that it touches."""
        called = instruction.called("calls")
        if instruction.opcode not in FUSIONS or not called:
            if instruction.opcode == "dynamic-update-slice":
                return 2 * bytes_of(self.shape(instruction.operands[1]))
            if instruction.opcode in ("dynamic-slice", "gather", "slice"):
                return 2 * bytes_of(instruction.shape)
            return bytes_of(instruction.shape) + sum(bytes_of(self.shape(name)) for name in instruction.operands)
        parts = self.computations[called[0]]
        by_name = {part.name: part for part in parts}
        total = self._written(by_name[parts[-1].name], by_name)
        for part in parts:
            if part.opcode == "parameter":
                total += self._read(part, parts)
        return total

    def _read(self, parameter: Instruction, parts: list[Instruction]) -> int:
        touched = 0
        for user in parts:
            if parameter.name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                touched += bytes_of(user.shape)
            elif user.opcode == "bitcast" and user is not parts[-1]:
                touched += self._read(user, parts)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue
            else:
                return bytes_of(parameter.shape)
        return min(touched, bytes_of(parameter.shape))

    def _written(self, root: Instruction, by_name: Mapping[str, Instruction]) -> int:
        if root.opcode == "tuple":
            return sum(self._written(by_name[name], by_name) for name in root.operands if name in by_name)
        if root.opcode == "bitcast" and root.operands[0] in by_name:
            return self._written(by_name[root.operands[0]], by_name)
        if root.opcode == "dynamic-update-slice":
            return bytes_of(self.shape(root.operands[1]))
        return bytes_of(root.shape)

    def product_flops(self, instruction: Instruction) -> int:
        """Count the FLOPs of a matrix product or convolution; 0 for any other instruction."""
        if instruction.opcode == "dot":
            contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        elif instruction.opcode == "custom-call" and "__cublas" in instruction.attributes:
            contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]').replace('"', "")
        elif instruction.opcode == "convolution":
            return self._convolution_flops(instruction)
        else:
            return 0
        (_, result), *_ = instruction.arrays
        left = arrays_of(self.shape(instruction.operands[0]))[0][1]
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in contracted.split(",") if i)

    def _convolution_flops(self, convolution: Instruction) -> int:
        """Count a convolution's FLOPs without padding; the TPU compiler writes products as convolutions too."""
        (_, result), *_ = convolution.arrays
        left, right = (arrays_of(self.shape(name))[0][1] for name in convolution.operands[:2])
        labels = convolution.attribute(r"dim_labels=([\w>?-]+)")
        left_dims, rest = labels.split("_", 1)
        right_dims, result_dims = rest.split("->")
        window = dict(re.findall(r"(\w+)=([\dx_-]+)", convolution.attribute(r"window=\{([^}]*)\}")))
        taps = 2 * math.prod(result) * right[right_dims.index("i")]
        for label in filter(str.isdigit, right_dims):
            sides = (left[left_dims.index(label)], right[right_dims.index(label)], result[result_dims.index(label)])
            taps = taps * _num_valid_taps(int(label), window, *sides) // sides[2]
        return taps


def _num_valid_taps(place: int, window: Mapping[str, str], size: int, kernel: int, out: int) -> int:
    """Count the pairs of a number and a tap that meet along one side of a convolution."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    low = int(of("pad", "0_0").split("_")[0])
    stride, dilate, spread = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    met = 0
    for tap in range(kernel):
        # Positions of the result at which this tap falls on a number: out * stride + tap * spread - low = dilate * i.
        start = tap * spread - low
        step = dilate // math.gcd(stride, dilate)
        first = next((o for o in range(min(step, out)) if (o * stride + start) % dilate == 0), None)
        if first is None:
            continue
        lowest = max(first, -(start // stride))
        lowest += (first - lowest) % step
        highest = min(out - 1, (dilate * (size - 1) - start) // stride)
        met += max(0, (highest - lowest) // step + 1)
    return met


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every array in a shape's text."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(shape)
        if dtype in ITEM_BYTES
    ]


def bytes_of(shape: str) -> int:
    """Count the bytes of all arrays in a shape's text, without the padding of layouts."""
    return int(sum(ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in arrays_of(shape)))


def parse(text: str) -> HloModule:
    """Parse the text of a compiled program into computations and instructions.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = _NAME.search(line)
            assert name is not None
            current = computations.setdefault(name[1], [])
            if line.startswith("ENTRY"):
                entry = name[1]
        elif line == "}":
            current = None
        elif current is not None:
            instruction = _instruction(line.strip())
            if instruction is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return HloModule(computations, entry)


def _whole_lines(text: str) -> list[str]:
    """Split a program's text into lines, and join instructions that a kernel's annotation spreads over several."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line and line != "}" and not line.startswith(("%", "ENTRY", "  %", "  ROOT ", "HloModule")):
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _instruction(line: str) -> Instruction | None:
    line = line.removeprefix("ROOT ")
    name, separator, rest = line.partition(" = ")
    if not separator or not name.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    arguments = rest[start + 1 : stop]
    return Instruction(name[1:], rest[:start], shape, tuple(_NAME.findall(arguments)), rest[stop + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Find where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")
