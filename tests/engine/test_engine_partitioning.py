"""Sharding: eight CPU devices in a process of their own must compute what one does."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import partitioning
from tests import warm_process
from tests.engine.partition_driver import ANSWERING, FAST, MESHES, STEPS, TWO

ROOT = Path(__file__).resolve().parents[2]


def start(devices: int, *arguments: str) -> subprocess.Popen:
    """partition_driver.py, run with so many CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
        # Eight devices on two busy cores may wait long for one another.
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_timeout_seconds=600",
    }
    command = [sys.executable, "-m", "tests.engine.partition_driver", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return warm_process.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def results(out: str, processes: list[subprocess.Popen]):
    """(report, {"mesh:parameter": array}) once all have ended well."""
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
    with np.load(out + ".npz") as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(Path(out + ".json").read_text()), arrays


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """`eight_devices(mesh)`: results of a `partition_driver.run_on_eight_devices` with `mesh`."""

    @functools.cache
    def run(*meshes):
        out = str(tmp_path_factory.mktemp("eight") / "run")
        return results(out, [start(8, "train", out, ",".join(meshes))])

    rest = [mesh for mesh in MESHES if mesh not in FAST]
    return lambda mesh: run(*(FAST if mesh in FAST else ("1x1", *rest)))


@pytest.fixture(scope="module")
def eight(eight_devices):
    """Results of the meshes of FAST."""
    return eight_devices("1x1")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """`answers(mesh)`: results of `partition_driver.answer_on_eight_devices` with `mesh`."""

    @functools.cache
    def run(meshes):
        out = str(tmp_path_factory.mktemp("answers") / "run")
        return results(out, [start(8, "answer", out, ",".join(meshes))])[0]

    fast = tuple(mesh for mesh in ANSWERING if mesh in FAST)
    return lambda mesh: run(fast if mesh in FAST else ANSWERING)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """`two_processes(mesh)`: results of `partition_driver.run_as_one_of_two`."""

    @functools.cache
    def run(mesh):
        out = str(tmp_path_factory.mktemp("two") / "run")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        return results(out, [start(2, "two", out, mesh, port, str(n)) for n in range(2)])

    return run


def each(meshes):
    """Parametrize a test by `meshes`; those that are not in FAST are slow tests."""
    marked = [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in meshes]
    return pytest.mark.parametrize("mesh", marked)


@each(mesh for mesh in MESHES if mesh != "1x1")
def test_engine_partitioning_computes_what_one_device_does(eight_devices, mesh):
    """Ten steps with dropout: losses and parameters. Oracle: the same on one device."""
    report, arrays = eight_devices(mesh)
    np.testing.assert_allclose(report[mesh]["losses"], report["1x1"]["losses"], rtol=1e-5)
    names = [name.removeprefix("1x1:") for name in arrays if name.startswith("1x1:")]
    assert len(names) == 29  # 1 + encoder 2 + 9 a stack, decoder 3 + 14 a stack
    for name in names:
        one, many = arrays[f"1x1:{name}"], arrays[f"{mesh}:{name}"]
        np.testing.assert_allclose(many, one, atol=2e-5 * np.max(np.abs(one)), err_msg=name)
    assert len(set(report["1x1"]["losses"])) == STEPS


@each(mesh for mesh in ANSWERING if mesh != "1x1")
def test_engine_partitioning_answers_as_one_device_does(answers, mesh):
    """Greedy tokens, scores, choices and what follows them. Oracle: the same on one device."""
    report = answers(mesh)
    one, many = report["1x1"], report[mesh]
    assert many["said"] == one["said"]
    assert len({str(row) for row in one["said"]}) > 1
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=1e-5)
    assert many["continued"] == one["continued"]
    assert len({str(row) for row in one["continued"]}) > 1
    np.testing.assert_allclose(many["choices"], one["choices"], rtol=1e-5)


