"""Runs and answers on meshes of CPU devices, for test_engine_partitioning.py.

    python -m tests.engine.partition_driver train|answer|count OUT MESH,MESH,...
    python -m tests.engine.partition_driver two OUT MESH PORT PROCESS

Writes OUT.json and OUT.npz; `two` trains as one of two processes. NETWORK=blenderbot in the
environment runs a BlenderBot with AMSGrad instead of a T5 with Adafactor; NETWORK=fused runs the T5
with the kernel of attention.
"""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np

from cosmo.engine.model import generate, partitioning
from tests.engine import tiny_network

# Every way to lay 1, 2, 4 and 8 devices out: data x model.
MESHES = {
    f"{count // parts}x{parts}": (count // parts, parts)
    for count in (1, 2, 4, 8)
    for parts in (1, 2, 4, 8)
    if parts <= count
}
STEPS = 10
# Compiling for a mesh takes 10 s of a core, and no cache keeps it: `make test` compiles these, the
# slow tests all.
FAST = ("1x1", "2x4")
ANSWERING = ("1x1", "8x1", "2x4")  # meshes that generate and score
TWO = ("2x2", "4x1")  # meshes of two processes with two devices each


def setting():
    """(model, step config, a state to start from, ten batches), all the same in every process."""
    import jax
    import jax.numpy as jnp

    from cosmo.engine.model import models, step
    from cosmo.engine.model.blenderbot import BlenderbotConfig
    from cosmo.engine.model.optimizer import Adafactor, AdamW

    jax.config.update("jax_default_matmul_precision", "highest")
    network = tiny_network.config(num_decoder_layers=2, dropout_rate=0.1)
    if os.environ.get("NETWORK") == "fused":
        network = dataclasses.replace(network, attention="fused", remat_policy="minimal")
    config = step.StepConfig(optimizer=Adafactor(min_dim_size_to_factor=8))
    if os.environ.get("NETWORK") == "blenderbot":
        network = BlenderbotConfig(40, 16, 4, 2, 2, 32, 16, dropout_rate=0.1, dtype="float32")
        config = step.StepConfig(optimizer=AdamW(amsgrad=True))
    model = models.EncoderDecoderModel(network, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
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

    from cosmo.engine.model import step

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
    import jax.numpy as jnp

    from cosmo.engine.infer import infer
    from cosmo.engine.model import decoding, models

    model, _, start, batches = setting
    partitioner = partitioning.Partitioner(num_partitions=parts)
    mesh = partitioner.mesh(devices)
    layout = partitioner.layout(mesh)
    shardings = partitioner.param_shardings(mesh, start.params, models.logical_axes(model))
    params = jax.device_put(start.params, shardings)
    batch = partitioning.put_batch(batches[0], mesh)
    greedy = infer._compiled(
        generate.predict, model, layout, config=decoding.DecodingConfig(max_new_tokens=5)
    )
    # One program at a time: two at once on eight devices of two cores may wait for each other.
    said = np.asarray(greedy(params, batch["encoder_input_tokens"]).tokens)
    scores = np.asarray(infer._compiled(models.score, model, layout)(params, batch)["score"])
    # Two that share their beginning, and one after which nothing follows.
    choices = ((5, 6, 7), (5, 6, 8, 9), (30, 1))
    run = infer._compiled(
        generate.choose_and_continue,
        model,
        layout,
        choices=choices,
        config=decoding.DecodingConfig(4),
    )
    taken = jnp.array([0, 1, 2, 2, 0, 1, 0, 1], np.int32)  # every choice, with what follows it
    generate._likeliest = lambda scores: taken
    chosen = jax.device_get(run(params, batch["encoder_input_tokens"]))
    return {
        "said": said.tolist(),
        "scores": scores.tolist(),
        "choices": chosen.scores.tolist(),
        "continued": chosen.continuation.tokens.tolist(),
    }


def run_on_eight_devices(out: str, meshes: str) -> None:
    """Ten steps on each mesh. Writes the losses, parameters and layouts that the tests read."""
    import jax

    from cosmo.engine.model import models, step, t5
    from cosmo.engine.model.optimizer import Adafactor, AdamW

    assert len(jax.devices()) == 8
    given = setting()
    report, arrays = {}, {}
    partitioning.Partitioner().mesh(jax.devices()[:1])
    report["cache"] = [jax.config.jax_enable_compilation_cache]
    for name in meshes.split(","):
        data, parts = MESHES[name]
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
        ("amsgrad", large, AdamW(amsgrad=True)),
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
    write(out, report, arrays)


def answer_on_eight_devices(out: str, meshes: str) -> None:
    """Answer and score on each mesh. Writes what the tests compare."""
    import jax

    assert len(jax.devices()) == 8
    given, report = setting(), {}
    for name in meshes.split(","):
        data, parts = MESHES[name]
        report[name] = answers(given, parts, jax.devices()[: data * parts])
    write(out, report, {})


def count_all_reduces_of_encoded_inputs(out: str, meshes: str) -> None:
    """Compile the gradient of a decoder; write the all-reduces of its encoder's output's shape.

    By mesh and scan_layers, "outside" and "inside" of loops.
    """
    import jax
    import jax.numpy as jnp

    from cosmo.engine.model import models
    from cosmo.engine.scale import hlo

    report = {}
    for name, scan_layers in itertools.product(meshes.split(","), (True, False)):
        data, parts = MESHES[name]
        model = models.EncoderDecoderModel(
            tiny_network.config(remat_policy="minimal", scan_layers=scan_layers)
        )
        partitioner = partitioning.Partitioner(num_partitions=parts)
        mesh = partitioner.mesh(jax.devices()[: data * parts])
        layout = partitioner.layout(mesh)
        params = models.abstract_params(model)
        shardings = partitioner.param_shardings(mesh, params, models.logical_axes(model))
        rows = partitioning.batch_sharding(mesh)

        def loss(params, encoded_BSM, x_BTM, model=model, layout=layout):
            with layout.active():
                targets_BT, inputs_BS = (jnp.ones(a.shape[:2], int) for a in (x_BTM, encoded_BSM))
                decoder = models.bind(model, params).decoder
                return jnp.sum(jnp.square(decoder(x_BTM, encoded_BSM, targets_BT, inputs_BS)))

        grad = jax.jit(
            jax.grad(loss, (0, 1)),
            in_shardings=(shardings, rows, rows),
            out_shardings=(shardings, rows),
        )
        activations = [jax.ShapeDtypeStruct((8, length, 16), jnp.float32) for length in (10, 6)]
        program = hlo.parse(grad.lower(params, *activations).compile().as_text())
        shape = f"f32[{8 // data},10,16]"
        found = {"outside": 0, "inside": 0}
        for computation, instructions in program.computations.items():
            where = "outside" if computation == program.entry else "inside"
            for instruction in instructions.values():
                if instruction.opcode.startswith("all-reduce"):
                    # A copy's gradient has a leading axis of one.
                    shapes = instruction.shape.replace("[1,", "[")
                    found[where] += shapes.count(shape)
        report[f"{name} {scan_layers}"] = found
    write(out, report, {})


def write(out: str, report: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write OUT.json and OUT.npz."""
    np.savez(out + ".npz", **arrays)
    Path(out + ".json").write_text(json.dumps(report))


def run_as_one_of_two(out: str, meshes: str, port: str, process: str) -> None:
    """The same on two devices of each of two processes; the first writes."""
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    given, report, arrays = setting(), {}, {}
    for name in meshes.split(","):
        losses, rows, state = run_mesh(given, MESHES[name][1], jax.devices())
        report[name] = {"losses": losses, "rows": rows}
        whole = multihost_utils.process_allgather(state.params, tiled=True)
        arrays.update({f"{name}:{k}": np.asarray(a) for k, a in paths(whole).items()})
    if process == "0":
        write(out, report, arrays)


if __name__ == "__main__":
    modes = {
        "train": run_on_eight_devices,
        "answer": answer_on_eight_devices,
        "count": count_all_reduces_of_encoded_inputs,
        "two": run_as_one_of_two,
    }
    modes[sys.argv[1]](*sys.argv[2:])
