"""Losses against float64 NumPy, whatever kind, method, tile, dtype and mesh computes them, and what they cost.

Tolerance: 2e-6 (Euclidean norm, relative) in float32: products of unit vectors of 64 numbers, times 100 at most, are
good to about 1e-6. With bfloat16 operands each number carries 2^-9, which the scale multiplies in the exponent.
"""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.collectives import KINDS, Collective, collectives, compile_loss, total
from benchmarks.numerics.certificate import COMBINED, LOSSES, Case, errors, inputs, measure, meshes
from benchmarks.numerics.reference import reference
from clipjax.config import LossMethod, MeshConfig
from clipjax.losses import LossInputs, MovingAverages, Teacher, choose_method, make_loss, sigmoid_loss, softmax_loss
from clipjax.losses.topology import gather_stages
from clipjax.runtime.sharding import AXES, batch_sharding, make_mesh, replicated

TOLERANCE = 2e-6
PLAIN = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
NAMES = ("image", "text", "scale", "bias")


def bias_of(kind: str) -> float:
    return -5.0 if kind == "sigmoid" else 0.0


@functools.lru_cache
def compiled(loss):
    """The loss and its gradients; one that is known by now is not compiled again for other numbers."""

    def objective(image, text, scale, bias, group):
        return loss(image, text, scale, bias, group=group)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True))


@functools.lru_cache
def tiled(kind: str, tile: int | None):
    """The loss on one device, made once."""
    return make_loss(kind=kind, tile=tile)


def evaluate(loss, image, text, scale, bias=0.0, group=None):
    """Loss, gradients by name, metrics."""
    arguments = (jnp.asarray(image), jnp.asarray(text), jnp.float32(scale), jnp.float32(bias))
    (value, metrics), grads = compiled(loss)(*arguments, group)
    return value, dict(zip(NAMES, grads, strict=True)), metrics


def worst(kind: str, truth, value, grads) -> float:
    grads = {name: grad for name, grad in grads.items() if kind == "sigmoid" or name != "bias"}
    return max(errors(truth, value, grads).values())


@pytest.mark.newest
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("kind", PLAIN)
def test_the_plain_losses_are_those_of_the_papers(kind, scale):
    image, text = inputs()
    value, grads, _ = evaluate(PLAIN[kind], image, text, scale, bias_of(kind))
    truth = reference(kind, image, text, scale, bias_of(kind))
    # The textbook form takes small losses as differences of large logits, whose rounding the scale multiplies.
    assert worst(kind, truth, value, grads) < TOLERANCE * (10 if scale == 100 else 1)


@pytest.mark.parametrize("tile", [None, 1, 7, 32, 96, 1000])
@pytest.mark.parametrize("kind", PLAIN)
def test_tiles_of_any_size_agree_with_float64(kind, tile):
    image, text = inputs()
    for scale in (1.0, 14.3, 100.0):
        value, grads, metrics = evaluate(tiled(kind, tile), image, text, scale, bias_of(kind))
        truth = reference(kind, image, text, scale, bias_of(kind))
        assert worst(kind, truth, value, grads) < TOLERANCE
        _, _, expected = evaluate(PLAIN[kind], image, text, scale, bias_of(kind))
        for name in expected:
            assert float(metrics[name]) == pytest.approx(float(expected[name]), abs=1e-6)
        similarity = image.astype(np.float64) @ text.T
        assert float(metrics["positive_similarity"]) == pytest.approx(np.diag(similarity).mean(), abs=1e-6)
        hardest = (similarity - 9 * np.eye(len(image))).max(1).mean()
        assert float(metrics["hardest_negative_similarity"]) == pytest.approx(hardest, abs=2e-6)


def some_cases() -> list[Case]:
    """Every loss by both methods, in tiles and with GradCache, and some together; over all of them, every mesh."""
    ways = itertools.product(LOSSES, (("gathered", 7, False), ("ring", None, True), ("gathered", None, True)))
    every = list(meshes())
    more = itertools.product(COMBINED, (("gathered", None, True), ("ring", 7, False)))
    return [
        Case(loss, method, tile, "float32", every[(7 * i) % len(every)], cached)
        for i, (loss, (method, tile, cached)) in enumerate([*ways, *more])
    ]


