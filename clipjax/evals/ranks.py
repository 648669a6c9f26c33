"""Places of right answers in rankings by similarity: counted in blocks on the devices, never sorted.

The place of a query's best right candidate is the number of candidates before it: those that score higher, and of equal
scores those of a lower index. A first pass over the blocks of the similarity matrix finds each query's best right
candidate, a second one counts. No more than the embeddings and one block per device is held, whatever n and m.

Scores are only compared as far as they mean something. One compiled program computes both passes, so that a pair scores
the same bits in both; but equal candidates in other columns of a matrix product may differ in the last bit (edges of a
tile are summed in another order). So candidates whose embeddings are equal, bit for bit, are equal by definition: they
share an id, and the index alone decides between them.

Reading order: `best_places`, `_add_block`. Axes: n queries, m candidates, e embed, r queries and c candidates of a
block on one device.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from clipjax.config import MeshConfig
from clipjax.runtime.sharding import fetch, make_mesh, replicated

NEVER = np.iinfo(np.int64).max
"""The place of what no candidate is right for."""

_MAX_ROWS, _MAX_COLUMNS = 1024, 8192  # 32 MiB of scores
_SPREAD = 8  # devices that share even few queries; not their real number, on which the shape would depend
_NONE = np.iinfo(np.int32).max
_PADDED_QUERY, _PADDED_CANDIDATE = -2, -1  # groups that match nothing


class _Queries(NamedTuple):
    embed: Float[Array, "r e"]
    group: Int[Array, " r"]


class _Candidates(NamedTuple):
    """A block of candidates. Padding has the index `_NONE`.

    Attributes:
        embed: embeddings.
        group: what they are right for.
        index: place among all candidates.
        embed_id: equal for equal embeddings, else different.
        first: lowest index of a candidate with the same group and embedding.
    """

    embed: Float[Array, "c e"]
    group: Int[Array, " c"]
    index: Int[Array, " c"]
    embed_id: Int[Array, " c"]
    first: Int[Array, " c"]


class _Best(NamedTuple):
    """The best right candidate of each query so far; -inf and `_NONE` before there is one."""

    score: Float[Array, " r"]
    index: Int[Array, " r"]
    embed_id: Int[Array, " r"]


def best_places(
    queries: Float[np.ndarray, "n e"],
    candidates: Float[np.ndarray, "m e"],
    query_groups: Int[np.ndarray, " n"],
    candidate_groups: Int[np.ndarray, " m"],
    mesh: Mesh | None = None,
) -> Int[np.ndarray, " n"]:
    """Return for each query how many candidates come before its best right one, `NEVER` if it has none. Int64 `[n]`.

    Candidates are ranked by the float32 dot product, of equal ones the lower index first. All processes of the mesh
    call this with the same arrays, and get the same places.

    Args:
        queries: finite, used as float32.
        candidates: finite, used as float32; every device holds them.
        query_groups: whole numbers from 0 on, none much larger than there are groups.
        candidate_groups: of the same numbers; a candidate is right for the queries of its group.
        mesh: the devices, among all of which the queries are split. None: this process's first device.
    """
    if not len(queries) or not len(candidates):
        return np.full(len(queries), NEVER)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    rows = min(_MAX_ROWS, _power_of_two(-(-len(queries) // _SPREAD))) * mesh.size
    columns = min(_MAX_COLUMNS, _power_of_two(len(candidates)))
    add, split = _make_program(mesh), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    blocks = _candidate_blocks(candidates, candidate_groups, columns, mesh)
    fill = lambda value, dtype: _place(np.full(rows, value, dtype), split)  # noqa: E731
    nothing = _Best(fill(-np.inf, np.float32), fill(_NONE, np.int32), fill(_NONE, np.int32))
    yes, no = (_place(np.asarray(value), replicated(mesh)) for value in (True, False))
    zeros, places = fill(0, np.int32), []
    for start in range(0, len(queries), rows):
        groups = query_groups[start : start + rows]
        block = _Queries(
            _place(_padded(queries[start : start + rows].astype(np.float32), rows, 0), split),
            _place(_padded(groups.astype(np.int32), rows, _PADDED_QUERY), split),
        )
        best, before = nothing, zeros
        for number in _blocks_of_groups(groups, candidate_groups, columns):
            best, _ = add(block, blocks[number], best, zeros, yes)
        for each in blocks:
            _, before = add(block, each, best, before, no)
        counted, score = fetch(before, mesh)[: len(groups)], fetch(best.score, mesh)[: len(groups)]
        places.append(np.where(np.isneginf(score), NEVER, counted.astype(np.int64)))
    return np.concatenate(places)


def _add_block(
    queries: _Queries, candidates: _Candidates, best: _Best, before: Int[Array, " r"], is_first_pass: Bool[Array, ""]
) -> tuple[_Best, Int[Array, " r"]]:
    """Return the best right candidates with those of this block, or how many candidates are before them with these.

    Both passes are one program: the scores of two could differ in their last bits.
    """
    # The barrier keeps a compiler from computing the product in each branch, maybe in another way.
    score = jax.lax.optimization_barrier(
        jnp.matmul(queries.embed, candidates.embed.T, precision=jax.lax.Precision.HIGHEST)
    )
    return jax.lax.cond(
        is_first_pass,
        lambda: (_find_best(score, queries.group, candidates, best), before),
        lambda: (best, before + _count_before(score, candidates, best)),
    )


def _find_best(score: Float[Array, "r c"], group: Int[Array, " r"], candidates: _Candidates, best: _Best) -> _Best:
    """Return the best right candidates, of those so far and this block."""
    index, embed_id = (jnp.broadcast_to(each[None, :], score.shape) for each in (candidates.first, candidates.embed_id))
    is_right = group[:, None] == candidates.group[None, :]
    top = jnp.max(score, axis=1, where=is_right, initial=-jnp.inf)
    is_top = is_right & (score == top[:, None])
    top_index = jnp.min(index, axis=1, where=is_top, initial=_NONE)
    top_id = jnp.min(embed_id, axis=1, where=is_top & (index == top_index[:, None]), initial=_NONE)
    is_better = (top > best.score) | ((top == best.score) & (top_index < best.index))
    return jax.tree.map(functools.partial(jnp.where, is_better), _Best(top, top_index, top_id), best)


def _count_before(score: Float[Array, "r c"], candidates: _Candidates, best: _Best) -> Int[Array, " r"]:
    """Return how many candidates of this block come before the best right one."""
    index = candidates.index[None, :]
    is_same = candidates.embed_id[None, :] == best.embed_id[:, None]
    is_higher = (score > best.score[:, None]) & ~is_same
    is_earlier = (is_same | (score == best.score[:, None])) & (index < best.index[:, None])
    return jnp.sum((is_higher | is_earlier) & (index != _NONE), axis=1, dtype=jnp.int32)


@functools.lru_cache(maxsize=8)
def _make_program(mesh: Mesh) -> Callable[..., tuple[_Best, jax.Array]]:
    """Return `_add_block`, compiled for blocks whose queries are split over the mesh."""
    by_row, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (by_row, whole, by_row, by_row, whole)
    run = jax.shard_map(_add_block, mesh=mesh, in_specs=specs, out_specs=by_row)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(run, in_shardings=shardings, out_shardings=shardings[0])


def _candidate_blocks(candidates: np.ndarray, groups: np.ndarray, columns: int, mesh: Mesh) -> list[_Candidates]:
    """Return all candidates in blocks of so many, the last one padded, on all devices."""
    count, embed_ids = len(candidates), equal_rows(candidates)
    _, first, pair = np.unique(groups.astype(np.int64) * count + embed_ids, return_index=True, return_inverse=True)
    facts = (np.arange(count), embed_ids, first[pair])
    blocks = []
    for start in range(0, count, columns):
        embed = _padded(candidates[start : start + columns].astype(np.float32), columns, 0)
        group = _padded(groups[start : start + columns].astype(np.int32), columns, _PADDED_CANDIDATE)
        more = [_padded(each[start : start + columns].astype(np.int32), columns, _NONE) for each in facts]
        blocks.append(_Candidates(*(_place(each, replicated(mesh)) for each in (embed, group, *more))))
    return blocks


def _blocks_of_groups(groups: np.ndarray, candidate_groups: np.ndarray, columns: int) -> np.ndarray:
    """Return the numbers of the blocks that hold candidates of these groups; the first pass needs no others."""
    present = np.zeros(max(groups.max(), candidate_groups.max()) + 1, bool)
    present[groups] = True
    return np.unique(np.flatnonzero(present[candidate_groups]) // columns)


def equal_rows(rows: np.ndarray) -> Int[np.ndarray, " n"]:
    """Return a number for each row, the same for rows whose float32 bits are equal. Int64 `[n]`, from 0 on."""
    numbers: dict[bytes, int] = {}
    rows = np.ascontiguousarray(rows, np.float32) + np.float32(0)  # -0 becomes 0
    digests = (hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
    return np.asarray([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int64)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _padded(rows: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), *((0, 0),) * (rows.ndim - 1)), constant_values=value)


def _place(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
