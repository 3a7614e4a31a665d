"""Sharding: eight CPU devices in a process of their own must compute what one does."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from cosmo.engine import partitioning
from cosmo.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Every way to lay 1, 2, 4 and 8 devices out: data x model.
MESHES = {
    f"{count // parts}x{parts}": (count // parts, parts)
    for count in (1, 2, 4, 8)
    for parts in (1, 2, 4, 8)
    if parts <= count
}
STEPS = 10


ANSWERING = ("1x1", "8x1", "2x4")  # meshes that generate and score too
TWO = ("4x1", "2x2")  # meshes of two processes with two devices each


def setting():
    """(model, step config, a state to start from, ten batches), all the same in every process."""
    import jax
    import jax.numpy as jnp

    from cosmo.engine import models, step, t5
    from cosmo.engine.optimizer import Adafactor

    jax.config.update("jax_default_matmul_precision", "highest")
    network = t5.T5Config(
        vocab_size=40,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=8,
        mlp_dim=24,
        dtype="float32",
        dropout_rate=0.1,
    )
    model = models.EncoderDecoderModel(network, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    config = step.StepConfig(optimizer=Adafactor(min_dim_size_to_factor=8))
    rng = np.random.default_rng(0)

    def fill(leaf):
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree.map(fill, models.abstract_params(model))
    start = step.TrainState(jnp.int32(0), params, jax.jit(config.transformation().init)(params))

    batches = []
    for _ in range(STEPS):
        targets = rng.integers(2, 40, (8, 6)) * (np.arange(6) < rng.integers(1, 7, (8, 1)))
        batches.append(
            {
                "encoder_input_tokens": rng.integers(2, 40, (8, 10)).astype(np.int32),
                "decoder_target_tokens": targets.astype(np.int32),
                "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
            }
        )
    return model, config, jax.device_get(start), batches


def paths(tree):
    """{path: leaf}."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in leaves}


def run_mesh(setting, parts, devices):
    """(losses, the rows of each device of this process, final state) of ten steps."""
    import jax

    from cosmo.engine import step

    model, config, start, batches = setting
    partitioner = partitioning.Partitioner(num_partitions=parts)
    mesh = partitioner.mesh(devices)
    _, shardings = step.state_shardings(model, config, partitioner, mesh)
    run = jax.jit(
        step.make_train_step(model, config, 0, partitioner.layout(mesh)),
        donate_argnums=0,
        out_shardings=(shardings, partitioning.replicated(mesh)),
    )
    state, losses = jax.device_put(start, shardings), []
    share = 8 // jax.process_count()
    own = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    for batch in batches:
        batch = {name: rows[own] for name, rows in batch.items()}  # a process has only its rows
        batch = partitioning.put_batch(batch, mesh)
        rows = [s.data.shape[0] for s in batch["decoder_target_tokens"].addressable_shards]
        state, sums = run(state, batch)
        losses.append(float(sums["loss"] / sums["loss_weight"]))
    return losses, rows, state


def answers(setting, parts, devices):
    """Scores, and what greedy decoding says, with the parameters to start from."""
    import jax

    from cosmo.engine import decoding, infer, models

    model, _, start, batches = setting
    partitioner = partitioning.Partitioner(num_partitions=parts)
    mesh = partitioner.mesh(devices)
    layout = partitioner.param_shardings(mesh, start.params, models.logical_axes(model))
    params = jax.device_put(start.params, layout)
    batch = partitioning.put_batch(batches[0], mesh)
    greedy = infer._predict_fn(model, decoding.DecodingConfig(max_new_tokens=5), mesh)
    # One program at a time: two at once on eight devices of two cores may wait for each other.
    said = np.asarray(greedy(params, batch["encoder_input_tokens"], None).tokens)
    scores = np.asarray(infer._score_fn(model, mesh)(params, batch)["score"])
    # Two that share their beginning, and one after which nothing follows.
    choices = ((5, 6, 7), (5, 6, 8, 9), (30, 1))
    run = infer._continue_fn(model, choices, None, decoding.DecodingConfig(4), mesh)
    forced = np.array([0, 1, 2, -1, -1, -1, 0, 1], np.int32)
    chosen = jax.device_get(run(params, batch["encoder_input_tokens"], None, forced))
    return {
        "said": said.tolist(),
        "scores": scores.tolist(),
        "choices": chosen.scores.tolist(),
        "continued": chosen.continuation.tokens.tolist(),
    }


