"""The softmax loss against float64 NumPy, and the sharded loss against the reference on every mesh.

Tolerance: float32 products of unit vectors of 64 numbers, scaled by 100 at most, are good to about 1e-6 relative; the
bound for loss and gradients is the house's 2e-6 (relative norm).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from clipjax.config import MeshConfig
from clipjax.losses import make_loss, softmax_loss
from clipjax.sharding import batch_sharding, make_mesh, replicated

TOLERANCE = 2e-6
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (4, 1, 2), (2, 2, 2), (8, 1, 1), (1, 8, 1)]


def embeddings(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, 64))
    image = text + 4 * rng.normal(
        size=(n, 64)
    )  # hard enough that the loss is not tiny: rounding is relative to the logits
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def numpy_loss_and_grads(image: np.ndarray, text: np.ndarray, scale: float):
    """Loss and gradients by hand, in float64."""
    image, text, scale = image.astype(np.float64), text.astype(np.float64), float(scale)
    n = len(image)
    cosine = image @ text.T
    logits = scale * cosine

    def softmax(x, axis):
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    rows, columns = softmax(logits, 1), softmax(logits, 0)
    loss = -(np.log(np.diag(rows)).mean() + np.log(np.diag(columns)).mean()) / 2
    grad = (rows + columns - 2 * np.eye(n)) / (2 * n)
    terms = grad * cosine
    # The scale's gradient is a sum that cancels: its error is measured against the size of its terms.
    return loss, (scale * grad @ text, scale * grad.T @ image, terms.sum()), np.abs(terms).sum()


def worst(grads, expected, scale_size: float) -> float:
    scale_error = abs(float(grads[2]) - expected[2]) / scale_size
    return max(*map(relative, grads[:2], expected[:2]), scale_error)


def relative(ours, theirs) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_reference_agrees_with_float64(scale):
    image, text = embeddings(48)
    (loss, _), grads = jax.value_and_grad(softmax_loss, argnums=(0, 1, 2), has_aux=True)(
        image, text, jnp.float32(scale)
    )
    expected, *expected_grads = numpy_loss_and_grads(image, text, scale)
    assert relative(loss, expected) < TOLERANCE
    assert worst(grads, *expected_grads) < TOLERANCE


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gathered_loss_agrees_with_float64_on_every_mesh(sizes):
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    image, text = embeddings(48)
    scale = 30.0
    loss = jax.jit(jax.value_and_grad(make_loss(method="gathered", mesh=mesh), argnums=(0, 1, 2), has_aux=True))
    split = batch_sharding(mesh)
    (value, metrics), grads = loss(
        jax.device_put(image, split), jax.device_put(text, split), jax.device_put(jnp.float32(scale), replicated(mesh))
    )
    expected, *expected_grads = numpy_loss_and_grads(image, text, scale)
    assert relative(value, expected) < TOLERANCE
    assert worst(grads, *expected_grads) < TOLERANCE
    assert isinstance(grads[0].sharding, NamedSharding)
    assert grads[0].sharding.is_equivalent_to(split, 2)
    reference = softmax_loss(image, text, jnp.float32(scale))[1]
    for name in reference:
        assert float(metrics[name]) == pytest.approx(float(reference[name]), abs=1e-6)


def test_cotangent_scales_the_gradient():
    mesh = make_mesh(MeshConfig(), jax.devices())
    image, text = embeddings(16)
    loss = make_loss(mesh=mesh)
    plain, tripled = (
        jax.grad(lambda x, factor=factor: factor * loss(x, text, jnp.float32(10), None)[0])(image)
        for factor in (1.0, 3.0)
    )
    np.testing.assert_allclose(tripled, 3 * plain, rtol=1e-6)


def test_what_moves_is_the_embeddings_once():
    """Forward and backward together: two gathers of embeddings, two of log-sum-exps, and sums of scalars only."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    n, e = 64, 32
    loss = jax.value_and_grad(make_loss(mesh=mesh), argnums=(0, 1, 2), has_aux=True)
    rows = jax.ShapeDtypeStruct((n, e), jnp.float32, sharding=batch_sharding(mesh))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    text = jax.jit(loss).lower(rows, rows, scale).compile().as_text()
    lines = [line.split(" = ")[1] for line in text.splitlines() if " = " in line]
    gathers = [line for line in lines if "all-gather(" in line or "all-gather-start(" in line]
    sums = [line for line in lines if "all-reduce(" in line or "all-reduce-start(" in line]
    assert not [line for line in lines if "reduce-scatter(" in line or "all-to-all(" in line]
    gathered = sum(int(np.prod([int(d) for d in shape.split(",")])) for line in gathers for shape in shapes_of(line))
    assert gathered == 2 * n * e + 2 * n
    summed = sum(int(np.prod([int(d) for d in shape.split(",") if d])) for line in sums for shape in shapes_of(line))
    assert summed <= 8


def shapes_of(line: str) -> list[str]:
    """Dimensions of an instruction's results: `f32[64,32]{1,0} all-gather(...)` or a tuple of such."""
    import re

    return re.findall(r"f32\[([\d,]*)\]", re.split(r" all-(?:gather|reduce)", line)[0])


def test_perfect_and_opposite_pairs_stay_finite():
    image = np.eye(8, 64, dtype=np.float32)
    for text in (image, -image, np.repeat(image[:1], 8, axis=0)):
        (loss, _), grads = jax.value_and_grad(softmax_loss, argnums=(0, 1, 2), has_aux=True)(
            image, text, jnp.float32(100)
        )
        assert np.isfinite(loss)
        assert all(np.isfinite(grad).all() for grad in grads)


def test_identical_captions_give_log_n():
    image = np.repeat(np.eye(1, 64, dtype=np.float32), 8, axis=0)
    # Log-sum-exps near 102 are 7.6e-6 apart in float32.
    assert float(softmax_loss(image, image, jnp.float32(100))[0]) == pytest.approx(np.log(8), abs=7.7e-6)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="hinge"):
        make_loss(kind="hinge")
