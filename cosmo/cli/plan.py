"""`python -m cosmo plan`: print the cost of a training step on devices that are absent."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table

# A flag of libtpu. Without it libtpu 0.0.42 crashes for a TPU v6e: its compiler nests so deep in
# fused products that it overruns the stack of a fiber (64 KiB).
DEEP_STACK = "--fibers_default_thread_stack_size=1048576"


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the variables to set before JAX starts: no accelerator, as many devices as asked."""
    name, _, count = args.topology.partition(":")
    settings = {
        "JAX_PLATFORMS": "cpu",  # a plan must not take the accelerators from a run on this machine
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the metadata server of a TPU VM
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock file guards devices, and none is used
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v3-8",  # any: the topology decides what is compiled for
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile_seconds is to be of compiling
    }
    if name == "v6e":
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        settings["LIBTPU_INIT_ARGS"] = f"{DEEP_STACK} {given}".strip()
    if name == "cpu" and count.isdigit():
        flag = f"--xla_force_host_platform_device_count={count}"
        settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return settings


def run(args: argparse.Namespace) -> int:
    """Print a plan as a table or JSON. Return 1 if the step does not fit."""
    from cosmo.engine.base import config
    from cosmo.engine.scale import plan

    job = config.call(plan.PlannedRun)
    given = [f for f in ("partitions", "microbatches", "remat_policies") if getattr(args, f)]
    if given and not args.sweep:
        raise UserError(f"--{given[0]} is for --sweep; one setting is given with --gin.NAME=VALUE")
    if args.sweep and args.hlo:
        raise UserError("--hlo writes one program: leave out --sweep, or --hlo")
    if args.sweep:
        return run_sweep(args, job)
    made = plan.plan_step(job, args.topology, start_step=args.start_step, hlo_path=args.hlo)
    if args.json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
        # An exit code, so that a script can try slices.
        return 0 if made.fits else 1
    print(plan_table(made))
    if made.fits:
        return 0
    found = plan.remedy(job, made, args.start_step)
    if found is not None:
        print(f"what fits: {found.flags()} ({_gib(found.hbm_peak_bytes)})")
    else:
        print(
            f"nothing tried fits {made.devices} of these: take a larger slice, a smaller "
            "BATCH_SIZE or shorter TASK_FEATURE_LENGTHS"
        )
    return 1


def run_sweep(args: argparse.Namespace, job: Any) -> int:
    """Plan every combination of settings, and print those that fit. Return 1 if none does."""
    from cosmo.engine.scale import plan, sizing

    choices = [
        sizing.DeviceSettings(*one)
        for one in itertools.product(
            _values(args.partitions or "1,2,4,8", int, "--partitions"),
            _values(args.remat_policies or "minimal,full", str, "--remat_policies"),
            _values(args.microbatches or "1,2", int, "--microbatches"),
        )
    ]
    plans, began = [], time.monotonic()
    results = plan.sweep(job, args.topology, choices, args.start_step)
    for number, (choice, made) in enumerate(results, 1):
        # Choices compile for about as long as each other.
        left = (time.monotonic() - began) / number * (len(choices) - number)
        what = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(choice).items())
        # A choice that does not suit the devices is a line of the sweep, not its end.
        if isinstance(made, UserError):
            outcome = str(made)
        else:
            plans.append(made)
            outcome = _gib(made.hbm_peak_bytes) + (", fits" if made.fits else ", does not fit")
        # stdout is the table or the JSON alone.
        print(f"{number} of {len(choices)}: {what}: {outcome} ({left:.0f} s left)", file=sys.stderr)
    ranked = plan.rank(plans)
    if args.json:
        print(json.dumps([dataclasses.asdict(made) for made in ranked], indent=2))
        return 0 if ranked else 1
    print(
        f"{args.topology}: {len(ranked)} of {len(choices)} fit, the fastest bound first, then the "
        "least traffic and memory:"
    )
    rows = [("settings", "memory a device", "products", "collectives", "step at least")]
    for made in ranked:
        bound = made.step_seconds_bound
        rows.append(
            (
                made.flags(),
                _gib(made.hbm_peak_bytes),
                _si(made.matmul_flops, "FLOP"),
                _si(sum(made.collective_bytes.values()), "B"),
                f"{bound:.3f} s" if bound else "-",
            )
        )
    print(text_table(rows, indent=2))
    return 0 if ranked else 1