@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_every_way_agrees_with_float64(case):
    """A subset of the certificate: `python -m benchmarks.numerics.certificate` has all of it."""
    found = measure(case, [14.3, 100.0])
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("method", ["gathered", "ring"])
@pytest.mark.parametrize("kind", PLAIN)
def test_bfloat16_operands_cost_accuracy_as_expected(kind, method):
    case = Case(kind, method, 32, "bfloat16", (1, 2, 2, 2))
    found = measure(case, [14.3])
    # A similarity of at most 1 is off by about 2^-9 / 8 (64 errors of random sign), a logit by 14.3 times that.
    assert 1e-6 < max(found.values()) < 0.02, found


@pytest.mark.newest
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("method", ["gathered", "ring"])
def test_gradients_lie_where_the_embeddings_lie(kind, method):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    image, text = (jax.device_put(x, batch_sharding(mesh)) for x in inputs(64))
    _, grads, _ = evaluate(make_loss(kind=kind, method=method, mesh=mesh), image, text, 10.0, bias_of(kind))
    for name in ("image", "text"):
        assert grads[name].sharding.is_equivalent_to(batch_sharding(mesh), 2)


@pytest.mark.parametrize("method", ["whole", "gathered", "ring"])
@pytest.mark.parametrize("kind", PLAIN)
def test_pairs_of_one_group_are_no_negatives_of_each_other(kind, method):
    image, text = inputs(48)
    group = np.arange(48) // 3 * (np.arange(48) % 5 > 0)  # threes, with some missing, and one large group
    mesh = None if method == "whole" else make_mesh(MeshConfig(data=4, fsdp=2))
    loss = make_loss(kind=kind, method="auto" if mesh is None else method, mesh=mesh, tile=5)
    value, grads, _ = evaluate(loss, image, text, 30.0, bias_of(kind), jnp.asarray(group))
    truth = reference(kind, image, text, 30.0, bias_of(kind), group=group)
    assert worst(kind, truth, value, grads) < TOLERANCE
    plain, _, _ = evaluate(PLAIN[kind], image, text, 30.0, bias_of(kind), jnp.asarray(group))
    assert float(plain) == pytest.approx(truth.loss, rel=1e-5)
    assert truth.loss < 0.99 * reference(kind, image, text, 30.0, bias_of(kind)).loss  # the groups matter


def test_one_group_of_everything_leaves_nothing_to_tell_apart():
    image, text = inputs(12)
    value, grads, _ = evaluate(make_loss(tile=5), image, text, 30.0, group=jnp.zeros(12, jnp.int32))
    assert float(value) == 0
    assert all(not np.asarray(grad).any() for grad in grads.values())


@pytest.mark.parametrize("mesh_sizes", [None, (4, 2, 1)])
def test_label_smoothing_agrees_with_float64(mesh_sizes):
    image, text = inputs()
    mesh = None if mesh_sizes is None else make_mesh(MeshConfig(data=4, fsdp=2))
    value, grads, _ = evaluate(make_loss(label_smoothing=0.1, mesh=mesh), image, text, 14.3)
    truth = reference("softmax", image, text, 14.3, label_smoothing=0.1)
    assert worst("softmax", truth, value, grads) < TOLERANCE


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(
    "shape", ["aligned", "opposite", "identical captions", "duplicate images", "one", "prime", "a row of zeros"]
)
def test_edge_cases_are_finite_and_right(kind, shape):
    image, text = inputs({"one": 1, "prime": 53}.get(shape, 24))
    if shape == "aligned":
        image = text = np.eye(24, 64, dtype=np.float32)  # cosines are exactly 1 and 0
    elif shape == "opposite":
        image, text = np.eye(24, 64, dtype=np.float32), -np.eye(24, 64, dtype=np.float32)
    elif shape == "identical captions":
        text = np.repeat(text[:1], 24, axis=0)
    elif shape == "duplicate images":
        image = np.concatenate([image[:12], image[:12]])
    elif shape == "a row of zeros":
        text = text * (np.arange(24) != 5).astype(np.float32)[:, None]
    for scale in (1.0, 100.0):
        value, grads, metrics = evaluate(tiled(kind, 8), image, text, scale, bias_of(kind))
        truth = reference(kind, image, text, scale, bias_of(kind))
        assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads.values())
        # Values near 1e-44 are below float32's normal numbers, and what cancels to zero has no relative error.
        assert float(value) == pytest.approx(truth.loss, rel=TOLERANCE, abs=1e-37)
        for name in ("image", "text"):
            error = np.linalg.norm(np.asarray(grads[name], np.float64) - truth.grads[name])
            assert error <= TOLERANCE * max(truth.sizes[name], 1e-5)
        assert 0 <= float(metrics["image_to_text_accuracy"]) <= 1
    if shape == "identical captions":
        assert float(metrics["image_to_text_accuracy"]) == 0  # a tie is a miss


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_a_tie_is_a_miss_in_bfloat16_too(scale):
    image, text = inputs(24)
    _, _, metrics = evaluate(make_loss(dtype="bfloat16", tile=8), image, np.repeat(text[:1], 24, axis=0), scale)
    assert float(metrics["image_to_text_accuracy"]) == 0


