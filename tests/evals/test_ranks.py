"""Places in rankings against brute force in float64, and against sorting in NumPy, on 1 to 8 devices."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import MeshConfig
from clipjax.evals import ranks
from clipjax.evals.ranks import NEVER, best_places, equal_rows
from clipjax.evals.retrieval import DEPTHS, recalls
from clipjax.runtime.sharding import make_mesh
from tests.e2e.conftest import environment
from tests.e2e.test_processes import devices, free_port, outputs
from tests.evals.test_evals import unit

DEVICES = (1, 2, 4, 8)
ROWS, COLUMNS = ranks._MAX_ROWS, ranks._MAX_COLUMNS  # those of all but these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 queries on a device, and 16 candidates: even small tests have many, and tails."""
    monkeypatch.setattr(ranks, "_MAX_ROWS", 4)
    monkeypatch.setattr(ranks, "_MAX_COLUMNS", 16)


def mesh_of(count: int, **axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**axes), jax.devices()[:count])


def sorted_places(
    queries: np.ndarray, candidates: np.ndarray, query_groups: np.ndarray, candidate_groups: np.ndarray
) -> np.ndarray:
    """Return the same by a stable sort in float64, in which equal candidates score the same."""
    numbers = equal_rows(candidates)
    distinct = candidates[np.unique(numbers, return_index=True)[1]].astype(np.float64)
    similarity = np.einsum("ne,me->nm", queries.astype(np.float64), distinct)[:, numbers]
    order = np.argsort(-similarity, axis=1, kind="stable")
    is_right = candidate_groups[order] == query_groups[:, None]
    return np.where(is_right.any(axis=1), is_right.argmax(axis=1), NEVER)


