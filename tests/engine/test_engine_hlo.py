"""Counting a compiled program's work from its text. Oracles: hand calculations."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from cosmo.engine.scale import hlo, hlo_cost


def count(text: str) -> hlo_cost.Cost:
    return hlo_cost.cost(hlo.parse(textwrap.dedent(text)))


LOOP = """\
HloModule m, num_partitions=4

%product (p0: f32[8,16], p1: f32[16,32]) -> f32[8,32] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (c: (s32[], f32[8,16], f32[16,32], f32[8,32])) -> (s32[], f32[8,16], f32[16,32], f32[8,32]) {
  %c = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  %x = f32[8,16]{1,0} get-tuple-element(%c), index=1
  %w = f32[16,32]{1,0} get-tuple-element(%c), index=2
  %y = f32[8,32]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
  ROOT %t = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) tuple(%next, %x, %w, %y)
}

%condition (c: (s32[], f32[8,16], f32[16,32], f32[8,32])) -> pred[] {
  %c = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) parameter(0)
  %n = s32[] constant(24)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,16], w: f32[16,32]) -> f32[8,32] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %start = s32[] constant(FIRST)
  %zero = f32[8,32]{1,0} broadcast()
  %t = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) tuple(%start, %x, %w, %zero)
  %loop = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) while(%t), \
condition=%condition, body=%body
  ROOT %r = f32[8,32]{1,0} get-tuple-element(%loop), index=3
}
"""


@pytest.mark.parametrize("first, step, times", [(0, 1, 24), (4, 1, 20), (0, 2, 12), (1, 2, 12)])
def test_engine_hlo_a_loop_counts_as_often_as_it_runs(first, step, times):
    """A fused 8 x 16 x 32 product in a loop up to 24."""
    text = LOOP.replace("FIRST", str(first)).replace("STEP", str(step))
    assert count(text).matmul_flops == times * 2 * 8 * 16 * 32


def test_engine_hlo_a_loop_of_unknown_length_is_an_error():
    """Two constants in the condition: which is the limit? Property: never a guess."""
    text = LOOP.replace(
        "%n = s32[] constant(24)", "%n = s32[] constant(24)\n  %m = s32[] constant(9)"
    )
    with pytest.raises(ValueError, match="unknown number of runs of the loop loop"):
        count(text.replace("FIRST", "0").replace("STEP", "1"))


def module(*lines: str) -> str:
    """An entry computation of these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions=32\n\nENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n"


def test_engine_hlo_a_tpu_writes_batched_products_as_dilated_convolutions():
    """[B 8, H 32, T 512, K 64] x [.., S 512, K 64], and weights x values. By hand: 2 B H T S K."""
    scores = module(
        "%q = bf16[8,32,512,64]{3,2,1,0} parameter(0)",
        "%k = bf16[8,32,512,64]{3,2,1,0} parameter(1)",
        "ROOT %c = bf16[8,32,512,512]{2,3,1,0:T(8,128)(2,1)} convolution(%q, %k), "
        "window={size=8x32 stride=7x31 lhs_dilate=8x32}, dim_labels=01bf_01oi->01bf",
    )
    mixed = module(
        "%w = bf16[8,32,512,512]{3,2,1,0} parameter(0)",
        "%v = bf16[8,32,64,512]{3,2,1,0} parameter(1)",
        "ROOT %c = bf16[8,32,512,64]{2,3,1,0} convolution(%w, %v), window={size=8x32 stride=8x32 "
        "pad=7_7x31_31 lhs_dilate=7x31 rhs_reversal=1x1}, dim_labels=01fb_01oi->01bf",
    )
    for text in (scores, mixed):
        assert count(text).matmul_flops == 2 * 8 * 32 * 512 * 512 * 64


