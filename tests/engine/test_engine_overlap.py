"""Exposed time of collectives in a compiled program. Oracles: hand calculations."""

import pytest

from cosmo.engine.scale import chips, hlo, overlap

# In each program: a product of 2 * 1000 * 1000 * 1000 operations takes 2 ms, and four devices
# gather 4 MB, of which three quarters arrive in 3 ms, at these round peaks. Memory is no limit.
CHIP = chips.Chip("round", 1e12, None, 1e15, 1e9, "round")
PRODUCT = "f32[1000,1000]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
GROUPS = "replica_groups={{0,1,2,3}}"
GATHER = f"all-gather-start(%part), dimensions={{0}}, {GROUPS}"
STARTED = f"(f32[250,1000]{{1,0}}, f32[1000,1000]{{1,0}}) {GATHER}"
DONE = "f32[1000,1000]{1,0} all-gather-done"
ARGUMENTS = (
    "%a = f32[1000,1000]{1,0} parameter(0)",
    "%part = f32[250,1000]{1,0} parameter(1)",
)


def exposed(*lines: str, others: str = "") -> dict[str, float]:
    """The exposed milliseconds by kind of an entry computation of these lines."""
    body = "\n".join(f"  {line}" for line in (*ARGUMENTS, *lines))
    text = f"HloModule m, is_scheduled=true, num_partitions=4\n\n{others}\n"
    text += f"ENTRY %main (a: f32[1000,1000], part: f32[250,1000]) -> f32[] {{\n{body}\n}}\n"
    found = overlap.exposed_seconds(hlo.parse(text), CHIP)
    return {kind: 1000 * seconds for kind, seconds in found.items()}


def test_engine_overlap_a_synchronous_collective_is_exposed_whole():
    """Products before and after hide nothing. An all-reduce receives its bytes twice: 6 ms."""
    assert exposed(
        f"%before = {PRODUCT}",
        f"%g = f32[1000,1000]{{1,0}} all-gather(%part), dimensions={{0}}, {GROUPS}",
        f"%s = f32[1000,1000]{{1,0}} all-reduce(%a), {GROUPS}, to_apply=%add",
        f"%after = {PRODUCT}",
    ) == pytest.approx({"all-gather": 3, "all-reduce": 6})


@pytest.mark.parametrize("products, left", [(0, 3), (1, 1), (2, 0), (5, 0)])
def test_engine_overlap_products_between_start_and_done_hide(products, left):
    """3 ms of links beside 2 ms a product; those outside of the pair count nothing."""
    between = [f"%between.{number} = {PRODUCT}" for number in range(products)]
    lines = (f"%s = {STARTED}", *between, f"%d = {DONE}(%s)")
    found = exposed(f"%before = {PRODUCT}", *lines, f"%after = {PRODUCT}")
    assert found == pytest.approx({"all-gather": left})


def test_engine_overlap_two_collectives_share_the_work_beside_them():
    """3 + 3 ms of links, 4 ms of products: the first to start is hidden first, whole."""
    permute = "(f32[1000,1000]{1,0}, f32[1000,1000]{1,0}, u32[], u32[]) collective-permute-start"
    lines = (
        f"%s.1 = {STARTED}",
        f"%s.2 = {permute}(%a), source_target_pairs={{{{0,1}},{{1,0}}}}, {GROUPS}",
        f"%p.1 = {PRODUCT}",
        f"%p.2 = {PRODUCT}",
        f"%d.1 = {DONE}(%s.1)",
        "%d.2 = f32[1000,1000]{1,0} collective-permute-done(%s.2)",
    )
    # The permutation's tuple has 8 bytes more, which count too.
    expected = {"all-gather": 0, "collective-permute": 3 - (4 - 3)}
    assert exposed(*lines) == pytest.approx(expected, rel=1e-5)


def test_engine_overlap_memory_traffic_is_work_but_asynchronous_copies_are_not():
    """At 1e15 B/s an addition that reads an array of 4 MB twice moves 12 MB in 12 ns."""
    lines = ("%c = f32[1000,1000]{1,0} add(%a, %a)",)
    copy = "(f32[1000,1000]{1,0}, f32[1000,1000]{1,0}, u32[]) copy-start(%a)"
    lines += (f"%k = {copy}", "%kd = f32[1000,1000]{1,0} copy-done(%k)")
    found = exposed(f"%s = {STARTED}", *lines, f"%d = {DONE}(%s)")
    assert found == pytest.approx({"all-gather": 3 - 12e6 / 1e15 * 1000}, abs=1e-12)


def test_engine_overlap_an_asynchronous_computation_is_a_pair():
    """A reduce-scatter of 4 MB in a computation of its own: 3 ms, half a product beside it."""
    scatter = f"reduce-scatter(%x), dimensions={{0}}, {GROUPS}, to_apply=%add"
    wrapped = f"""\
%wrapped (x: f32[1000,1000]) -> f32[250,1000] {{
  %x = f32[1000,1000]{{1,0}} parameter(0)
  ROOT %r = f32[250,1000]{{1,0}} {scatter}
}}
"""
    shape = "((f32[1000,1000]{1,0}), f32[250,1000]{1,0}, s32[])"
    found = exposed(
        f"%s = {shape} async-start(%a), calls=%wrapped",
        f"%u = {shape} async-update(%s), calls=%wrapped",
        f"%p = {PRODUCT}",
        "%d = f32[250,1000]{1,0} async-done(%u), calls=%wrapped",
        others=wrapped,
    )
    assert found == pytest.approx({"reduce-scatter": 1})