def sorted_recalls(image_embed: np.ndarray, text_embed: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    """Return the recalls as they were computed before: places by two stable sorts of whole rows."""
    place = np.argsort(np.argsort(-(image_embed @ text_embed.T), axis=1, kind="stable"), axis=1)
    image_ranks = np.full(len(image_embed), np.iinfo(np.int64).max)
    np.minimum.at(image_ranks, owners, place[owners, np.arange(len(owners))])
    place = np.argsort(np.argsort(-(text_embed @ image_embed.T), axis=1, kind="stable"), axis=1)
    text_ranks = place[np.arange(len(owners)), owners]
    found = {f"image_to_text_r{depth}": float(np.mean(image_ranks < depth)) for depth in DEPTHS}
    return found | {f"text_to_image_r{depth}": float(np.mean(text_ranks < depth)) for depth in DEPTHS}


def without_near_ties(rng: np.random.Generator, num_queries: int, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and candidates that float32 cannot rank otherwise than float64: the first draw that is so."""
    while True:
        queries, candidates = (unit(rng.normal(size=(rows, 24))) for rows in (num_queries, num_candidates))
        similarity = np.sort(queries.astype(np.float64) @ candidates.astype(np.float64).T, axis=1)
        if np.diff(similarity, axis=1).min(initial=1) > 5e-7:
            return queries, candidates


def groups_of(rng: np.random.Generator, num_queries: int, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return groups, some of which only one side has."""
    return rng.integers(0, 30, num_queries), rng.integers(5, 35, num_candidates)


@pytest.mark.newest
@pytest.mark.parametrize("count", DEVICES)
def test_places_are_those_of_a_sort_in_float64_on_any_devices(count):
    mesh = mesh_of(count)
    for seed, (num_queries, num_candidates) in enumerate([(37, 101), (32, 16), (65, 17), (1, 1), (3, 100), (100, 3)]):
        rng = np.random.default_rng(seed)
        queries, candidates = without_near_ties(rng, num_queries, num_candidates)
        groups = groups_of(rng, num_queries, num_candidates) if num_queries > 1 else (np.zeros(1, int),) * 2
        places = best_places(queries, candidates, *groups, mesh)
        np.testing.assert_array_equal(places, sorted_places(queries, candidates, *groups))


@pytest.mark.parametrize("count", DEVICES)
def test_ties_and_copies_keep_the_order_of_the_source(count):
    """Products of small whole numbers are exact, in any order of the sum: a third of the scores are equal ones."""
    rng = np.random.default_rng(count)
    queries, candidates = (rng.integers(-1, 2, (rows, 4)).astype(np.float32) for rows in (41, 90))
    groups = groups_of(rng, 41, 90)
    expected = sorted_places(queries, candidates, *groups)
    np.testing.assert_array_equal(best_places(queries, candidates, *groups, mesh_of(count)), expected)
    owners = rng.integers(0, 41, 90)
    found = recalls(queries, candidates, owners, mesh_of(count))
    assert found.items() >= sorted_recalls(queries, candidates, owners).items()


def test_recalls_are_those_of_sorting():
    rng = np.random.default_rng(7)
    images = unit(rng.normal(size=(60, 32)))
    owners = rng.permutation(np.repeat(np.arange(55), 2))  # five images have no text, and find none
    texts = unit(images[owners] + 1.2 * rng.normal(size=(110, 32)) / 32**0.5)
    found = recalls(images, texts, owners)
    assert found.items() >= sorted_recalls(images, texts, owners).items()
    assert 0.3 < found["image_to_text_r1"] < found["image_to_text_r10"] <= 55 / 60


@pytest.mark.parametrize("count", [1, 8])
def test_copies_are_equal_even_where_the_product_rounds_them_apart(count, monkeypatch):
    """Edges of a tile may be summed in another order: here every other column is a rounding above its neighbours."""
    matmul = jnp.matmul

    def uneven(x, y, **options):
        score = matmul(x, y, **options)
        return score + jnp.where(jnp.arange(score.shape[1]) % 2 == 1, 1e-6, 0.0)[None, :]

    rng = np.random.default_rng(3)
    queries, distinct = unit(rng.normal(size=(20, 16))), unit(rng.normal(size=(20, 16)))
    numbers = rng.integers(0, 20, 75)
    candidates = distinct[numbers]
    both_groups = [groups_of(rng, 20, 75), (rng.permutation(20), numbers)]  # or all copies are right for one query
    expected = [sorted_places(queries, candidates, *groups) for groups in both_groups]
    ranks._make_program.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ranks.jnp, "matmul", uneven)
        places = [best_places(queries, candidates, *groups, mesh_of(count)) for groups in both_groups]
    ranks._make_program.cache_clear()
    np.testing.assert_array_equal(places, expected)


def test_a_collapsed_model_ranks_by_the_order_of_the_source_alone():
    same = unit(np.ones((50, 8)))
    np.testing.assert_array_equal(best_places(same, same, np.arange(50), np.arange(50)), np.arange(50))


def test_padding_never_counts():
    """All candidates score below zero, which is the score of padding."""
    for num_candidates in (1, 3, 15, 17, 33):
        candidates = -unit(np.stack([np.ones(num_candidates), np.arange(num_candidates) / 50], axis=1))
        queries = np.asarray([[1.0, 0.0]] * 5, np.float32)
        groups = np.minimum(np.arange(5), num_candidates - 1)
        for count in (1, 8):
            places = best_places(queries, candidates, groups, np.arange(num_candidates), mesh_of(count))
            np.testing.assert_array_equal(places, num_candidates - 1 - groups)


def test_queries_that_nothing_is_right_for_never_find():
    eye = np.eye(3, dtype=np.float32)
    places = best_places(eye, eye[:2], np.asarray([0, 9, 1]), np.asarray([0, 1]))
    assert places.tolist() == [0, NEVER, 0 + 1]  # the third scores 0 with both, and its own is the second
    assert best_places(eye, eye[:0], np.arange(3), np.arange(0)).tolist() == [NEVER] * 3
    assert best_places(eye[:0], eye, np.arange(0), np.arange(3)).shape == (0,)


def test_all_axes_of_the_mesh_share_the_queries():
    rng = np.random.default_rng(0)
    queries, candidates, groups = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(40, 8))), groups_of(rng, 50, 40)
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    places = best_places(queries, candidates, *groups, mesh)
    np.testing.assert_array_equal(places, sorted_places(queries, candidates, *groups))


