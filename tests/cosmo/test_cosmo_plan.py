"""`python -m cosmo plan`: by arithmetic in this process, by a compiler in processes of its own."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from cosmo.__main__ import main
from tests import warm_process

KEYS = {
    "parameters",
    "fits",
    "hbm_peak_bytes",
    "hbm_limit_bytes",
    "matmul_flops",
    "matmul_flops_minimum",
    "collective_bytes",
    "step_seconds_bound",
    "compile_seconds",
    "exposed_seconds",
    "mesh",
}
TINY = ("--gin_file=gin/cosmo/tiny.gin", "--gin.SCAN_LAYERS=True", "--quiet")


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cosmo", "plan", *arguments]
    return warm_process.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    process = start(*arguments)
    said, complained = process.communicate(timeout=1200)
    return process.returncode, said, complained


def run_here(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) in this process, where JAX has started: nothing is compiled."""
    out, err = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ)
    with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *arguments])
    return code, out.getvalue(), err.getvalue()


def plan(*arguments: str, run=run) -> dict:
    code, said, complained = run(*arguments, "--json")
    assert said, complained
    made = json.loads(said)
    assert made.keys() >= KEYS
    assert code == (0 if made["fits"] else 1), complained
    return made


def test_cosmo_plan_counts_what_cpu_devices_run(tmp_path):
    """Tiny on 4 x 2 CPU devices. Oracles: the parameters that training logs; products by
    arithmetic; every weight gathered once or twice and its gradient summed, in float32."""
    text = tmp_path / "step.hlo"
    made = plan(*TINY, "--topology=cpu:8", "--gin.NUM_PARTITIONS=2", f"--hlo={text}")
    assert made["parameters"] == 1_312_512
    assert made["mesh"] == {"data": 4, "model": 2}
    assert made["matmul_flops"] == pytest.approx(made["matmul_flops_minimum"], rel=0.02)
    assert text.read_text().startswith("HloModule")
    weights = 4 * made["parameters"] / 2
    moved = sum(made["collective_bytes"].values())
    assert 2 * weights < moved < 8 * weights
    assert 0 < made["hbm_peak_bytes"] < made["hbm_limit_bytes"]
    # Nobody published the peaks of this processor.
    assert made["exposed_seconds"] is None and made["step_seconds_bound"] is None


def test_cosmo_plan_of_gpus_is_arithmetic():
    """Oracle: FLOPs and bytes over the table's peaks, by hand; days are steps times seconds."""
    recipe = "--gin_file=gin/cosmo/cosmo_3b.gin"
    made = plan(recipe, "--topology=h100:8", run=run_here)
    assert made["estimated"] and made["compile_seconds"] is None
    assert made["exposed_seconds"] is None  # no program, so no order of its instructions
    assert made["steps"] == 110_000
    bound = max(made["matmul_flops"] / 989e12, made["hbm_traffic_bytes"] / 3350e9)
    assert made["roofline_seconds"]["hbm"] == pytest.approx(made["hbm_traffic_bytes"] / 3350e9)
    # The state of a device is read and written, and much more is moved for products.
    assert made["hbm_traffic_bytes"] > 4 * 4 * made["parameters"] / 8
    assert made["step_seconds_bound"] == pytest.approx(bound)
    assert made["days_bound"] == pytest.approx(110_000 * bound / 86_400)
    assert made["tokens_per_second_bound"] == pytest.approx(256 * 640 / bound)


def test_cosmo_plan_prints_the_exposed_share():
    """Oracle: by hand, 7 of 226 ms; a plan without times has no such row."""
    from cosmo.cli.plan import plan_table
    from cosmo.engine.scale.plan import Plan

    fields = dict.fromkeys((field.name for field in dataclasses.fields(Plan)), 1)
    fields |= {"mesh": {"data": 1, "model": 1}, "collective_bytes": {}, "roofline_seconds": {}}
    times = {"all-gather": 0.003, "all-reduce": 0.004, "all-to-all": 1e-7}
    made = Plan(**fields | {"step_seconds_bound": 0.226, "exposed_seconds": times})
    row = "all-reduce 0.004 s, all-gather 0.003 s: 3.1% of the step's bound"
    assert row in plan_table(made)
    made = dataclasses.replace(made, exposed_seconds={"all-gather": 0.0})
    assert "no collective: 0.0% of the step's bound" in plan_table(made)
    assert "exposed" not in plan_table(dataclasses.replace(made, exposed_seconds=None))


