"""Self-attention of short sequences in one Pallas kernel for TPUs: no matrix of weights ever leaves the chip's memory.

Queries, keys and values come as the product that made them, `[batch, length, 3 * width]`, and the result is what the
next product takes, `[batch, length, width]`: nothing is transposed or copied. Every program of the grid holds all
heads of a few sequences, whose logits exist a head at a time; the backward kernel computes them anew.

A head's lanes are cut out with a mask over the aligned tiles of 128 lanes that it lies in, which costs a matrix unit
128 lanes wide nothing more than a head of fewer lanes does anyway.

Axes: b batch, l tokens, n heads, d head dim, w width = n * d.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from clipjax.config.model_validation import LANES
from clipjax.runtime.sharding import num_shards, shard_map_by_dims

BLOCK_BYTES = 2**20
"""Of queries, keys and values that one program of the grid reads, as long as that is more than one sequence."""

VMEM_BYTES = {"TPU v4": 14 * 2**20}
"""Vector memory that a kernel may take, by `device_kind`: what the chip has, less some for the compiler."""

DEFAULT_VMEM_BYTES = 96 * 2**20


class Heads(NamedTuple):
    """Split of a width into heads.

    Attributes:
        count: heads that one device has.
        dim: of each.
        causal: whether a token sees only itself and those before it.
    """

    count: int
    dim: int
    causal: bool

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.count * self.dim


def is_supported(batch: int, length: int, num_heads: int, head_dim: int) -> bool:
    """Return True if the kernel can compute these sequences and heads on the mesh in force.

    Each device's width has to be a multiple of `LANES`, one sequence has to fit into a chip's own memory, and a batch
    that the devices cannot share is that of initialisation.
    """
    parts = num_shards("heads")
    if num_heads % parts or num_heads // parts * head_dim % LANES or batch % num_shards("batch"):
        return False
    blocks = 2 * 7 * length * (num_heads // parts * head_dim) * 2  # of the backward kernel in bfloat16, twice each
    return blocks + 4 * 4 * length * _up(length, LANES) <= _vmem_bytes()


def fused_attention(
    qkv: Float[Array, "b l _"], *, num_heads: int, causal: bool, interpret: bool = False
) -> Float[Array, "b l w"]:
    """Return softmax attention; logits, softmax and sums are float32.

    Args:
        qkv: queries, keys and values side by side, each with its heads side by side; with a width that is split
            over devices, so for each part of it.
        num_heads: of the whole width.
        causal: whether a token sees only itself and those before it.
        interpret: run the kernel's operations one by one, on any platform, for tests.

    Cost:
        Backward 5 products of l x l x d per head, forward 2, each with d rounded up to tiles of 128 lanes; read and
        written are qkv, the result, and their gradients, once.
    """
    parts = num_shards("heads")
    dim = qkv.shape[-1] // 3 // num_heads
    heads = Heads(num_heads // parts, dim, causal)
    return _attention(qkv, heads, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(qkv: Array, heads: Heads, interpret: bool) -> Array:
    return _forward(qkv, heads, interpret)[0]


def _forward(qkv: Array, heads: Heads, interpret: bool) -> tuple[Array, Array]:
    run = functools.partial(_call, _forward_kernel, heads=heads, outputs=1, interpret=interpret)
    return shard_map_by_dims(run, ("batch", None, "heads"))(qkv), qkv


def _backward(heads: Heads, interpret: bool, qkv: Array, grad: Array) -> tuple[Array]:
    run = functools.partial(_call, _backward_kernel, heads=heads, outputs=3, interpret=interpret)
    return (shard_map_by_dims(run, ("batch", None, "heads"), ("batch", None, "heads"))(qkv, grad),)


_attention.defvjp(_forward, _backward)


def _call(kernel: Any, qkv: Array, *grad: Array, heads: Heads, outputs: int, interpret: bool) -> Array:
    """Run a kernel over one device's sequences; its result has `outputs` times the width."""
    batch, length, width = *qkv.shape[:2], heads.width
    rows = _sequences(batch, 3 * length * width * qkv.dtype.itemsize)
    part = lambda place: pl.BlockSpec((rows, length, width), lambda i: (i, 0, place))  # noqa: E731
    name = "attention_forward" if outputs == 1 else "attention_backward"
    # On every weight. Forward: scale, maximum, difference, exponential, sum, product, conversion; and backward besides:
    # product and sum, difference, product, conversion, and two transpositions.
    products, operations = (2, 7) if outputs == 1 else (5, 14)
    weights = batch * heads.count * length**2
    padded = batch * heads.count * _up(length, 8) * _up(main_columns(length), LANES)
    lanes = sum(stop - start for start, stop in (_lanes(heads, head) for head in range(heads.count))) / heads.count
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(batch // rows,),
        in_specs=[part(place) for place in range(3)] + [part(0)] * len(grad),
        out_specs=pl.BlockSpec((rows, length, outputs * width), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, length, outputs * width), qkv.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_vmem_bytes()),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * weights * heads.dim,
            transcendentals=weights,
            bytes_accessed=(3 + len(grad) + outputs) * batch * length * width * qkv.dtype.itemsize,
        ),
        # What the units have to do, padding included: `clipjax plan` reads it in the compiled program.
        metadata={
            "matrix_flops": str(round(2 * products * padded * lanes)),
            "vector_operations": str(operations * padded),
        },
        interpret=interpret,
        name=name,
    )(qkv, qkv, qkv, *grad)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _vmem_bytes() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return VMEM_BYTES.get("" if device is None else device.device_kind, DEFAULT_VMEM_BYTES)


