"""The training step with pictures that the devices resize: the step of the resized pictures, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clipjax.config import Config, DataConfig, MeshConfig, ResizeOn
from clipjax.models.device_resize import resize_crops
from clipjax.planning.measure import make_batch
from clipjax.runtime import sharding
from clipjax.training.device_resize import build_device_resize
from clipjax.training.program import build_program
from clipjax.training.stream import device_batch
from tests.training.test_step import batch, small_config

CANVAS = 24


def config(**fields) -> Config:
    data = DataConfig(train="test", resize_on=ResizeOn.DEVICE, canvas_size=CANVAS)
    return dataclasses.replace(small_config(), data=data, **fields)


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def canvases(rng: np.random.Generator) -> dict[str, np.ndarray]:
    images = rng.integers(0, 256, (16, CANVAS, CANVAS, 3)).astype(np.uint8)
    crops = np.array([[1, 2.5, 17, 18, 22, 24, i % 2] for i in range(16)], np.float32)
    return {**batch(), "image": images, "crop": crops, "index": np.arange(16)}


def step(run: Config, rows: dict[str, np.ndarray], sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    mesh = make_mesh(*sizes)
    program = build_program(run, mesh, num_samples=100)
    with jax.set_mesh(mesh):
        state = program.fresh_state()
        global_rows = device_batch(run, mesh, rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), dict(program.abstract_batch())) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), dict(global_rows)
        )
        return jax.device_get(program.jit(program.abstract_state)(state, global_rows, None)[1])


@pytest.mark.parametrize(
    ("sizes", "microbatch"),
    [
        ((8, 1, 1), None),
        ((2, 1, 1), 8),
        pytest.param((2, 2, 2), None, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
    ],
)
def test_the_step_is_that_of_resized_pictures(sizes, microbatch):
    run, rows = config(microbatch_size=microbatch), canvases(np.random.default_rng(0))
    found = step(run, rows, sizes)
    canvas, crop = jnp.asarray(rows["image"]), jnp.asarray(rows["crop"])
    resized = np.asarray(resize_crops(canvas, crop, 16, run.data.interpolation))
    on_host = dataclasses.replace(run, data=DataConfig(train="test"))
    expected = step(on_host, {**rows, "image": resized}, sizes)
    for name, value in expected.items():
        # The same pixels; another program may add in another order.
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("batch_size", "devices", "parts"), [(1024, 1, 16), (1024, 8, 2), (16, 8, 1), (8 * 67, 8, 67)])
def test_few_pictures_at_a_time(batch_size, devices, parts):
    mesh = make_mesh(devices)
    resize = build_device_resize(config(global_batch_size=batch_size), mesh)
    assert resize is not None and batch_size // resize.microbatches.size == parts


def test_noise_for_measuring_has_whole_canvases():
    program = build_program(config(), make_mesh(1), num_samples=100)
    made = make_batch(program.abstract_batch())
    assert made["image"].shape == (16, CANVAS, CANVAS, 3)
    np.testing.assert_array_equal(made["crop"][3], [0, 0, CANVAS, CANVAS, CANVAS, CANVAS, 0])