def test_cotangent_scales_the_gradient():
    mesh = make_mesh(MeshConfig(), jax.devices())
    image, text = map(jnp.asarray, inputs(16))
    for method in ("gathered", "ring"):
        loss = make_loss(mesh=mesh, method=method)
        plain, quadrupled = (
            jax.jit(jax.grad(lambda x, factor=factor, loss=loss: factor * loss(x, text, jnp.float32(10))[0]))(image)
            for factor in (1.0, 4.0)
        )
        np.testing.assert_array_equal(quadrupled, 4 * plain)  # a power of two rounds nothing


def moved(mesh, n: int, e: int, slice_devices: int | None = None, **options):
    """Collectives of the compiled loss, forward and backward together."""
    return collectives(compile_loss(mesh, pairs=n, embed=e, **options).as_text(), slice_devices)


@pytest.mark.newest
def test_gathering_moves_the_embeddings_once_and_a_few_numbers_per_pair():
    mesh, n, e = make_mesh(MeshConfig(data=4, fsdp=2)), 64, 32
    found = moved(mesh, n, e, method="gathered")
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    assert total(found, "all-gather") == (2 * n * e + 2 * n) * 7 // 8  # an eighth is there already
    assert total(found, "all-reduce") <= 2 * n + 8  # peaks and totals of the columns, five sums, two gradients


@pytest.mark.newest
def test_the_ring_passes_blocks_and_sums_single_numbers_only():
    mesh, n, e = make_mesh(MeshConfig(data=4, fsdp=2)), 64, 32
    found = moved(mesh, n, e, method="ring")
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
    # Forward texts, positions, two statistics; backward texts, positions, log-sums, gradients.
    assert total(found, "collective-permute") <= (n * e + 3 * n) + (2 * n * e + 2 * n)
    assert total(found, "collective-permute") >= 3 * n * e
    assert total(found, "all-reduce") <= 8


def test_between_slices_a_device_passes_on_what_it_holds_and_gathers_inside():
    mesh, n, e, slices = make_mesh(MeshConfig(slice=4, fsdp=2)), 64, 32, 4
    found, rows = moved(mesh, n, e, 2, method="gathered"), n // 8
    assert total(found, "all-gather", between=True) == 0
    assert total(found, "all-gather", between=False) == (2 * n * e + 2 * n) // 2  # of two devices in each slice
    assert total(found, "collective-permute", between=False) == 0
    assert total(found, "collective-permute", between=True) == (slices - 1) * (2 * rows * e + 2 * rows)
    assert total(found, "all-reduce", between=True) <= 2 * slices * rows + 8  # the columns' statistics; seven sums


