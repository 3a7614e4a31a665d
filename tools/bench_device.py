"""Time train steps of a large T5 on the accelerators that are here.

`python -m tools.bench train --model=t5_1_1_xl` takes full rows of random pieces, bfloat16,
Adafactor and all devices. Settings that are left open are chosen as `train` chooses them.
"""

import argparse
import json
import statistics
import time

from tools import bench_sides

NVIDIA_XL_H100 = 50.4  # sequences/s and GPU that NVIDIA published for T5X XL, 512/128, fp8


def measure(args: argparse.Namespace) -> dict:
    """Compile and run the step. Return its figures."""
    import jax
    import numpy as np

    from cosmo.engine.data import datasets
    from cosmo.engine.model import models, optimizer, partitioning, step
    from cosmo.engine.model.step import compile_step
    from cosmo.engine.scale import chips, sizing

    attention = args.attention
    if attention == "fast":
        attention = "cudnn" if jax.default_backend() == "gpu" else "fused"
    network = bench_sides.network(
        args.model,
        dtype=args.dtype,
        dropout_rate=args.dropout_rate,
        remat_policy=args.remat_policy,
        attention=attention,
    )
    model = models.EncoderDecoderModel(network, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    lengths = {"inputs": args.inputs, "targets": args.targets}
    # No task is read: a step needs the shapes alone.
    dataset = datasets.DatasetConfig(
        "none", lengths, batch_size=args.batch_size, pack=not args.unpacked
    )
    batch = datasets.abstract_batch(dataset)
    # T5X's optimizer: AdamW's state of an XL would be twice the parameters.
    settings = step.StepConfig(optimizer.Adafactor(), num_microbatches=args.num_microbatches)
    partitioner = partitioning.Partitioner(args.num_partitions)
    # As `train` chooses, so that the figure is of what a user would run.
    model = sizing.choose_attention(model, batch, chips.by_kind(jax.devices()[0].device_kind))
    choice = sizing.choose_for_this_run(model, settings, partitioner, batch)
    model, settings, partitioner = sizing.apply_device_settings(
        model, settings, partitioner, choice
    )
    layout = partitioner.layout(partitioner.mesh())
    abstract, shardings = step.state_shardings(model, settings, partitioner, layout.mesh)
    began = time.monotonic()
    run = compile_step(model, settings, batch, layout, abstract, shardings, 0)
    compiled = time.monotonic() - began
    # In place on the devices: no host need hold the model.
    state = step.init_sharded_state(model, settings, 0, shardings)

    random = np.random.default_rng(0)
    rows = {
        name: np.ones(leaf.shape, np.int32)
        # One segment a row and no padding: every position computed counts as a token.
        if "segment" in name or "weights" in name
        else random.integers(3, 2000, leaf.shape).astype(np.int32)
        for name, leaf in batch.items()
    }
    rows = partitioning.put_batch(rows, layout.mesh)
    seconds = []
    for number in range(args.steps + 2):
        # After the steps that allocate, which are not counted either.
        if args.profile and number == 2:
            jax.profiler.start_trace(args.profile)
        began = time.monotonic()
        state, sums = run(state, rows, None, None)
        loss = float(sums["loss"] / sums["loss_weight"])  # waits for the step
        seconds.append(time.monotonic() - began)
    if args.profile:
        jax.profiler.stop_trace()

    devices = jax.devices()
    chip = chips.by_kind(devices[0].device_kind)
    median = statistics.median(seconds[2:])  # the first steps also allocate
    # MFU counts the least possible products, so that recomputation does not count as work.
    flops = sizing.minimum_matmul_flops(model, batch) / len(devices)
    peak = chip.matmul_flops if chip else None
    memory = devices[0].memory_stats() or {}
    return {
        "model": args.model,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "settings": vars(choice),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        "compile_seconds": compiled,
        "step_seconds": median,
        "tokens_per_second": args.batch_size * (args.inputs + args.targets) / median,
        "rows_per_second_and_device": args.batch_size / median / len(devices),
        "mfu": flops / median / peak if peak else None,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "loss": loss,
    }


def text_report(found: dict) -> str:
    """Return the figures as people read them."""
    mfu, peak = found["mfu"], found["peak_bytes"]
    lines = [
        f"{found['model']}, {found['parameters']:,} parameters, {found['device']}, "
        + ", ".join(f"{name} {value}" for name, value in found["settings"].items()),
        f"  {found['tokens_per_second']:,.0f} tokens/s, {found['step_seconds']:.3f} s a step, "
        f"compiled in {found['compile_seconds']:.0f} s",
        f"  {found['rows_per_second_and_device']:.1f} rows/s a device"
        + (f" (NVIDIA's H100 with fp8: {NVIDIA_XL_H100})" if found["model"] == "t5_1_1_xl" else ""),
        "  MFU " + (f"{mfu:.1%}" if mfu else "unknown: this device's peak is not in chips.CHIPS"),
        "  peak memory " + (f"{peak / 2**30:.1f} GiB" if peak else "unknown"),
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train --model`."""
    one = parser.add_argument_group("train --model: large models on the accelerators that are here")
    one.add_argument("--model", metavar="NAME", help="a file of gin/models, such as t5_1_1_xl")
    one.add_argument("--batch_size", type=int, default=32, help="rows over all devices (32)")
    one.add_argument("--inputs", type=int, default=512, help="tokens (512)")
    one.add_argument("--targets", type=int, default=128, help="tokens (128)")
    one.add_argument("--dtype", default="bfloat16", help="of the computation (bfloat16)")
    one.add_argument(
        "--attention", default="auto", help="plain, fused, cudnn, auto, or fast: cudnn or fused"
    )
    one.add_argument("--unpacked", action="store_true", help="rows without segment ids")
    one.add_argument("--remat_policy", default="auto", help="a policy of REMAT_POLICY (auto)")
    one.add_argument("--num_microbatches", type=int, help="(chosen)")
    one.add_argument("--num_partitions", type=int, help="(chosen)")
    one.add_argument("--profile", metavar="DIR", help="write a trace of the steps for XProf")
    one.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    found = measure(args)
    print(json.dumps(found) if args.json else text_report(found))
