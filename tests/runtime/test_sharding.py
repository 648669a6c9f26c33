"""The mesh and the rules: every parameter has one, and arrays lie where the rules say."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from clipjax.config import Config, MeshConfig, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.config.validation import validate_devices
from clipjax.models.clip import abstract_params, build_clip
from clipjax.models.towers import PARAMETER_RULES
from clipjax.pytrees import leaf_paths, map_with_path
from clipjax.runtime import sharding
from clipjax.runtime.sharding import make_mesh
from clipjax.training import optimizer
from clipjax.training.step import STATE_RULES, make_init_state

SMALL = ModelConfig(
    embed_dim=32,
    image=ViTConfig(image_size=16, patch_size=8, width=64, depth=2, num_heads=4),
    text=TextTransformerConfig(context_length=8, vocab_size=64, width=64, depth=2, num_heads=4),
)

pytestmark = pytest.mark.newest


def abstract_state(config: Config):
    clip = build_clip(config.model)
    init = make_init_state(config, clip.init, optimizer.make_tx(config, abstract_params(config.model)), num_samples=1)
    return init, jax.eval_shape(lambda: init(jax.random.key(0)))


def test_rules_cover_the_state_and_moments_follow_their_parameters():
    config = Config(model=SMALL)
    config.optim.ema_decay = 0.9
    _, state = abstract_state(config)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = {}
    map_with_path(
        lambda name, leaf: specs.setdefault(name, leaf.spec), sharding.state_shardings(mesh, state, STATE_RULES)
    )
    path = "image/transformer/blocks/mlp/fc_in/kernel"
    matching = [name for name in specs if name.endswith(path)]
    assert len(matching) == 4  # params, ema, first and second moment
    assert {specs[name] for name in matching} == {PartitionSpec(None, "fsdp", "tensor")}
    assert specs["params/log_logit_scale"] == PartitionSpec()


def test_a_parameter_without_a_rule_is_refused_by_name():
    mesh = sharding.make_mesh(MeshConfig())
    tree = {"image": {"novel": jnp.zeros((2, 2)), "other": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"image/novel \(2, 2\), image/other \(3,\)"):
        sharding.state_shardings(mesh, tree, PARAMETER_RULES)


@pytest.mark.heavy
def test_state_is_born_sharded_and_the_same_on_every_mesh():
    config = Config(model=SMALL)
    init, abstract = abstract_state(config)
    reference = jax.jit(lambda: init(jax.random.key(3)))()
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = sharding.state_shardings(mesh, abstract, STATE_RULES)
    state = jax.jit(lambda: init(jax.random.key(3)), out_shardings=shardings)()
    kernel = state.params["text"]["transformer"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.shape == (2, 64, 3, 4, 16)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 3, 2, 16)
    assert leaf_paths(state.params) == leaf_paths(reference.params)
    assert all(
        bool(jnp.array_equal(a, b))
        for a, b in zip(*map(jax.tree.leaves, (state.params, reference.params)), strict=True)
    )


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((4, 4))
    assert sharding.constrain(x, "batch", None) is x


class FakeDevice:
    """A device of a cluster, as far as a mesh asks."""

    platform, device_kind = "gpu", "fake"

    def __init__(self, number: int, process: int, slice_index: int) -> None:
        self.id, self.process_index, self.slice_index = number, process, slice_index


def ids(mesh) -> list:
    return [sorted(device.id for device in part.flat) for part in mesh.devices]


def test_slices_of_a_mesh_are_those_of_the_hardware_or_processes_in_order():
    nodes = [FakeDevice(i, i // 2, i // 4) for i in range(8)]
    assert ids(make_mesh(MeshConfig(), nodes)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh(MeshConfig(fsdp=2), nodes).shape == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="mesh.slice=4 must be 2, the slices of these devices"):
        make_mesh(MeshConfig(slice=4), nodes)
    one = [FakeDevice(i, (7 - i) // 2, 0) for i in range(8)]
    assert ids(make_mesh(MeshConfig(), one)) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert ids(make_mesh(MeshConfig(slice=2), one)) == [[4, 5, 6, 7], [0, 1, 2, 3]]  # the first two processes first


def test_slices_that_the_hardware_does_not_have_are_refused_before_a_mesh_exists():
    config = Config()
    config.data.train, config.mesh.slice = "tfds:scenes/train", 4
    with pytest.raises(ValueError, match="mesh.slice=4 must be 2, the slices of the hardware; None finds out"):
        validate_devices(config, num_devices=8, num_processes=2, num_slices=2)
    config.mesh.slice = None
    validate_devices(config, num_devices=8, num_processes=2, num_slices=2)


def test_a_teacher_that_the_mesh_cannot_split_is_refused():
    config, teacher = Config(), Config()
    config.data.train, config.mesh.tensor = "tfds:scenes/train", 4
    teacher.model.text.num_heads = 6
    with pytest.raises(ValueError, match="loss.distill_from: its model.text.num_heads=6 must be divisible by 4"):
        validate_devices(config, num_devices=8, num_processes=1, teacher=teacher)