def _sequences(batch: int, sequence_bytes: int) -> int:
    """Return the number of sequences that a program of the grid takes."""
    return max((n for n in range(1, batch + 1) if batch % n == 0 and n * sequence_bytes <= BLOCK_BYTES), default=1)


def _of_each(rows: int, run: Any) -> None:
    if rows == 1:
        run(0)
    else:
        jax.lax.fori_loop(0, rows, lambda i, _: run(i), None)


def _forward_kernel(q: Any, k: Any, v: Any, out: Any, *, heads: Heads) -> None:
    def run(i: Any) -> None:
        tiles = _Tiles(heads, 1)
        for head in range(heads.count):
            lanes, own = slice(*_lanes(heads, head)), _own(heads, head)
            keys, values = _only(own, k[i, :, lanes]), _only(own, v[i, :, lanes])
            weights = _weights(q[i, :, lanes], keys, heads)
            tiles.add(0, lanes, weights.mix(values))
            tiles.write(out, i, head)

    _of_each(q.shape[0], run)


def _backward_kernel(q: Any, k: Any, v: Any, grad: Any, out: Any, *, heads: Heads) -> None:
    def run(i: Any) -> None:
        tiles, scale = _Tiles(heads, 3), heads.dim**-0.5
        for head in range(heads.count):
            lanes, own = slice(*_lanes(heads, head)), _own(heads, head)
            whole_q, whole_grad = q[i, :, lanes], grad[i, :, lanes]
            query, key, value, head_grad = (
                _only(own, x) for x in (whole_q, k[i, :, lanes], v[i, :, lanes], whole_grad)
            )
            weights = _weights(whole_q, key, heads)
            weight_grads = _Columns.products(whole_grad, value)
            mean = weights.rows_sum(weight_grads)
            logit_grads = weights.times_difference(weight_grads, mean)
            tiles.add(0, lanes, scale * logit_grads.mix(key))
            tiles.add(1, lanes, scale * logit_grads.spread(query))
            tiles.add(2, lanes, weights.spread(head_grad))
            tiles.write(out, i, head)

    _of_each(q.shape[0], run)