def run_on_eight_devices(out: str) -> None:
    """Ten steps on every mesh. Writes the losses, parameters and layouts that the tests read."""
    import jax

    from cosmo.engine import models, step, t5
    from cosmo.engine.optimizer import Adafactor, AdamW

    assert len(jax.devices()) == 8
    given = setting()
    report, arrays = {}, {}
    partitioning.Partitioner().mesh(jax.devices()[:1])
    report["cache"] = [jax.config.jax_enable_compilation_cache]
    for name, (data, parts) in MESHES.items():
        losses, rows, state = run_mesh(given, parts, jax.devices()[: data * parts])
        report[name] = {
            "losses": losses,
            "rows": rows,
            "shards": {
                k: [list(s.data.shape) for s in a.addressable_shards]
                for k, a in paths(state).items()
            },
        }
        arrays.update({f"{name}:{k}": np.asarray(a) for k, a in paths(state.params).items()})
        if name in ANSWERING:
            report[name].update(answers(given, parts, jax.devices()[: data * parts]))

    report["cache"].append(jax.config.jax_enable_compilation_cache)

    # The optimizer's layout at sizes that Adafactor factors by default, without any memory.
    large = t5.T5Config(vocab_size=384, emb_dim=128, num_heads=4, head_dim=64, mlp_dim=512)
    square = dataclasses.replace(large, num_heads=2)
    partitioner = partitioning.Partitioner(num_partitions=2)
    for name, network, optimizer in [
        ("adafactor", large, Adafactor()),
        ("square", square, Adafactor()),
        ("momentum", large, Adafactor(beta1=0.9)),
        ("adamw", large, AdamW()),
    ]:
        abstract, shardings = step.state_shardings(
            models.EncoderDecoderModel(network),
            step.StepConfig(optimizer=optimizer, max_grad_norm=1.0),
            partitioner,
            partitioner.mesh(),
        )
        report[name] = {
            k: [list(a.shape), list(s.spec)]
            for (k, a), s in zip(paths(abstract).items(), paths(shardings).values(), strict=True)
        }
    np.savez(out + ".npz", **arrays)
    Path(out + ".json").write_text(json.dumps(report))


def run_as_one_of_two(out: str, port: str, process: str) -> None:
    """The same on two devices of each of two processes; the first writes."""
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    given, report, arrays = setting(), {}, {}
    for name in TWO:
        losses, rows, state = run_mesh(given, MESHES[name][1], jax.devices())
        report[name] = {"losses": losses, "rows": rows}
        whole = multihost_utils.process_allgather(state.params, tiled=True)
        arrays.update({f"{name}:{k}": np.asarray(a) for k, a in paths(whole).items()})
    if process == "0":
        np.savez(out + ".npz", **arrays)
        Path(out + ".json").write_text(json.dumps(report))