def _values(text: str, kind: type, flag: str) -> list[Any]:
    """Return the values in a flag's text, separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}={text}: give numbers, such as 1,2,4") from error


def plan_table(made: Any) -> str:
    """Return a plan as a headline and a table."""
    # Readers must not take an estimate for a compiler's count.
    how = "by arithmetic, not compiled" if made.estimated else "compiled"
    mesh = " x ".join(f"{side} {size}" for side, size in made.mesh.items())
    headline = f"{made.topology}: {made.devices} devices ({made.device}), mesh {mesh}, {how}" + (
        f" in {made.compile_seconds:.0f} s" if made.compile_seconds else ""
    )
    rows = [
        ("settings", made.flags()),
        ("parameters", f"{made.parameters:,}"),
        ("batch", f"{made.batch_size} rows, {made.tokens_per_step:,} tokens"),
        (
            "memory a device",
            f"{_gib(made.hbm_peak_bytes)} of {_gib(made.hbm_limit_bytes)} (state and batch "
            f"{_gib(made.hbm_arguments_bytes)}, the rest {_gib(made.hbm_temporaries_bytes)}): "
            + ("fits" if made.fits else "DOES NOT FIT"),
        ),
        *_costs(made),
    ]
    # Both columns hold text.
    return f"{headline}\n{text_table(rows, left=(0, 1), indent=2)}"


def _costs(made: Any) -> Iterator[tuple[str, str]]:
    """Yield the rows about products, collectives and time."""
    least = made.matmul_flops_minimum
    if made.matmul_flops is None:  # not compiled: nothing was counted
        yield "matrix products", f"at least {_si(least, 'FLOP')} a device and step"
        return
    yield (
        "matrix products",
        f"{_si(made.matmul_flops, 'FLOP')} a device and step, {made.matmul_flops / least:.3f} of "
        f"the least possible {_si(least, 'FLOP')}",
    )
    if made.kernel_flops:
        yield (
            "of these in kernels",
            f"{_si(made.kernel_flops, 'FLOP')}, with {_si(made.kernel_traffic_bytes, 'B')} of the "
            f"{_si(made.hbm_traffic_bytes, 'B')} of memory traffic: the kernels' own estimate",
        )
    # Kinds below a thousandth of all bytes are noise, such as the sum of a loss.
    kinds = sorted(made.collective_bytes.items(), key=lambda item: -item[1])
    total = sum(made.collective_bytes.values())
    shown = ", ".join(f"{kind} {_si(size, 'B')}" for kind, size in kinds if size > total / 1000)
    yield "collectives", f"{_si(total, 'B')} a device and step: {shown or 'none'}"
    if made.step_seconds_bound is None:  # of processors whose peak nobody published
        return
    seconds = {k: v for k, v in made.roofline_seconds.items() if v is not None}
    parts = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    yield "step at least", f"{made.step_seconds_bound:.3f} s ({parts})"
    if made.exposed_seconds is not None:
        yield "exposed", _exposed(made)
    rate = made.tokens_per_second_bound
    # Half too, because no real step reaches the bound.
    yield "tokens/s at most", f"{rate:,.0f}; at half of that {rate / 2:,.0f}, padding counted"
    yield (
        f"{made.steps:,} steps",
        f"{made.days_bound:.2f} days at that bound, {made.days_at_half:.2f} at half of it",
    )


def _exposed(made: Any) -> str:
    """Return the time of collectives that no computation hides, by kind, and its share."""
    total = sum(made.exposed_seconds.values())
    kinds = sorted(made.exposed_seconds.items(), key=lambda item: -item[1])
    # As in the row of collectives, less than a thousandth is noise.
    parts = [f"{kind} {seconds:.3f} s" for kind, seconds in kinds if seconds > total / 1000]
    share = total / made.step_seconds_bound
    return f"{', '.join(parts) or 'no collective'}: {share:.1%} of the step's bound"


def _si(amount: float, unit: str) -> str:
    """Return an amount with its prefix: 44.32 TFLOP, 5.74 GB, 310.00 kB."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if amount >= 10**power:
            return f"{amount / 10**power:.2f} {prefix}{unit}"
    return f"{amount / 1000:.2f} k{unit}"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f} GiB"


VERB = Verb(
    help="what a training step needs on a TPU slice or on GPUs, without having them",
    description="Compile the step that train would run for a TPU slice, with the real TPU "
    "compiler (extra `tpu`), or for CPU devices. Print whether it fits, what it computes and "
    "sends, and how fast it can be at best; for GPUs by arithmetic. Settings that are left "
    "open are chosen as train chooses them. Exit code 1 if it does not fit. An "
    "INITIAL_CHECKPOINT_PATH is not needed.",
    examples="""\
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v3:4x4
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_11b.gin --topology=v3:8x8 --json --hlo=step.txt
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v5e:4x8 --sweep
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=h100:8
""",
    run=run,
    flags="""
--topology NAME!  a TPU slice in chips (v3:4x4 is a v3-32, v4:2x2x4, v5e:4x4, v5p:2x2x2,
                  v6e:2x4), cpu:8, or by arithmetic GPUs: h100:8, h200:8, a100:8
--json            print one JSON object instead of a table
--hlo FILE        write the compiled program's text there
--start_step N:int  steps of TRAIN_STEPS that the starting checkpoint has done already (default:
                  the recipe's INITIAL_CHECKPOINT_STEP)
trying many settings:
--sweep               plan every combination; rank those that fit
--partitions A,B      (1,2,4,8)
--microbatches A,B    (1,2)
--remat_policies A,B  (minimal,full)
""",
    gin_file="gin/runs/plan.gin",
    # The recipes require both, and a plan writes nothing and reads no checkpoint.
    bindings=("MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = None"),
    environment=environment,
)
