"""The training step with rows of patches: the loss of the unpacked model, on any mesh, and no shape but the menu's."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clipjax.checkpoints.records import pack_tokenizer
from clipjax.config import Config, Crop, DataConfig, ImagePool, MeshConfig, ResNetConfig, ViTConfig
from clipjax.data.patch_rows import make_patch_rows
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.losses import LossInputs
from clipjax.pytrees import leaf_paths
from clipjax.runtime import sharding
from clipjax.training.inputs import check_same_inputs
from clipjax.training.program import Program, build_program
from clipjax.training.stream import device_batch
from tests.training.test_step import small_config

MOST, BATCH = 20, 32
NO_CLASS_TOKEN: dict[str, Any] = {"class_token": False, "pool": ImagePool.AVERAGE}


def config(images_per_row: int = 1, menu: tuple[int, ...] = (), **fields) -> Config:
    run = small_config()
    image = dataclasses.replace(run.model.image, patch_size=4, max_patches=MOST, **NO_CLASS_TOKEN)
    run.model = dataclasses.replace(run.model, image=image)
    packing = {"images_per_row": images_per_row, "enlarge": False, "patch_menu": menu, "crop": Crop.CENTER}
    run = dataclasses.replace(run, data=DataConfig(train="test", **packing), global_batch_size=BATCH, **fields)
    return run


def rows(run: Config, step: int = 1) -> dict[str, np.ndarray]:
    """A batch of pictures of many sizes, the same ones however they are packed."""
    rng, per_row = np.random.default_rng(0), run.data.images_per_row
    sizes = rng.integers(4, 18, (BATCH, 2))
    pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    tokens = rng.integers(1, 62, (BATCH, 8)).astype(np.int32)
    tokens[:, -1] = 63
    make = make_patch_rows(run)
    assert make is not None
    packed = [make([(picture, rng) for picture in pictures[i : i + per_row]], step) for i in range(0, BATCH, per_row)]
    pixels = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return {**pixels, "tokens": tokens, "skip_reason": np.full(BATCH, -1, np.int32), "index": np.arange(BATCH)}


def make_mesh(devices: int) -> Mesh:
    return sharding.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])


def gradients(run: Config, devices: int) -> tuple[Program, dict[str, np.ndarray], float]:
    mesh = make_mesh(devices)
    program = build_program(run, mesh, num_samples=100)
    step = program.train_step

    def compute(state, batch):
        return step.gradients(state.params, {}, step.with_images(batch), LossInputs(), state.key)

    with jax.set_mesh(mesh):
        state, batch = program.fresh_state(), device_batch(run, mesh, rows(run))
        grads, aux = jax.device_get(jax.jit(compute)(state, batch))
    return program, dict(zip(leaf_paths(grads), jax.tree.leaves(grads), strict=True)), float(aux.loss)


@pytest.fixture(scope="module")
def unpacked():
    return gradients(config(), 1)[1:]


@pytest.mark.parametrize(
    ("per_row", "devices", "microbatch"), [(4, 1, None), (4, 8, None), (1, 8, None), (8, 4, None), (4, 2, 16)]
)
def test_loss_and_gradients_are_those_of_one_picture_in_a_row(unpacked, per_row, devices, microbatch):
    """Tolerance: the same sums in another order; 1e-5 of a leaf's norm."""
    expected, loss = unpacked
    menu = () if per_row == 1 else (12,)
    _, found, packed_loss = gradients(config(per_row, menu, microbatch_size=microbatch), devices)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if np.linalg.norm(grad) > 1e-5:  # keys have no bias that changes anything
            assert np.linalg.norm(found[name] - grad) < 2e-5 * np.linalg.norm(grad), name


def test_the_pictures_of_these_tests_fit_and_leave_padding():
    alone, packed = rows(config()), rows(config(4, (12,)))
    assert sorted(alone["grid"].prod(-1).ravel()) == sorted(packed["grid"].prod(-1).ravel())
    assert 0 < (packed["segment"] < 0).mean() < (alone["segment"] < 0).mean()


def test_every_budget_is_compiled_before_the_first_step_and_nothing_else_ever(monkeypatch):
    run, mesh, lines = config(4, (8, 12)), make_mesh(2), []
    program = build_program(run, mesh, num_samples=100)
    with jax.set_mesh(mesh):
        step = program.compile_all(lines.append)
        assert [line.rpartition(" in ")[0] for line in lines] == [
            "compiled shape 1 of 2, 8 patches per image,",
            "compiled shape 2 of 2, 12 patches per image,",
            "compiled 2 shapes of the step",
        ]
        state = program.fresh_state()
        monkeypatch.setattr(jax.stages.Lowered, "compile", None)
        for menu in ((8,), (12,), (8,)):
            one = config(4, menu)
            batch = device_batch(one, mesh, rows(one))
            state, metrics = step(state, batch, None)
            padding = (np.asarray(batch["segment"]) < 0).mean()
            assert float(metrics["padding_share"]) == pytest.approx(padding)
        assert int(state.step) == 3
        other = config(4, (10,))
        with pytest.raises(RuntimeError, match=r"40 patches a row, none of the compiled 32, 48"):
            step(state, device_batch(other, mesh, rows(other)), None)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_promised_shapes_are_those_of_a_batch(devices):
    run, mesh = config(4, (8, 12)), make_mesh(devices)
    program = build_program(run, mesh, num_samples=100)
    one = config(4, (8,))
    with jax.set_mesh(mesh):
        found = device_batch(one, mesh, rows(one))
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(describe, dict(program.abstract_batch(8))) == jax.tree.map(describe, dict(found))
    assert program.abstract_batch()["patches"].shape == (8, 48, 48)


def teacher(image: object) -> types.SimpleNamespace:
    run = config()
    run.model = dataclasses.replace(run.model, image=image)
    return types.SimpleNamespace(config=run, records={"tokenizer": pack_tokenizer(BytesTokenizer())})


def test_a_teacher_takes_the_same_patches():
    image = config().model.image
    for other in ({"max_patches": 256}, {"image_size": 32}):
        check_same_inputs(config(), BytesTokenizer(), teacher(dataclasses.replace(image, **other)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ViTConfig(image_size=16, patch_size=4), r"model\.image\.max_patches=20 \(teacher: None\)"),
        (ResNetConfig(), r"model\.image\.max_patches=20 \(teacher: None\)"),
        (ViTConfig(image_size=16, patch_size=8, max_patches=20), r"model\.image\.patch_size=4 \(teacher: 8\)"),
    ],
)
def test_a_teacher_of_other_pictures_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        check_same_inputs(config(), BytesTokenizer(), teacher(image))  # type: ignore[arg-type]


@pytest.mark.parametrize("microbatch", [None, 16])
def test_a_teacher_sees_each_picture_as_if_alone(microbatch):
    found = []
    for run in (config(), config(4, (12,), microbatch_size=microbatch)):
        mesh = make_mesh(2)
        step = build_program(run, mesh, num_samples=100, teacher=config()).train_step
        assert step.teacher_forward is not None
        with jax.set_mesh(mesh):
            clip = step.teacher_forward.clip
            params, batch = jax.jit(clip.init)(jax.random.key(1)), device_batch(run, mesh, rows(run))
            encoded = jax.jit(step.teacher_forward)(params, step.with_images(batch), jax.random.key(0))
        found.append(jax.device_get(encoded.image_embed))
    assert found[0].shape == (BATCH, 32)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