def start(devices: int, *arguments: str) -> subprocess.Popen:
    """This file, run with so many CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        # Eight devices on two busy cores may wait long for one another.
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_timeout_seconds=600",
    }
    command = [sys.executable, __file__, *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


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
def eight(tmp_path_factory):
    """Results of `run_on_eight_devices`."""
    out = str(tmp_path_factory.mktemp("eight") / "run")
    return results(out, [start(8, out)])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of `run_as_one_of_two`."""
    out = str(tmp_path_factory.mktemp("two") / "run")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return results(out, [start(2, out, port, str(process)) for process in range(2)])


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "1x1"])
def test_engine_partitioning_computes_what_one_device_does(eight, mesh):
    """Ten steps with dropout: losses and parameters. Oracle: the same on one device."""
    report, arrays = eight
    np.testing.assert_allclose(report[mesh]["losses"], report["1x1"]["losses"], rtol=1e-5)
    names = [name.removeprefix("1x1:") for name in arrays if name.startswith("1x1:")]
    assert len(names) == 29  # 1 + encoder 2 + 9 a stack, decoder 3 + 14 a stack
    for name in names:
        one, many = arrays[f"1x1:{name}"], arrays[f"{mesh}:{name}"]
        np.testing.assert_allclose(many, one, atol=2e-5 * np.max(np.abs(one)), err_msg=name)
    assert len(set(report["1x1"]["losses"])) == STEPS


@pytest.mark.parametrize("mesh", [mesh for mesh in ANSWERING if mesh != "1x1"])
def test_engine_partitioning_answers_as_one_device_does(eight, mesh):
    """Greedy tokens, scores, choices and what follows them. Oracle: the same on one device."""
    one, many = eight[0]["1x1"], eight[0][mesh]
    assert many["said"] == one["said"]
    assert len({str(row) for row in one["said"]}) > 1
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=1e-5)
    assert many["continued"] == one["continued"]
    assert len({str(row) for row in one["continued"]}) > 1
    np.testing.assert_allclose(many["choices"], one["choices"], rtol=1e-5)


def test_engine_partitioning_forgoes_the_compilation_cache_on_several_cpus(eight):
    """A program with collectives read back from it hangs. Oracle: JAX's own setting."""
    assert eight[0]["cache"] == [True, False]


@pytest.mark.parametrize("mesh", TWO)
def test_engine_partitioning_two_processes_compute_what_one_does(eight, two_processes, mesh):
    """Two processes, each fed its own rows only. Oracle: one process with all devices and rows."""
    (one, one_arrays), (two, two_arrays) = eight, two_processes
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


@pytest.mark.parametrize("mesh", MESHES)
def test_engine_partitioning_parameters_are_sharded(eight, mesh):
    """Every device holds its part of a parameter and no more. Oracle: shapes divided by hand."""
    report, _ = eight
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
    """Adafactor's row and column of wo [L, 24, 16] on 4 x 2 devices. Oracle: by hand.

    The row has lost the larger axis, mlp: [L, 16 / 4]; the column the smaller: [L, 24 / 2].
    """
    shards = eight[0]["4x2"]["shards"]
    (row,) = {tuple(s[0]) for k, s in shards.items() if "decoder/layers/0/v_row/mlp/wo" in k}
    (column,) = {tuple(s[0]) for k, s in shards.items() if "decoder/layers/0/v_col/mlp/wo" in k}
    assert (row, column) == ((2, 4), (2, 12))


@pytest.mark.parametrize("optimizer, kinds", [("adamw", ("mu", "nu")), ("momentum", ("ema",))])
def test_engine_partitioning_whole_moments_lie_like_their_parameters(eight, optimizer, kinds):
    """AdamW's moments and Adafactor's momentum lie as their parameter does. Property.

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

    mesh = AbstractMesh((4, 2), ("data", "model"))
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
        (6, 4, 1, "batch_size=6 does not divide over 4 data shards (gin: BATCH_SIZE)"),
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
    mesh = AbstractMesh((data, 2), ("data", "model"))
    if words is None:
        partitioning.check_batch_size(batch_size, mesh, microbatches, "BATCH_SIZE")
        return
    with pytest.raises(UserError) as error:
        partitioning.check_batch_size(batch_size, mesh, microbatches, "BATCH_SIZE")
    assert words in str(error.value)


if __name__ == "__main__":
    (run_as_one_of_two if len(sys.argv) > 2 else run_on_eight_devices)(*sys.argv[1:])