LOOP = """\
%body (c: (s32[], f32[1000,1000], f32[250,1000])) -> (s32[], f32[1000,1000], f32[250,1000]) {
  %c = (s32[], f32[1000,1000]{1,0}, f32[250,1000]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %a = f32[1000,1000]{1,0} get-tuple-element(%c), index=1
  %part = f32[250,1000]{1,0} get-tuple-element(%c), index=2
  LINES
  ROOT %t = (s32[], f32[1000,1000]{1,0}, f32[250,1000]{1,0}) tuple(%i, %a, %part)
}

%condition (c: (s32[], f32[1000,1000], f32[250,1000])) -> pred[] {
  %c = (s32[], f32[1000,1000]{1,0}, f32[250,1000]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}
"""
WHILE = (
    "(s32[], f32[1000,1000]{1,0}, f32[250,1000]{1,0}) while(%t), condition=%condition, "
    'body=%body, backend_config={"known_trip_count":{"n":"24"}}'
)


def test_engine_overlap_a_loop_counts_as_often_as_it_runs():
    """24 runs of 3 ms of links beside 2 ms of products."""
    lines = "\n  ".join((f"%s = {STARTED}", f"%p = {PRODUCT}", f"%d = {DONE}(%s)"))
    found = exposed(f"%loop = {WHILE}", others=LOOP.replace("LINES", lines))
    assert found == pytest.approx({"all-gather": 24 * 1})


def test_engine_overlap_a_loop_between_start_and_done_hides_with_what_it_has_left():
    """A loop of 24 products; in each run, one more product behind 3 ms of its own links.

    24 x 2 ms are left for an all-reduce of 6 ms. The loop itself exposes 24 x 1 ms.
    """
    lines = (f"%s = {STARTED}", f"%p = {PRODUCT}", f"%d = {DONE}(%s)", f"%q = {PRODUCT}")
    found = exposed(
        f"%r = f32[1000,1000]{{1,0}} all-reduce-start(%a), {GROUPS}, to_apply=%add",
        f"%loop = {WHILE}",
        "%rd = f32[1000,1000]{1,0} all-reduce-done(%r)",
        others=LOOP.replace("LINES", "\n  ".join(lines)),
    )
    assert found == pytest.approx({"all-gather": 24 * 1, "all-reduce": 0})


def fusions(*channels: int) -> str:
    """Fused computations for each channel: a start, a step with a product, an end."""
    parameters = "\n  ".join(ARGUMENTS)
    head = "(a: f32[1000,1000], part: f32[250,1000]) -> f32[1000,1000]"
    return "\n".join(
        f"%{name}.{channel} {head} {{\n  {parameters}\n  {product}\n"
        f"  ROOT %g = f32[1000,1000]{{1,0}} all-gather(%part), channel_id={channel}, "
        f"dimensions={{0}}, {GROUPS}\n}}\n"
        for channel in channels
        for name, product in (("start", ""), ("step", f"%p = {PRODUCT}"), ("end", ""))
    )


def fused(name: str) -> str:
    return f"f32[1000,1000]{{1,0}} fusion(%a, %part), kind=kCustom, calls=%{name}"


@pytest.mark.parametrize("steps, left", [(0, 3), (1, 1), (2, 0)])
def test_engine_overlap_fusions_of_one_channel_are_one_collective(steps, left):
    """A start, steps with a product of 2 ms each, and an end share a channel: 3 ms of links."""
    between = [f"%step.{number} = {fused('step.7')}" for number in range(steps)]
    lines = (f"%s = {fused('start.7')}", *between, f"%e = {fused('end.7')}")
    assert exposed(*lines, others=fusions(7)) == pytest.approx({"all-gather": left})


def test_engine_overlap_a_loop_may_continue_a_collective_that_started_before_it():
    """As libtpu writes it: 3 ms of links, started and ended outside of 24 products of 2 ms."""
    # The start's custom call is what distinguishes a step in a loop from a collective of the loop.
    texts = fusions(7).split("%step.7", 1)
    call = (
        'ROOT %c = f32[1000,1000]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    )
    start = texts[0].replace("ROOT %g", "%g").replace("\n}", f"\n  {call}\n}}")
    loop = LOOP.replace("LINES", f"%step = {fused('step.7')}")
    lines = (f"%s = {fused('start.7')}", f"%loop = {WHILE}", f"%e = {fused('end.7')}")
    found = exposed(*lines, others=f"{start}%step.7{texts[1]}\n{loop}")
    assert found == pytest.approx({"all-gather": 0})


def test_engine_overlap_a_collective_in_a_single_fusion_is_exposed_whole():
    """Nothing says that the fusion's own product runs beside it; nor do other channels hide it."""
    lines = (f"%s = {fused('step.7')}", f"%e = {fused('step.8')}")
    assert exposed(*lines, others=fusions(7, 8)) == pytest.approx({"all-gather": 6})


def test_engine_overlap_is_unknown_without_the_chips_peaks():
    """Oracle: the table of chips, which gives CPUs none."""
    program = hlo.parse("ENTRY %main (a: f32[1]) -> f32[1] {\n}\n")
    assert overlap.exposed_seconds(program, chips.CHIPS["cpu"]) is None
    assert overlap.exposed_seconds(program, chips.CHIPS["v5e"]) == {}