class _Columns(NamedTuple):
    """A matrix with a row for every query and a column for every key; one key beyond whole tiles stands apart.

    Of 257 keys, the last would cost a third tile of 128 columns in every operation.

    Attributes:
        main: [l, k].
        last: [l, 1], or None where all keys are in `main`.
    """

    main: Array
    last: Array | None

    @classmethod
    def products(cls, left: Array, right: Array) -> "_Columns":
        """Return left [l, d] times right [l, d] transposed."""
        whole = main_columns(right.shape[0])
        last = None
        if whole < right.shape[0]:
            last = jnp.sum(left.astype(jnp.float32) * right[whole:].astype(jnp.float32), axis=1, keepdims=True)
        return cls(_dot(left, right[:whole], 1, 1), last)

    def mix(self, rows: Array) -> Array:
        """Return this times rows [keys, d], in their dtype; float32 [l, d]."""
        whole = self.main.shape[1]
        mixed = _dot(self.main.astype(rows.dtype), rows[:whole], 1, 0)
        return mixed if self.last is None else mixed + self.last * rows[whole:].astype(jnp.float32)

    def spread(self, rows: Array) -> Array:
        """Return this transposed times rows [l, d]; float32 [keys, d]."""
        spread = _dot(self.main.astype(rows.dtype), rows, 0, 0)
        if self.last is None:
            return spread
        last = jnp.sum(self.last * rows.astype(jnp.float32), axis=0, keepdims=True)
        return jnp.concatenate([spread, last], axis=0)

    def rows_sum(self, other: "_Columns") -> Array:
        """Return the sums along the rows of the elementwise product, [l, 1]."""
        total = jnp.sum(self.main * other.main, axis=1, keepdims=True)
        return total if self.last is None or other.last is None else total + self.last * other.last

    def times_difference(self, other: "_Columns", mean: Array) -> "_Columns":
        """Return this times the other less `mean`."""
        last = None if self.last is None or other.last is None else self.last * (other.last - mean)
        return _Columns(self.main * (other.main - mean), last)


def main_columns(length: int) -> int:
    """Return the number of keys computed in whole tiles of columns: all, or all but one where that saves a tile."""
    return length - 1 if length > LANES and length % LANES == 1 else length


def _lanes(heads: Heads, head: int) -> tuple[int, int]:
    """Return start and stop of the aligned lanes that hold a head."""
    return head * heads.dim // LANES * LANES, _up((head + 1) * heads.dim, LANES)


def _own(heads: Heads, head: int) -> Array:
    """Return a mask of the lanes that are the head's, bool [1, lanes]."""
    start, stop = _lanes(heads, head)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, stop - start), 1) + start
    return (lane >= head * heads.dim) & (lane < (head + 1) * heads.dim)


def _only(own: Array, x: Array) -> Array:
    return jnp.where(own, x, jnp.zeros((), x.dtype))


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _weights(query: Array, key: Array, heads: Heads) -> _Columns:
    logits, last = _Columns.products(query, key)
    logits = logits * heads.dim**-0.5
    last = None if last is None else last * heads.dim**-0.5
    if heads.causal:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(row >= column, logits, -jnp.inf)
        if last is not None:
            last = jnp.where(jax.lax.broadcasted_iota(jnp.int32, last.shape, 0) >= logits.shape[1], last, -jnp.inf)
    top = jnp.max(logits, axis=1, keepdims=True)
    if last is None:
        raised = jnp.exp(logits - top)
        return _Columns(raised * (1 / jnp.sum(raised, axis=1, keepdims=True)), None)
    top = jnp.maximum(top, last)
    raised, last = jnp.exp(logits - top), jnp.exp(last - top)
    share = 1 / (jnp.sum(raised, axis=1, keepdims=True) + last)
    return _Columns(raised * share, last * share)


class _Tiles:
    """Sums of what several heads add to the same lanes, written as soon as the last of them has."""

    def __init__(self, heads: Heads, parts: int) -> None:
        self._heads = heads
        self._sums: list[dict[int, Array]] = [{} for _ in range(parts)]

    def add(self, part: int, lanes: slice, x: Array) -> None:
        """Add to a part of the result, [l, lanes]."""
        for start in range(lanes.start, lanes.stop, LANES):
            tile = x[:, start - lanes.start : start - lanes.start + LANES]
            before = self._sums[part].get(start)
            self._sums[part][start] = tile if before is None else before + tile

    def write(self, out: Any, row: Any, head: int) -> None:
        """Write the lanes to which no head after this one adds."""
        heads = self._heads
        for part, sums in enumerate(self._sums):
            for start in [start for start in sums if start + LANES <= (head + 1) * heads.dim]:
                place = part * heads.width + start
                out[row, :, place : place + LANES] = sums.pop(start).astype(out.dtype)