@pytest.mark.slow
def test_engine_partitioning_blenderbot_computes_what_one_device_does(tmp_path, monkeypatch):
    """Ten steps of AMSGrad, tokens, scores and choices. Oracle: the same on one device."""
    monkeypatch.setenv("NETWORK", "blenderbot")
    trained, answered = str(tmp_path / "train"), str(tmp_path / "answer")
    report, arrays = results(trained, [start(8, "train", trained, "1x1,2x4")])
    one, many = report["1x1"], report["2x4"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert len(set(one["losses"])) == STEPS
    # Softmax does not depend on a key's bias: its gradient is rounding, which Adam makes a step.
    compared = [n for n in arrays if n.startswith("1x1:") and not n.endswith("key_bias")]
    for name in compared:
        wanted, found = arrays[name], arrays[name.replace("1x1:", "2x4:")]
        np.testing.assert_allclose(found, wanted, atol=2e-4, err_msg=name)
    report, _ = results(answered, [start(8, "answer", answered, "1x1,2x4")])
    one, many = report["1x1"], report["2x4"]
    assert many["said"] == one["said"] and many["continued"] == one["continued"]
    for name in ("scores", "choices"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)


def test_engine_partitioning_runs_the_kernel_of_attention(eight, tmp_path, monkeypatch):
    """Ten steps, each device with its rows and heads. Oracle: plain attention on one device.

    Two heads are split over two devices, and are whole on each of four.
    """
    monkeypatch.setenv("NETWORK", "fused")
    out = str(tmp_path / "run")
    report, arrays = results(out, [start(8, "train", out, "4x2,2x4")])
    for mesh in ("4x2", "2x4"):
        np.testing.assert_allclose(report[mesh]["losses"], eight[0]["1x1"]["losses"], rtol=1e-5)
    names = [name.removeprefix("4x2:") for name in arrays if name.startswith("4x2:")]
    assert len(names) == 29
    for name in names:
        expected = eight[1][f"1x1:{name}"]
        limit = 2e-5 * np.max(np.abs(expected))
        for mesh in ("4x2", "2x4"):
            np.testing.assert_allclose(arrays[f"{mesh}:{name}"], expected, atol=limit, err_msg=name)


def test_engine_partitioning_the_gradient_of_encoded_inputs_is_summed_once(tmp_path):
    """One all-reduce after all three decoder layers, scanned or not. Oracle: by hand.

    The 2 heads are whole on each of 4 devices, their 16 joined columns are not.
    """
    out = str(tmp_path / "run")
    report, _ = results(out, [start(8, "count", out, "4x2,2x4,8x1")])
    summed, none = {"outside": 1, "inside": 0}, {"outside": 0, "inside": 0}
    for scan_layers in (True, False):
        assert report[f"4x2 {scan_layers}"] == report[f"2x4 {scan_layers}"] == summed
        assert report[f"8x1 {scan_layers}"] == none


def test_engine_partitioning_forgoes_the_compilation_cache_on_several_cpus(eight):
    """A program with collectives read back from it hangs. Oracle: JAX's own setting."""
    assert eight[0]["cache"] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TWO)