def test_a_torus_is_gathered_side_by_side():
    class Device:
        platform = "tpu"

        def __init__(self, *coords: int) -> None:
            self.coords = coords

    grid = np.array([Device(x, y) for x in range(2) for y in range(4)], dtype=object)
    data = Mesh(grid.reshape(1, 8, 1, 1), AXES)
    assert gather_stages(data) == (("data", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("data", [[0, 4], [1, 5], [2, 6], [3, 7]]))
    assert gather_stages(Mesh(grid.reshape(1, 2, 4, 1), AXES)) == (("fsdp", None), ("data", None))
    assert gather_stages(make_mesh(MeshConfig())) == (("data", None),)


def test_gathering_by_groups_gives_the_same(monkeypatch):
    monkeypatch.setattr("clipjax.losses.topology._line", lambda mesh, axis: 4 if axis == "data" else 1)
    mesh = make_mesh(MeshConfig())
    assert max(measure(Case("softmax", "gathered", 7, "float32", (1, 8, 1, 1)), [14.3]).values()) < TOLERANCE
    found = [c for c in moved(mesh, 64, 32, method="gathered") if c.kind == "all-gather"]
    assert len(found) == 8  # of two embeddings and two log-sums, in two stages
    assert total(found, "all-gather") == (2 * 64 * 32 + 2 * 64) * 7 // 8


@pytest.mark.process
def test_on_64_and_256_devices_as_much_moves_and_no_more_is_kept(tmp_path):
    output = tmp_path / "collectives.json"
    command = [sys.executable, "-m", "benchmarks.collectives", "--devices", "64", "256", f"--output={output}"]
    subprocess.run(command, check=True, timeout=300, cwd=pathlib.Path(__file__).parents[2])
    rows = json.loads(output.read_text())["rows"]
    kept = {}
    for row in rows:
        n, e = row["pairs"], row["embed"]
        assert n == 128 * row["devices"]
        count = {kind: row["inside"].get(kind, 0) + row["between"].get(kind, 0) for kind in KINDS}
        assert count["reduce-scatter"] == count["all-to-all"] == 0
        temporary = row["temporary_bytes"]
        if row["method"] == "ring":
            assert 3 * n * e <= count["collective-permute"] <= 3 * n * e + 5 * n
            assert count["all-gather"] == 0 and count["all-reduce"] <= 8
        else:
            inside = row["devices"] // row["slices"]
            assert count["all-gather"] == (2 * n * e + 2 * n) * (inside - 1) // inside
            assert count["all-reduce"] <= 2 * n + 2 * n + 8
            assert row["between"].get("all-gather", 0) == 0
            temporary -= 2 * n * e * 4  # the gathered embeddings themselves
        kept.setdefault((row["method"], row["slices"]), []).append(temporary)
    for method, (few, many) in kept.items():
        assert many <= 1.3 * few, method  # a few numbers per pair of the batch


def test_collectives_are_read_from_tpu_and_gpu_programs_too():
    text = """
ENTRY %main (p: f32[8,4]) -> f32[16,4] {
  %a = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), replica_groups=[2,2]<=[4], dimensions={0}
  %b = f32[8,4]{1,0:T(8,128)} all-reduce(%p), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %c = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%q, %r), replica_groups={{0,1},{2,3}}, to_apply=%add
  %d = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}
"""
    assert collectives(text, slice_devices=2) == [
        Collective("all-gather", 32, 1, False),
        Collective("all-reduce", 32, 1, True),
        Collective("all-reduce", 16, 1, False),
        Collective("collective-permute", 32, 1, False),
    ]


@pytest.mark.newest
@pytest.mark.parametrize("method", ["gathered", "ring"])
def test_no_matrix_is_kept(method):
    """Memory beside arguments and results, with 4 times the pairs: 4 times as much, not 16."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))

    def temporaries(n: int) -> int:
        loss = jax.value_and_grad(make_loss(mesh=mesh, method=method, tile=64), argnums=(0, 1, 2), has_aux=True)
        rows = jax.ShapeDtypeStruct((n, 32), jnp.float32, sharding=batch_sharding(mesh))
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
        memory = jax.jit(loss).lower(rows, rows, scale).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(32_768) < 4.5 * temporaries(8_192)


def test_auto_chooses_by_pairs_per_device_memory_and_slices(monkeypatch):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    assert choose_method(LossMethod.AUTO, mesh, 8 * 1024 - 8) is LossMethod.GATHERED
    assert choose_method(LossMethod.AUTO, mesh, 8 * 1024) is LossMethod.RING
    assert choose_method(LossMethod.GATHERED, mesh, 1 << 20) is LossMethod.GATHERED
    assert choose_method(LossMethod.AUTO, None, 1 << 20) is LossMethod.GATHERED
    monkeypatch.setattr("clipjax.losses.topology.memory_bytes", lambda kind: 1e6)  # a megabyte
    assert choose_method(LossMethod.AUTO, mesh, 80, pair_bytes=1000) is LossMethod.GATHERED
    assert choose_method(LossMethod.AUTO, mesh, 120, pair_bytes=1000) is LossMethod.RING
    assert choose_method(LossMethod.AUTO, make_mesh(MeshConfig(slice=2)), 1 << 20) is LossMethod.GATHERED


@pytest.mark.newest
@pytest.mark.parametrize("options", [{"kind": "hinge"}, {"method": "tree"}, {"dtype": "int8"}, {"group_role": "no"}])
def test_what_is_unknown_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        make_loss(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "sigmoid", "label_smoothing": 0.1}, "label_smoothing=0.1 needs kind=softmax"),
        ({"group_role": "positive", "label_smoothing": 0.1}, "label_smoothing=0.1 needs"),
        ({"kind": "global", "group_role": "positive"}, "group_role=positive needs"),
        ({"rho": 6.5}, "rho=6.5 .* need kind=global; kind=softmax would ignore them"),
        ({"kind": "sigmoid", "epsilon": 1e-3}, "need kind=global"),
        ({"kind": "global", "rho": 6.5, "distill_weight": 1.0}, "rho=6.5 would divide"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"tile": 0}, "tile=0 must be at least 1"),
        ({"distill_weight": 0.0}, "distill_weight=0.0 must be greater than 0"),
        ({"kind": "global", "epsilon": 0.0}, "epsilon=0.0 must lie between 0 and 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        make_loss(**options)


def test_what_a_loss_is_given_must_be_what_it_uses():
    image, text = map(jnp.asarray, inputs(8))
    scale, teacher = jnp.float32(10), Teacher(image, text, jnp.float32(20))
    memory = MovingAverages(jnp.zeros((8, 2)), jnp.float32(0.5))
    with pytest.raises(ValueError, match="needs group"):
        make_loss(group_role="positive")(image, text, scale)
    with pytest.raises(ValueError, match="needs teacher"):
        make_loss(distill_weight=1.0)(image, text, scale)
    with pytest.raises(ValueError, match="needs memory"):
        make_loss(kind="global")(image, text, scale)
    with pytest.raises(ValueError, match="ignore teacher"):
        make_loss()(image, text, scale, teacher=teacher)
    with pytest.raises(ValueError, match="ignore group"):
        make_loss(label_smoothing=0.1)(image, text, scale, group=jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match="ignore memory"):
        make_loss()(image, text, scale, memory=memory)


def test_a_student_that_is_its_teacher_has_no_gradient_from_it():
    image, text = map(jnp.asarray, inputs(24))
    scale = jnp.float32(20)

    def gradient(weight: float):
        loss = make_loss(distill_weight=weight, tile=7)
        return jax.grad(lambda image: loss(image, text, scale, teacher=Teacher(image, text, scale))[0])(image)

    plain = jax.grad(lambda image: make_loss()(image, text, scale)[0])(image)
    np.testing.assert_allclose(gradient(5.0), plain, rtol=0, atol=1e-6 * float(jnp.abs(plain).max()))


def with_memory(loss, memory: MovingAverages):
    """The loss as `evaluate` takes it, with the new moving averages in the place of metrics."""

    def run(*arguments, group):
        results = loss.evaluate(*arguments, LossInputs(group, memory=memory))
        return results.loss, results.log_mean

    return run


def test_the_global_loss_of_one_whole_dataset_in_a_batch_is_the_softmax():
    """With gamma 1 and epsilon 1 / (n - 1), log(epsilon + u) is the softmax's loss, less log(n - 1)."""
    image, text = map(jnp.asarray, inputs(24))
    memory = MovingAverages(jnp.full((24, 2), -3.0), jnp.float32(1))
    value, grads, _ = evaluate(make_loss(), image, text, 14.3)
    loss = make_loss(kind="global", epsilon=1 / 23)
    found, found_grads, log_mean = evaluate(with_memory(loss, memory), image, text, 14.3)
    assert float(found) == pytest.approx(float(value) - np.log(23), rel=1e-6)
    for name in ("image", "text", "scale"):
        np.testing.assert_allclose(found_grads[name], grads[name], rtol=1e-4, atol=1e-7)
    assert log_mean.shape == (24, 2)


def test_a_pair_without_negatives_keeps_its_memory():
    image, text = map(jnp.asarray, inputs(8))
    memory = MovingAverages(jnp.full((8, 2), -2.0), jnp.float32(0.2))
    loss = make_loss(kind="global")
    alone = LossInputs(jnp.zeros(8, jnp.int32), memory=memory)
    assert (loss.evaluate(image, text, jnp.float32(10), None, alone).log_mean == -2).all()


def test_a_scale_of_100_overflows_no_memory():
    image, text = np.eye(8, 64, dtype=np.float32), -np.eye(8, 64, dtype=np.float32)  # logits differ by 100
    memory = MovingAverages(jnp.full((8, 2), -jnp.inf), jnp.float32(0.2))
    loss = make_loss(kind="global")
    value, grads, log_mean = evaluate(with_memory(loss, memory), image, text, 100.0)
    assert float(value) == pytest.approx(100, rel=1e-6)
    assert np.isfinite(log_mean).all() and all(np.isfinite(grad).all() for grad in grads.values())