def test_blocks_and_tails_of_both_passes_are_one_program():
    mesh = mesh_of(2)
    ranks._make_program.cache_clear()
    rng = np.random.default_rng(0)
    for num_queries, num_candidates in ((33, 17), (100, 100), (64, 31)):
        best_places(
            rng.normal(size=(num_queries, 5)),
            rng.normal(size=(num_candidates, 5)),
            *groups_of(rng, num_queries, num_candidates),
            mesh,
        )
    assert ranks._make_program(mesh)._cache_size() == 1


@pytest.mark.parametrize("count", [1, 4])
def test_a_device_holds_few_blocks_and_computes_each_once(count):
    def shape(*dims: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    rows = ROWS * count
    queries = ranks._Queries(shape(rows, 32, dtype=np.float32), shape(rows))
    candidates = ranks._Candidates(shape(COLUMNS, 32, dtype=np.float32), *[shape(COLUMNS)] * 4)
    best = ranks._Best(shape(rows, dtype=np.float32), shape(rows), shape(rows))
    lowered = ranks._make_program(mesh_of(count)).lower(queries, candidates, best, shape(rows), shape(dtype=np.bool_))
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * ROWS * COLUMNS
    assert compiled.as_text().count(" dot(") == 1  # or the passes might compare scores of two products


def test_equal_rows_share_a_number():
    rows = np.asarray([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0], [1.0, 0.0], [1.0, 1e-30]], np.float32)
    assert equal_rows(rows).tolist() == [0, 1, 0, 1, 2]
    assert equal_rows(rows[:, ::-1]).tolist() == [0, 1, 0, 1, 2]  # not contiguous


@pytest.mark.parametrize("owners", [[0, 3], [-1, 0]])
def test_texts_of_no_image_are_refused(owners):
    with pytest.raises(ValueError, match=r"owners reach from -?\d to \d; the images have numbers 0 to 2"):
        recalls(np.eye(3, dtype=np.float32), np.eye(2, 3, dtype=np.float32), np.asarray(owners))


OF_TWO = """
import sys
import jax, numpy as np
from clipjax.config import MeshConfig
from clipjax.evals import ranks
from clipjax.runtime import processes, sharding

processes.start(dict(word.removeprefix("--").split("=") for word in sys.argv[2:]))
ranks._MAX_ROWS, ranks._MAX_COLUMNS = 4, 16
mesh = sharding.make_mesh(MeshConfig())
assert (mesh.size, jax.process_count()) == (4, 2)
with np.load(sys.argv[1], allow_pickle=False) as inputs:
    print("places", ranks.best_places(*(inputs[f"arr_{i}"] for i in range(4)), mesh).tolist())
"""


@pytest.mark.process
def test_two_processes_get_the_places_of_one(tmp_path, compile_cache):
    rng = np.random.default_rng(1)
    queries, candidates = without_near_ties(rng, 37, 50)
    candidates[40:] = candidates[:10]
    groups = groups_of(rng, 37, 50)
    np.savez(tmp_path / "inputs.npz", queries, candidates, *groups)
    (tmp_path / "places.py").write_text(OF_TWO)
    changes = {**devices(2), "JAX_COMPILATION_CACHE_DIR": str(compile_cache)}
    words = (sys.executable, str(tmp_path / "places.py"), str(tmp_path / "inputs.npz"))
    address = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            (*words, f"--coordinator={address}", "--num_processes=2", f"--process_id={index}"),
            env=environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    expected = sorted_places(queries, candidates, *groups).tolist()
    try:
        for text in outputs(started, expect=0):
            assert f"places {expected}" in text
    finally:
        for process in started:
            process.kill()
            process.communicate()
