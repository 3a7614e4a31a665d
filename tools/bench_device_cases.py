"""Measure training, decoding and labels of large T5s on the accelerators that are here.

`python -m tools.bench device --output=FILE` runs each case in a process of its own, and keeps its
figures in FILE as JSON. Given again, it runs the cases that FILE has no figures of. No case begins
after --minutes. `--rehearse` runs the same cases with tiny networks, for a machine with a CPU
alone.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.tables import text_table
from tools import bench_sides

# JAX takes three quarters of a GPU's memory by default.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# Lengths of the five labels in T5's pieces, EOS included where RoTs never follow.
LABEL_PIECES = (7, 15, 13, 11, 14)
SHARED_PIECES = 2  # with which all labels begin


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: `kind` is "train", "decode" or "label"."""

    kind: str
    model: str
    batch_size: int
    fast_attention: bool = False  # cuDNN's on a GPU, our kernel elsewhere
    packed: bool = True

    @property
    def name(self) -> str:
        """The case's key in the file of results."""
        parts = [self.kind, self.model, f"batch {self.batch_size}"]
        if self.kind == "train":
            parts += ["fast" if self.fast_attention else "plain"]
            parts += ["packed" if self.packed else "unpacked"]
        return ", ".join(parts)


# The most wanted first, because the time may end.
CASES = (
    Case("train", "t5_1_1_xl", 32, fast_attention=True, packed=False),
    Case("train", "t5_1_1_xl", 32),
    Case("decode", "t5_1_1_xl", 1),
    Case("decode", "t5_1_1_xl", 8),
    Case("decode", "t5_1_1_xl", 64),
    Case("label", "t5_1_0_large", 64),
    Case("train", "t5_1_1_xl", 32, packed=False),
    Case("train", "t5_1_1_xl", 32, fast_attention=True),
    Case("train", "t5_1_1_large", 64, fast_attention=True, packed=False),
    Case("train", "t5_1_1_large", 64),
)