def test_engine_partitioning_two_processes_compute_what_one_does(
    eight_devices, two_processes, mesh
):
    """Two processes, each fed its own rows only. Oracle: one process with all devices and rows."""
    (one, one_arrays), (two, two_arrays) = eight_devices(mesh), two_processes(mesh)
    np.testing.assert_allclose(two[mesh]["losses"], one[mesh]["losses"], rtol=1e-5)
    assert two[mesh]["rows"] == [8 // MESHES[mesh][0]] * 2
    names = [name for name in one_arrays if name.startswith(f"{mesh}:")]
    assert len(names) == 29
    for name in names:
        limit = 2e-5 * np.max(np.abs(one_arrays[name]))
        np.testing.assert_allclose(two_arrays[name], one_arrays[name], atol=limit, err_msg=name)


# Parameter -> its whole shape; data splits "embed", model splits the other named axis.
WHOLE = {
    "params/token_embedder": (40, 16),
    "params/decoder/logits_dense": (16, 40),
    "params/encoder/layers/attention/query": (2, 16, 16),
    "params/encoder/layers/attention/out": (2, 16, 16),
    "params/decoder/layers/mlp/wi_0": (2, 16, 24),
    "params/decoder/layers/mlp/wo": (2, 24, 16),
    "params/decoder/layers/pre_mlp_layer_norm/scale": (2, 16),
    "params/encoder/encoder_norm/scale": (16,),
}
SPLIT = {  # which axis `data` splits, which axis `model` splits
    "params/token_embedder": (1, 0),
    "params/decoder/logits_dense": (0, 1),
    "params/encoder/layers/attention/query": (1, 2),
    "params/encoder/layers/attention/out": (2, 1),
    "params/decoder/layers/mlp/wi_0": (1, 2),
    "params/decoder/layers/mlp/wo": (2, 1),
    "params/decoder/layers/pre_mlp_layer_norm/scale": (None, None),
    "params/encoder/encoder_norm/scale": (None, None),
}


@each(MESHES)
def test_engine_partitioning_parameters_are_sharded(eight_devices, mesh):
    """Every device holds its part of a parameter and no more. Oracle: shapes divided by hand."""
    report, _ = eight_devices(mesh)
    data, parts = MESHES[mesh]
    for name, whole in WHOLE.items():
        by_data, by_model = SPLIT[name]
        part = list(whole)
        if by_data is not None:
            part[by_data] //= data
        if by_model is not None:
            part[by_model] //= parts
        assert report[mesh]["shards"][name] == [part] * (data * parts), name
    assert report[mesh]["rows"] == [8 // data] * (data * parts)


def test_engine_partitioning_second_moments_are_sharded(eight):
    """Adafactor's row and column of wo [L, 24, 16] on 2 x 4 devices. Oracle: by hand.

    The row has lost the larger axis, mlp: [L, 16 / 2]; the column the smaller: [L, 24 / 4].
    """
    shards = eight[0]["2x4"]["shards"]
    (row,) = {tuple(s[0]) for k, s in shards.items() if "decoder/layers/0/v_row/mlp/wo" in k}
    (column,) = {tuple(s[0]) for k, s in shards.items() if "decoder/layers/0/v_col/mlp/wo" in k}
    assert (row, column) == ((2, 8), (2, 6))


@pytest.mark.parametrize(
    "optimizer, kinds",
    [("adamw", ("mu", "nu")), ("amsgrad", ("mu", "nu", "nu_max")), ("momentum", ("ema",))],
)
def test_engine_partitioning_whole_moments_lie_like_their_parameters(eight, optimizer, kinds):
    """AdamW's moments, AMSGrad's largest and Adafactor's momentum lie as their parameter. Property.

    Replicated they would cost each device twice the memory of the whole model.
    """
    layouts = eight[0][optimizer]
    params = {k.removeprefix("params/"): v for k, v in layouts.items() if k.startswith("params/")}
    assert len(params) == 29
    for name, layout in params.items():
        head, layers, tail = name.rpartition("layers/")
        where = f"stacks/{head}{layers}" if layers else "rest/"
        for kind in kinds:
            pattern = re.compile(rf"opt_state/(.*/)?{where}.*/{kind}/{tail}")
            found = [v for k, v in layouts.items() if pattern.fullmatch(k)]
            assert found == [layout], (name, kind)


def test_engine_partitioning_adafactor_state_lies_like_its_parameters(eight):
    """v_row and v_col keep the layout of the axes that they keep. Oracle: by hand, below.

    optax drops the largest axis for the row, the second largest for the column. Of emb 128,
    joined heads 256, mlp 512 and vocabulary 384, emb is always the smaller. Data splits emb.
    """
    state = eight[0]["adafactor"]

    def moment(kind, name):
        found = [v for k, v in state.items() if k.endswith(f"/{kind}/{name}")]
        assert len(found) == 1, (kind, name)
        return found[0]

    for name in ("attention/query", "attention/out", "self_attention/value"):
        assert moment("v_row", name) == [[6, 128], [None, "data"]], name
        assert moment("v_col", name) == [[6, 256], [None, "model"]], name
    for side in ("encoder", "decoder"):
        for name in ("wi_0", "wi_1", "wo"):
            row, column = (
                moment(f"stacks/{side}/layers/0/{kind}", f"mlp/{name}")
                for kind in ("v_row", "v_col")
            )
            assert row == [[6, 128], [None, "data"]], name
            assert column == [[6, 512], [None, "model"]], name
    assert moment("v_row", "token_embedder") == [[128], ["data"]]
    assert moment("v_col", "token_embedder") == [[384], ["model"]]
    assert moment("v_row", "decoder/logits_dense") == [[128], ["data"]]
    # Unfactored: a whole second moment, laid out like its vector, whole; so are placeholders.
    assert moment("v", "pre_attention_layer_norm/scale") == [[6, 128], [None, None]]
    assert moment("v", "encoder/encoder_norm/scale") == [[128], [None]]
    assert moment("v", "attention/query") == [[6, 1], []]
    counts = [v for k, v in state.items() if k.endswith("count")]
    assert counts and all("data" not in v[1] and "model" not in v[1] for v in counts)


def test_engine_partitioning_square_matrices_keep_row_and_column_apart(eight):
    """Of a square matrix the row keeps the first axis, the column the second. Oracle: by hand.

    T5's attention is square at most sizes; data splits emb, model the joined heads.
    """
    state = eight[0]["square"]
    layouts = {
        (kind, name): v[1]
        for k, v in state.items()
        for kind in ("v_row", "v_col")
        for name in ("query", "out")
        if k.endswith(f"encoder/layers/0/{kind}/attention/{name}")
    }
    data, model = [None, "data"], [None, "model"]
    assert layouts == {
        ("v_row", "query"): data,
        ("v_col", "query"): model,
        ("v_row", "out"): model,
        ("v_col", "out"): data,
    }


def test_engine_partitioning_axes_that_do_not_divide_stay_whole():
    """5 heads over 2 or 24 over 16 devices stay whole, and a side splits one axis only. By hand."""
    import jax

    mesh = partitioning.abstract_mesh(4, 2)
    shapes = {
        "even": jax.ShapeDtypeStruct((8, 6), np.float32),
        "odd": jax.ShapeDtypeStruct((6, 5), np.float32),
        "twice": jax.ShapeDtypeStruct((4, 6), np.float32),
    }
    axes = {"even": ("embed", "mlp"), "odd": ("embed", "heads"), "twice": ("vocab", "mlp")}
    specs = partitioning.Partitioner().param_shardings(mesh, shapes, axes)
    assert {name: tuple(s.spec) for name, s in specs.items()} == {
        "even": ("data", "model"),
        "odd": (None, None),
        "twice": ("model", None),
    }
    assert partitioning.batch_sharding(mesh).spec == P("data")


def test_engine_partitioning_a_function_is_jitted_under_the_rules_that_were_given():
    """Other rules than the default, as lists, as gin gives them. Oracle: these rules."""
    partitioner = partitioning.Partitioner(axis_rules=[["batch", "data"]])
    layout = partitioner.layout(partitioner.mesh())
    found = []
    assert layout.jit(lambda x: found.append(partitioning._ACTIVE.get()) or x + 1)(1) == 2
    assert found == [layout] and layout.axis_rules == (("batch", "data"),)
    assert {layout: 1} == {partitioner.layout(partitioner.mesh()): 1}


@pytest.mark.parametrize("count", [3, 16, 0, -1])
def test_engine_partitioning_num_partitions_must_divide_the_devices(count):
    """3 of 8 devices is refused: the value, the rule, the gin name. Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError) as error:
        partitioning.Partitioner(num_partitions=count).mesh([None] * 8)
    message = str(error.value)
    assert f"num_partitions={count} does not divide 8 devices" in message
    assert "NUM_PARTITIONS" in message


@pytest.mark.parametrize(
    "batch_size, data, microbatches, words",
    [
        (6, 4, 1, "batch_size=6 does not divide over 4 data shards"),
        (8, 4, 4, "8 does not divide over 4 data shards x 4 microbatches"),
        (5, 1, 2, "5 does not divide over 1 data shard x 2 microbatches"),
        (0, 1, 1, "batch_size=0"),
        (-4, 4, 1, "batch_size=-4"),
        (8, 4, 2, None),
        (7, 1, 1, None),
    ],
)
def test_engine_partitioning_check_batch_size(batch_size, data, microbatches, words):
    """Rows must divide over data shards times microbatches. Oracle: hand calculation."""
    mesh = partitioning.abstract_mesh(data, 2)
    if words is None:
        partitioning.check_batch_size(batch_size, mesh, microbatches, "BATCH_SIZE")
        return
    with pytest.raises(UserError) as error:
        partitioning.check_batch_size(batch_size, mesh, microbatches, "BATCH_SIZE")
    assert words in str(error.value)
