"""Reading a compiled program: how often what runs, its products and what it touches."""

import jax
import jax.numpy as jnp
import pytest

from clipjax.planning import hlo

LOOP = """HloModule jit_f, is_scheduled=true

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]) parameter(0)
  %bound = s32[] constant(12)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%fused (a: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %a = f32[12,8,16]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %slice = f32[8,16]{1,0} dynamic-slice(%a, %i.1), dynamic_slice_sizes={1,8,16}
}

%body (p.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.1 = (s32[], f32[8,16]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p.1), index=1
  %i.2 = s32[] get-tuple-element(%p.1), index=0
  %w = f32[16,16]{1,0} constant({...})
  %stack = f32[12,8,16]{2,1,0} constant({...})
  %read = f32[8,16]{1,0} fusion(%stack, %i.2), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %kernel = f32[8,16] custom-call(%read), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"matrix_flops":"7",
"vector_operations":"9"
}}, metadata={op_name="jit(f)/attention/pallas_call"}
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,16]) tuple(%i.2, %y)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]) tuple(%zero, %x.1)
  %loop = (s32[], f32[8,16]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""

pytestmark = pytest.mark.newest


def test_a_loops_body_counts_as_often_as_it_runs():
    program = hlo.parse(LOOP)
    times = {instruction.name: times for instruction, times in program.executed()}
    assert times["loop"] == 1
    assert times["y"] == times["read"] == 12
    assert program.flops() == 12 * 2 * 8 * 16 * 16


def test_what_a_kernel_says_of_itself_belongs_to_its_instruction():
    (kernel,) = (i for i, _ in hlo.parse(LOOP).executed() if i.opcode == "custom-call")
    assert kernel.op_name == "jit(f)/attention/pallas_call"
    assert '"vector_operations":"9"' in kernel.attributes


def test_of_an_array_that_is_looked_into_only_the_part_counts():
    program = hlo.parse(LOOP)
    (read,) = (i for i, _ in program.executed() if i.name == "read")
    assert program.bytes_accessed(read) == 2 * 8 * 16 * 4 + 4  # a slice in, a slice out, the index
    assert read.estimated_cycles == 100


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("hello")


def test_a_loop_without_a_bound_is_refused():
    program = hlo.parse(LOOP.replace("%bound = s32[] constant(12)", "%bound = s32[] parameter(1)"))
    with pytest.raises(ValueError, match="loop has no constant bound"):
        list(program.executed())


def test_the_products_of_a_compiled_program_are_those_that_were_written():
    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    compiled = jax.jit(f).lower(jnp.ones((32, 64)), jnp.ones((64, 64))).compile()
    assert hlo.parse(compiled.as_text()).flops() == 5 * 2 * 32 * 64 * 64


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[8,16]{1,0:T(8,128)}", 512),
        ("(bf16[4]{0}, s8[3]{0}, /*index=2*/pred[])", 8 + 3 + 1),
        ("s32[]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert hlo.bytes_of(shape) == expected


@pytest.mark.parametrize(
    ("window", "left", "right", "result", "products"),
    [
        ("size=3x3 pad=1_1x1_1", (2, 8, 8, 4), (3, 3, 4, 6), (2, 8, 8, 6), 22 * 22 * 2 * 4 * 6),  # borders not counted
        ("size=3x3 stride=2x2", (2, 9, 9, 4), (3, 3, 4, 6), (2, 4, 4, 6), 2 * 16 * 9 * 4 * 6),
        # A product for each of 5 rows, written as one convolution: every row meets its own kernel only.
        ("size=5x1 stride=4x1 lhs_dilate=5x1", (1, 5, 1, 4), (5, 1, 4, 6), (1, 5, 1, 6), 5 * 4 * 6),
    ],
)
def test_products_of_convolutions(window, left, right, result, products):
    shape = lambda dims: f"f32[{','.join(map(str, dims))}]"  # noqa: E731
    text = f"""HloModule m
ENTRY %main (x: f32[], w: f32[]) -> f32[] {{
  %x = {shape(left)} parameter(0)
  %w = {shape(right)} parameter(1)
  ROOT %y = {shape(result)} convolution(%x, %w), window={{{window}}}, dim_labels=b01f_01io->b01f
}}
"""
    assert hlo.parse(text).flops() == 2 * products