@pytest.mark.parametrize(
    "line, kind, group, size",
    [
        (
            "%g = bf16[64,128]{1,0} all-gather(%a), replica_groups=[2,16]<=[32], dimensions={0}",
            "all-gather",
            16,
            64 * 128 * 2,
        ),
        (
            "%g = bf16[4,128]{1,0} reduce-scatter(%big), replica_groups={{0,1},{2,3}}, "
            "to_apply=%add",
            "reduce-scatter",
            2,
            64 * 128 * 2,
        ),
        (
            "%g = (bf16[4,128]{1,0}, f32[8]{0}) all-reduce(%a, %b), replica_groups="
            "mesh['axis_0'=8,'axis_1'=4] {'axis_1'}, to_apply=%add",
            "all-reduce",
            4,
            4 * 128 * 2 + 8 * 4,
        ),
        (
            "%g = (bf16[4,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%a), dimensions={0}",
            "all-gather",
            32,
            64 * 128 * 2,
        ),
    ],
)
def test_engine_hlo_collectives(line, kind, group, size):
    """The larger of what goes in and what comes out, by kind and group. By hand."""
    text = module(
        "%a = bf16[4,128]{1,0} parameter(0)",
        "%b = f32[8]{0} parameter(1)",
        "%big = bf16[64,128]{1,0} parameter(2)",
        line,
    )
    assert count(text).collectives == {(kind, group): size}


def test_engine_hlo_a_collective_in_several_fusions_is_one():
    """Start, a product beside it, and end of one channel, and another channel. By hand: two."""
    gather = "all-gather(%p), channel_id={}, replica_groups=[1,32]<=[32], dimensions={{0}}"
    fused = "\n".join(
        f"%part{n} (p: bf16[4,128]) -> bf16[128,128] {{\n"
        "  %p = bf16[4,128]{1,0} parameter(0)\n"
        f"  ROOT %g{n} = bf16[128,128]{{1,0}} {gather.format(channel)}\n}}\n"
        for n, channel in enumerate((7, 7, 7, 8))
    )
    calls = (
        f"%f{n} = bf16[128,128]{{1,0}} fusion(%a), kind=kCustom, calls=%part{n}" for n in range(4)
    )
    text = module("%a = bf16[4,128]{1,0} parameter(0)", *calls)
    text = text.replace("ENTRY", fused + "\nENTRY")
    assert count(text).collective_bytes() == {"all-gather": 2 * 128 * 128 * 2}


def test_engine_hlo_a_fusion_does_not_move_what_its_collective_gathers():
    """A product of 8 x 4 x 128 beside a gather, whose arrays pass through. By hand, in bytes:
    the gather's 128 x 128 twice, once for all three fusions, and the product's three arrays."""
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,32]<=[32], dimensions={0}"
    part, whole, small = "bf16[4,128]{1,0}", "bf16[128,128]{1,0}", "bf16[8,4]{1,0}"
    fused = f"""\
%start (p: bf16[4,128]) -> (bf16[4,128], bf16[128,128]) {{
  %p = {part} parameter(0)
  %g = {whole} {gather}
  ROOT %s = ({part}, {whole}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%step (p: {part}, w: {whole}, x: {small}) -> (bf16[8,128], {part}, {whole}) {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %x = {small} parameter(2)
  %y = bf16[8,128]{{1,0}} dot(%x, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %g = {whole} {gather}
  ROOT %t = (bf16[8,128]{{1,0}}, {part}, {whole}) tuple(%y, %p, %g)
}}

%end (p: bf16[4,128], w: bf16[128,128]) -> bf16[128,128] {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %g = {whole} {gather}
  ROOT %d = {whole} custom-call(%p, %w, %g), custom_call_target="AsyncCollectiveDone"
}}

"""
    text = module(
        f"%a = {part} parameter(0)",
        f"%x = {small} parameter(1)",
        f"%s = ({part}, {whole}) fusion(%a), kind=kCustom, calls=%start",
        f"%s.0 = {part} get-tuple-element(%s), index=0",
        f"%s.1 = {whole} get-tuple-element(%s), index=1",
        f"%t = (bf16[8,128]{{1,0}}, {part}, {whole}) fusion(%s.0, %s.1, %x), kind=kOutput, "
        "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%step",
        f"ROOT %e = {whole} fusion(%s.0, %s.1), kind=kCustom, calls=%end",
    ).replace("ENTRY", fused + "ENTRY")
    assert count(text).hbm_bytes == 2 * 128 * 128 * 2 + 2 * (8 * 4 + 4 * 128 + 8 * 128)


