"""Which collectives a compiled program has: on simulated devices, against what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clipjax.config import Config, MeshConfig
from clipjax.planning import hlo, traffic
from clipjax.runtime import sharding
from clipjax.runtime.chips import CHIPS
from clipjax.training.program import build_program

pytestmark = pytest.mark.newest


def found(function, in_spec, out_spec, shape=(64, 128)):
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=4))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
    return traffic.collectives(hlo.parse(text), mesh, CHIPS["h100"])


@pytest.mark.parametrize(("axis", "size"), [("data", 2), ("fsdp", 4)])
def test_an_all_reduce_sends_twice_what_the_others_have(axis, size):
    (one,) = found(lambda x: jax.lax.psum(x, axis), PartitionSpec(), PartitionSpec())
    assert (one.kind, one.axis, one.count) == ("all-reduce", axis, 1)
    assert one.bytes == 2 * 64 * 128 * 4 * (size - 1) // size
    assert one.seconds == pytest.approx(one.bytes / CHIPS["h100"].link_bandwidth)


def test_an_all_gather_over_two_axes_names_both():
    axes = ("data", "fsdp")
    (one,) = found(lambda x: jax.lax.all_gather(x, axes, tiled=True), PartitionSpec(axes), PartitionSpec())
    assert (one.kind, one.axis) == ("all-gather", "data+fsdp")
    assert one.bytes == 64 * 128 * 4 * 7 // 8


def test_what_runs_in_a_loop_counts_each_time():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "data") / 2, None), x, length=6)[0]

    (one,) = found(loop, PartitionSpec(), PartitionSpec())
    assert one.count == 6
    assert one.bytes == 6 * 64 * 128 * 4


def test_a_permutation_sends_all_of_it():
    shift = [(i, (i + 1) % 2) for i in range(2)]
    (one,) = found(lambda x: jax.lax.ppermute(x, "data", shift), PartitionSpec(), PartitionSpec())
    assert (one.kind, one.axis, one.bytes) == ("collective-permute", "neighbours", 64 * 128 * 4)


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize(
    ("transfer", "share"),
    [
        ("ALL_REDUCE", lambda n: 2 * (n - 1) / n),
        ("ALL_GATHER", lambda n: n - 1),
        ("REDUCE_SCATTER", lambda n: (n - 1) / n),
        ("ONE_TO_ONE", lambda n: 1),
    ],
)
def test_the_network_between_slices_does_whole_collectives(transfer, share, slices):
    """As libtpu 0.0.42.1 writes them: one send of a chip's part, and what is to become of it."""
    text = f"""HloModule step, entry_computation_layout={{()->f32[32,64]{{1,0}}}}

ENTRY %main (part: f32[32,64]) -> f32[32,64] {{
  %part = f32[32,64]{{1,0}} parameter(0)
  %token = token[] after-all()
  %send = (f32[32,64]{{1,0}}, u32[], token[]) send(%part, %token), channel_id=5, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="{transfer}"}}
  %done = token[] send-done(%send), channel_id=5
  ROOT %result = f32[32,64]{{1,0}} copy(%part)
}}
"""
    mesh = sharding.make_mesh(MeshConfig(slice=slices, data=8 // slices))
    (one,) = traffic.collectives(hlo.parse(text), mesh, CHIPS["v5e"])
    assert (one.kind, one.axis, one.bytes) == ("send", "slice", 32 * 64 * 4 * share(slices))
    assert one.seconds == pytest.approx(one.bytes / CHIPS["v5e"].network_bandwidth)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_notation(text, groups):
    instruction = hlo.Instruction("x", "all-reduce", "f32[]", (), text, "")
    np.testing.assert_array_equal(traffic.replica_groups(instruction, 4), groups)


def test_groups_in_an_unknown_notation_are_no_guess():
    instruction = hlo.Instruction("x", "all-reduce", "f32[]", (), "replica_groups=mesh['a'=4] {'a':(1)2}", "")
    with pytest.raises(ValueError, match="form that is not known"):
        traffic.replica_groups(instruction, 4)


def test_a_steps_gradients_are_no_less_than_the_least():
    """Data parallel only: what the program sends for gradients is what no program can do without."""
    from tests.planning.test_plan import tiny

    config: Config = tiny()
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        program = build_program(config, mesh, num_samples=1000)
        state = program.abstract_state
        text = program.jit(state).lower(state, program.abstract_batch(), None).compile().as_text()
    least = traffic.min_traffic_bytes(config, state.params, mesh)
    sent = sum(one.bytes for one in traffic.collectives(hlo.parse(text), mesh, CHIPS["h100"]))
    assert set(least) == {"data"}
    assert least["data"] <= sent < 1.2 * least["data"]


TPU_TEXT = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[64,32]) -> f32[16,32] {
  %input = f32[64,32] parameter(0)
  %all-reduce = f32[64,32] all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = f32[16,32] dynamic-slice(%all-reduce, %at, %at), dynamic_slice_sizes={16,32}
}

%start (p: f32[16,32]) -> (f32[16,32], f32[64,32]) {
  %p = f32[16,32] parameter(0)
  %gathers = f32[64,32] all-gather(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %begun = (f32[16,32], f32[64,32]) custom-call(%gathers), custom_call_target="AsyncCollectiveStart"
}

%done (q: f32[16,32]) -> f32[64,32] {
  %q = f32[16,32] parameter(0)
  %again = f32[64,32] all-gather(%q), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %ended = f32[64,32] custom-call(%q, %again), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32] parameter(0)
  %scattered = f32[16,32] fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %begins = (f32[16,32], f32[64,32]) fusion(%scattered), kind=kCustom, calls=%start
  ROOT %ends = f32[64,32] fusion(%scattered), kind=kCustom, calls=%done
}
"""


def test_what_a_tpus_compiler_writes_as_fusions():
    """A reduce-scatter is an all-reduce of which a part is kept, and waits; a gather that is started does not."""
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=4))
    gather, scatter = sorted(traffic.collectives(hlo.parse(TPU_TEXT), mesh, CHIPS["v5e"]), key=lambda one: one.kind)
    sent = 64 * 32 * 4 * 3 // 4
    assert (scatter.kind, scatter.axis, scatter.bytes, scatter.overlapped) == ("reduce-scatter", "fsdp", sent, False)
    assert (gather.kind, gather.count, gather.bytes, gather.overlapped) == ("all-gather", 1, sent, True)


GPU_TEXT = """HloModule m, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%twice (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32] parameter(0)
  ROOT %both = f32[64,32] add(%p, %p)
}

ENTRY %main (a: f32[64,32]) -> (f32[64,32], f32[64,32], f32[64,32]) {
  %a = f32[64,32] parameter(0)
  %first = f32[64,32] all-reduce-start(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %work = f32[64,32] fusion(%a), kind=kLoop, calls=%twice
  %summed = f32[64,32] all-reduce-done(%first)
  %second = f32[64,32] all-reduce-start(%work), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %waited = f32[64,32] all-reduce-done(%second)
  ROOT %all = (f32[64,32], f32[64,32], f32[64,32]) tuple(%summed, %work, %waited)
}
"""


def test_what_is_waited_for_at_once_is_not_hidden():
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=4))
    found = traffic.collectives(hlo.parse(GPU_TEXT), mesh, CHIPS["h100"])
    assert {one.axis: one.overlapped for one in found} == {"fsdp": True, "data": False}