def measure_inference(args: argparse.Namespace) -> dict:
    """Time generation or labels of fresh bfloat16 parameters on one device.

    Tokens a second are of whole answers. `bandwidth_share` is the bytes of the decoder's parameters
    over the time of a step and the chip's peak.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cosmo.engine.model import decoding, generate, held_params, models, partitioning
    from cosmo.engine.scale import chips
    from tools.bench_rates import timed

    model = models.EncoderDecoderModel(bench_sides.network(args.model, dtype=args.dtype))
    layout = partitioning.Partitioner(1).layout(partitioning.Partitioner(1).mesh(jax.devices()[:1]))
    random = np.random.default_rng(0)
    inputs = random.integers(3, 2000, (args.batch_size, args.inputs)).astype(np.int32)

    @jax.jit
    def fresh():
        params = models.init(model, jax.random.key(0))
        return jax.tree.map(lambda x: x.astype(args.dtype), params)

    with layout.active():
        params = held_params.hold(model, fresh(), layout)
        found = {"model": args.model, "device": jax.devices()[0].device_kind}
        if args.kind == "label":
            pieces = random.integers(3, 2000, (len(LABEL_PIECES), max(LABEL_PIECES)))
            pieces[:, :SHARED_PIECES] = pieces[0, :SHARED_PIECES]
            labels = [row[:n].tolist() for row, n in zip(pieces, LABEL_PIECES, strict=True)]
            score = jax.jit(lambda p, x: generate.score_choices(model, p, x, labels))
            rates = timed(lambda: np.asarray(score(params, inputs)), args.steps, args.batch_size)
            return {**found, "labels_per_second": float(np.median(rates["rates"]))}

        def seconds(tokens: int) -> float:
            config = decoding.DecodingConfig(max_new_tokens=tokens, min_length=tokens - 1)
            run = jax.jit(lambda p, x: generate.predict(model, p, x, config).tokens)
            rates = timed(lambda: np.asarray(run(params, inputs)), args.steps, 1)["rates"]
            return 1 / float(np.median(rates))

        whole, one = seconds(args.targets), seconds(1)
    step = (whole - one) / (args.targets - 1)
    leaves = jax.tree.leaves((params.layers, params.logits_VM))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    chip = chips.by_kind(jax.devices()[0].device_kind)
    peak = chip.hbm_bytes_per_second if chip else None
    memory = jax.devices()[0].memory_stats() or {}
    return {
        **found,
        "tokens_per_second": args.batch_size * args.targets / whole,
        "step_seconds": step,
        "bandwidth_share": size / step / peak if peak and step > 0 else None,
        "dtype": jnp.dtype(args.dtype).name,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def command(case: Case, rehearse: bool) -> list[str]:
    """Return the command of a case."""
    model = "t5_1_1_tiny" if rehearse else case.model
    sizes = {"batch_size": 2 if rehearse else case.batch_size}
    sizes |= {"inputs": 128, "targets": 128} if rehearse else {}
    if case.kind == "train":
        attention = "fast" if case.fast_attention else "plain"
        verb = ["train", "--json", f"--attention={attention}"]
        verb += [] if case.packed else ["--unpacked"]
    else:
        verb = ["device", f"--kind={case.kind}"]
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    steps = "--steps=1" if rehearse else "--steps=8"
    return [sys.executable, "-m", "tools.bench", *verb, f"--model={model}", steps, *flags]


def measure_case(case: Case, rehearse: bool, seconds: float) -> dict:
    """Return a case's figures, or {"error": the end of what it printed}."""
    environment = {**MEMORY, **os.environ}
    try:
        done = subprocess.run(
            command(case, rehearse),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished in {seconds:.0f} s"}
    if done.returncode:
        return {"error": done.stderr[-1000:]}
    return json.loads(done.stdout.splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `device`."""
    parser.description = __doc__
    add = parser.add_argument
    add("--output", help="the file of results")
    add("--minutes", type=float, default=8.0, help="in which cases begin (8)")
    add("--rehearse", action="store_true", help="tiny networks")
    # A case of its own process.
    add("--kind", choices=("decode", "label"), help=argparse.SUPPRESS)
    add("--model", help=argparse.SUPPRESS)
    add("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    for name, size in {"batch_size": 8, "inputs": 512, "targets": 128, "steps": 8}.items():
        add(f"--{name}", type=int, default=size, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run what is missing and print the table; return 1 if a case failed or is still missing."""
    from cosmo.engine.base.errors import UserError

    if args.kind:
        print(json.dumps(measure_inference(args)))
        return 0
    if not args.output:
        raise UserError("give --output=FILE, which keeps the figures", setting="output")
    path = pathlib.Path(args.output)
    results = json.loads(path.read_text()) if path.exists() else {}
    began = time.monotonic()
    for case in CASES:
        left = 60 * args.minutes - (time.monotonic() - began)
        if left > 0 and "error" in results.get(case.name, {"error": ""}):
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            # A case that began may end late, by less than it takes to compile.
            results[case.name] = measure_case(case, args.rehearse, left + 120)
            write_atomic(path, json.dumps(results, indent=1) + "\n")
    print(table(results))
    missing = [c.name for c in CASES if "error" in results.get(c.name, {"error": ""})]
    if missing:
        print(f"no figures of {'; '.join(missing)}: give the command again", file=sys.stderr)
    return 1 if missing else 0


def table(results: dict[str, dict]) -> str:
    """Return the figures of all cases as a table."""
    rows = [["case", "a second", "share of peak", "GiB"]]
    for name, found in results.items():
        if "error" in found:
            rows.append(
                [name, "failed: " + found["error"].strip().rpartition("\n")[2][:60], "", ""]
            )
            continue
        rate = next(
            f"{found[key]:,.1f} {unit}"
            for key, unit in (
                ("rows_per_second_and_device", "rows"),
                ("labels_per_second", "labels"),
                ("tokens_per_second", "tokens"),
            )
            if key in found
        )
        share, peak = found.get("mfu", found.get("bandwidth_share")), found.get("peak_bytes")
        rows.append(
            [name, rate, f"{share:.1%}" if share else "?", f"{peak / 2**30:.1f}" if peak else "?"]
        )
    return text_table(rows)