def test_engine_hlo_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter():
    """As libtpu writes it. By hand: 64 x 128 bfloat16, of which 3/4 arrive, once; or twice."""
    lines = (
        "%a = bf16[64,128]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%r = bf16[64,128]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}",
    )
    fused = "\n  ".join(
        (*lines, "ROOT %s = bf16[16,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16}")
    )
    call = "ROOT %f = bf16[16,128]{1,0} fusion(%a, %i), kind=kCustom, calls=%scatter"
    scattered = module(*lines[:2], call).replace(
        "ENTRY", f"%scatter (a: bf16[64,128]) -> bf16[16,128] {{\n  {fused}\n}}\n\nENTRY"
    )
    size = 64 * 128 * 2
    assert count(scattered).link_bytes() == {"reduce-scatter": size * 3 / 4}
    assert count(module(*lines)).link_bytes() == {"all-reduce": 2 * size * 3 / 4}


def test_engine_hlo_memory_traffic_of_a_slice_is_the_slice():
    """A fusion reads one layer of a stack: [24, 64] f32 in, [64] out, not the whole stack."""
    fused = """\
%pick (s: f32[24,64], i: s32[]) -> f32[64] {
  %s = f32[24,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,64]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

"""
    text = module(
        "%stack = f32[24,64]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "ROOT %f = f32[64]{0} fusion(%stack, %i), kind=kLoop, calls=%pick",
    ).replace("ENTRY", fused + "ENTRY")
    assert count(text).hbm_bytes == 64 * 4 + 64 * 4 + 4


@pytest.mark.parametrize(
    "line, size",
    [
        # A quarter of [16, 64] into on-chip memory: read alone.
        ("((f32[16,64]{1,0}), f32[4,64]{1,0:S(3)}, s32[]{:S(2)}) slice-start(%a)", 4 * 64 * 4),
        # All of it, into on-chip memory and into main memory.
        ("(f32[16,64]{1,0:S(1)}, f32[16,64]{1,0}, u32[]{:S(2)}) copy-start(%a)", 16 * 64 * 4),
        ("(f32[16,64]{1,0}, f32[16,64]{1,0}, u32[]{:S(2)}) copy-start(%a)", 2 * 16 * 64 * 4),
    ],
)
def test_engine_hlo_an_asynchronous_copy_moves_its_target(line, size):
    """The tuple of a start names the source too, which is not moved again."""
    text = module("%a = f32[16,64]{1,0} parameter(0)", f"%s = {line}, slice={{[0:4], [0:64]}}")
    assert count(text).hbm_bytes == size


def test_engine_hlo_an_asynchronous_copy_out_of_the_chip_is_written_alone():
    """From on-chip memory S(3) to main memory."""
    text = module(
        "%a = f32[16,64]{1,0:S(3)} parameter(0)",
        "%s = (f32[16,64]{1,0}, f32[16,64]{1,0:S(3)}, u32[]{:S(2)}) copy-start(%a)",
    )
    assert count(text).hbm_bytes == 16 * 64 * 4


def test_engine_hlo_counts_what_xla_really_compiles(jit):
    """A scan of 5 products of [7, 16] by [16, 16], compiled here. By hand."""

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    compiled = jit(run).lower(jnp.zeros((7, 16)), jnp.zeros((5, 16, 16))).compile()
    assert count(compiled.as_text()).matmul_flops == 5 * 2 * 7 * 16 * 16