def test_cosmo_plan_steps_are_counted_from_the_starting_checkpoint():
    """Oracle: the recipe's 1,210,000 less 1,100,000; given steps; HuggingFace's have none."""
    recipe = ("--gin_file=gin/cosmo/cosmo_3b.gin", "--topology=h100:8")
    given = {(): 110_000, ("--start_step=0",): 1_210_000, ("--gin.TRAIN_STEPS=110_000",): 110_000}
    for flags, steps in given.items():
        assert plan(*recipe, *flags, run=run_here)["steps"] == steps


def test_cosmo_plan_says_what_would_fit():
    """XXL on one H100: exit code 1; on 8 with every activation kept: what fits is named."""
    code, said, _ = run_here("--gin_file=gin/cosmo/cosmo_11b.gin", "--topology=h100:1", "--quiet")
    assert code == 1
    assert "DOES NOT FIT" in said and "larger slice" in said
    code, said, _ = run_here(
        "--gin_file=gin/cosmo/cosmo_3b.gin",
        "--topology=h100:8",
        "--gin.REMAT_POLICY=none",
        "--gin.NUM_MICROBATCHES=1",
    )
    assert code == 1
    assert "what fits: --gin.NUM_PARTITIONS=1 --gin.REMAT_POLICY=minimal" in said


def test_cosmo_plan_sweep_ranks_what_fits():
    """Six settings for eight H100s, by arithmetic. Property: bounds ascend, all fit."""
    code, said, _ = run_here(
        "--gin_file=gin/cosmo/cosmo_3b.gin",
        "--topology=h100:8",
        "--sweep",
        "--partitions=1,2,3",
        "--microbatches=1",
        "--json",
    )
    plans = json.loads(said)
    assert code == 0 and len(plans) == 4  # 3 does not divide 8
    bounds = [made["step_seconds_bound"] for made in plans]
    assert bounds == sorted(bounds) and all(made["fits"] for made in plans)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--topology=v9:2x2",), "v3:4x4 is a v3-32"),
        (("--topology=h100:2x2",), "h100:8"),
        (("--topology=h100:8", "--gin.NUM_PARTITIONS=1", "--gin.BATCH_SIZE=12"), "BATCH_SIZE"),
        (("--topology=h100:8", "--gin.NUM_PARTITIONS=3"), "num_partitions=3 does not divide"),
        (("--topology=h100:8", "--gin.NUM_PARTITIONS=0"), "num_partitions=0 does not divide"),
        (("--topology=h100:32", "--gin.NUM_PARTITIONS=16"), "the 8 devices of each host"),
        (("--topology=h100:8", "--start_step=600"), "start step 600 is not below TRAIN_STEPS"),
        (("--topology=h100:8", "--partitions=1"), "--partitions is for --sweep"),
        (
            ("--topology=h100:8", "--hlo=x"),
            "nothing is compiled for h100:8, so there is no text to write (--hlo)",
        ),
        (("--topology=h100:8", "--sweep", "--partitions=two"), "--partitions=two"),
        (("--topology=h100:8", "--sweep", "--hlo=x"), "--hlo writes one program"),
    ],
)
def test_cosmo_plan_bad_settings_are_one_line(arguments, words):
    """Oracle: the house rule on errors."""
    code, said, complained = run_here("--gin_file=gin/cosmo/tiny.gin", *arguments)
    assert (code, said) == (1, "")
    assert words in complained and complained.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_cosmo_plan_without_the_tpu_compiler_says_what_to_install():
    """Oracle: the extra's name in pyproject.toml."""
    code, _, complained = run_here("--gin_file=gin/cosmo/tiny.gin", "--topology=v3:2x2")
    assert code == 1 and "pip install -e '.[tpu]'" in complained


libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu (libtpu, no TPU)"
)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, topology, flops, collectives",
    [("cosmo_3b", "v3:4x4", 43.8e12, 16e9), ("cosmo_11b", "v3:8x8", 42.8e12, 40e9)],
)
def test_cosmo_plan_the_papers_runs_fit_their_slices(recipe, topology, flops, collectives):
    """Cosmo-3B on a v3-32, Cosmo-11B on a v3-128, compiled by libtpu. Oracle: published minima and
    the targets of this project: 12 GiB, 1.03 of the minimum, the bytes given here, 4 minutes."""
    made = plan(f"--gin_file=gin/cosmo/{recipe}.gin", f"--topology={topology}")
    assert made["fits"] and made["hbm_peak_bytes"] <= 12 * 2**30
    assert made["matmul_flops_minimum"] == pytest.approx(flops, rel=2e-3)
    assert made["matmul_flops"] <= 1.03 * flops
    assert sum(made["collective_bytes"].values()) <= collectives
    assert made["compile_seconds"] <= 240


@libtpu
@pytest.mark.slow
def test_cosmo_plan_microbatches_take_no_memory():
    """Cosmo-3B on a v3-32. Property: more microbatches, less memory, the same products."""
    plans = [
        plan(
            "--gin_file=gin/cosmo/cosmo_3b.gin",
            "--topology=v3:4x4",
            "--gin.NUM_PARTITIONS=1",
            "--gin.REMAT_POLICY=minimal",
            f"--gin.NUM_MICROBATCHES={count}",
        )
        for count in (1, 2, 4)
    ]
    sizes = [made["hbm_peak_bytes"] for made in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert plans[0]["matmul_flops"] == pytest.approx(plans[2]["matmul_flops"], rel=1e-6)


@libtpu
@pytest.mark.slow
def test_cosmo_plan_two_at_once_do_not_disturb_each_other():
    """Both exit with 0 and the same counts: libtpu's lock file is no obstacle. Property."""
    arguments = (*TINY, "--gin.DTYPE=bfloat16", "--topology=v5e:2x2", "--json")
    processes = [start(*arguments) for _ in range(2)]
    plans = [json.loads(process.communicate(timeout=1200)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert plans[0]["matmul_flops"] == plans[1]["matmul_flops"] > 0


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, chosen", [("v4:2x2x1", True), ("v5e:2x2", True), ("v3:2x1", False)]
)
def test_cosmo_plan_counts_the_kernel_of_attention(topology, chosen):
    """Tiny, compiled by libtpu; 256 inputs, 64 targets padded to 128, four rows a device.

    Oracle: the products of 2 + 2 layers by hand, 2 forward and 5 backward, none of them twice.
    """
    words = ("--gin.DTYPE=bfloat16", "--gin.REMAT_POLICY=minimal", "--gin.NUM_PARTITIONS=1")
    made = plan(*TINY, *words, f"--topology={topology}")
    layers, heads, head_dim = 2, 4, 32
    pairs = layers * (256 * 256 + 128 * 128 + 128 * 256)  # of queries and keys
    assert made["attention"] == ("fused" if chosen else "plain")
    assert made["kernel_flops"] == (7 * 2 * 4 * heads * head_dim * pairs if chosen else 0)
    assert (made["kernel_traffic_bytes"] > 0) == chosen


@pytest.mark.slow
def test_cosmo_plan_compiles_dropout_for_v6e():
    """Two layers of cosmo_3b, which libtpu 0.0.42 dies of without deeper stacks. Oracle: the
    least possible products."""
    pytest.importorskip("libtpu")
    small = ("--gin.NUM_ENCODER_LAYERS=2", "--gin.NUM_DECODER_LAYERS=2")
    words = "--gin.VOCABULARY_PATH=tasks/sample/vocabulary.model"
    made = plan("--gin_file=gin/cosmo/cosmo_3b.gin", "--topology=v6e:4x4", *small, words)
    assert made["fits"]
    assert made["matmul_flops"] == pytest.approx(made["matmul_flops_minimum"], rel=0.05)
