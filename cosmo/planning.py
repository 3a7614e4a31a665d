"""Run `python -m cosmo plan`: print the cost of a training step on devices that are absent."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from typing import Any

from cosmo.engine.base.errors import UserError

# To libtpu; the TPU v6e's compiler nests so deep in fused products that libtpu 0.0.42 overruns the
# stack of a fiber (64 KiB) and dies.
DEEP_STACK = "--fibers_default_thread_stack_size=1048576"


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the variables to set before JAX starts: no accelerator, as many devices as asked."""
    name, _, count = args.topology.partition(":")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the metadata server of a TPU VM
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock file guards devices, and none is used
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v3-8",  # any: the topology says what is compiled for
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


def run_plan(args: argparse.Namespace) -> int:
    """Run `plan`: print a table or JSON. Return 1 if the step does not fit."""
    from cosmo.engine.base import config
    from cosmo.engine.scale import plan

    job = config.call(plan.PlannedRun)
    given = [f for f in ("partitions", "microbatches", "remat_policies") if getattr(args, f)]
    if given and not args.sweep:
        raise UserError(f"--{given[0]} is for --sweep; one setting is given with --gin.NAME=VALUE")
    if args.sweep and args.hlo:
        raise UserError("--hlo writes one program: leave out --sweep, or --hlo")
    if args.sweep:
        return _run_sweep(args, job)
    made = plan.plan_step(job, args.topology, start_step=args.start_step, hlo_path=args.hlo)
    found = None if made.fits or args.json else plan.remedy(job, made, args.start_step)
    if args.json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
    else:
        print(_table(made))
        if not made.fits:
            print(_what_would(made, found))
    return 0 if made.fits else 1


def _run_sweep(args: argparse.Namespace, job: Any) -> int:
    from cosmo.engine.scale import plan, sizing

    choices = [
        sizing.DeviceSettings(*one)
        for one in itertools.product(
            _list(args.partitions or "1,2,4,8", int, "--partitions"),
            _list(args.remat_policies or "minimal,full", str, "--remat_policies"),
            _list(args.microbatches or "1,2", int, "--microbatches"),
        )
    ]
    plans, began = [], time.monotonic()
    results = plan.sweep(job, args.topology, choices, args.start_step)
    for number, (choice, made) in enumerate(results, 1):
        left = (time.monotonic() - began) / number * (len(choices) - number)
        what = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(choice).items())
        if isinstance(made, UserError):
            outcome = str(made)
        else:
            plans.append(made)
            outcome = _gib(made.hbm_peak_bytes) + (", fits" if made.fits else ", does not fit")
        print(f"{number} of {len(choices)}: {what}: {outcome} ({left:.0f} s left)", file=sys.stderr)
    ranked = plan.rank(plans)
    if args.json:
        print(json.dumps([dataclasses.asdict(made) for made in ranked], indent=2))
    else:
        print(
            f"{args.topology}: {len(ranked)} of {len(choices)} fit, the fastest bound first, then "
            "the least traffic and memory; memory a device, products, collectives, step at least:"
        )
        for made in ranked:
            print(f"  {_row(made)}")
    return 0 if ranked else 1


def _list(text: str, kind: type, flag: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}={text}: give numbers, such as 1,2,4") from error


def _table(made: Any) -> str:
    """Return a plan as a table."""
    how = "by arithmetic, not compiled" if made.estimated else "compiled"
    mesh = " x ".join(f"{side} {size}" for side, size in made.mesh.items())
    least = made.matmul_flops_minimum
    lines = [
        f"{made.topology}: {made.devices} devices ({made.device}), mesh {mesh}, {how}"
        + (f" in {made.compile_seconds:.0f} s" if made.compile_seconds else ""),
        f"  settings              {made.flags()}",
        f"  parameters            {made.parameters:,}",
        f"  batch                 {made.batch_size} rows, {made.tokens_per_step:,} tokens",
        f"  memory a device       {_gib(made.hbm_peak_bytes)} of {_gib(made.hbm_limit_bytes)}"
        f" (state and batch {_gib(made.hbm_arguments_bytes)}, the rest "
        f"{_gib(made.hbm_temporaries_bytes)}): " + ("fits" if made.fits else "DOES NOT FIT"),
    ]
    if made.matmul_flops is None:
        lines.append(f"  matrix products       at least {_si(least, 'FLOP')} a device and step")
        return "\n".join(lines)
    ratio = made.matmul_flops / least
    lines.append(
        f"  matrix products       {_si(made.matmul_flops, 'FLOP')} a device and step, "
        f"{ratio:.3f} of the least possible {_si(least, 'FLOP')}"
    )
    kinds = sorted(made.collective_bytes.items(), key=lambda item: -item[1])
    total = sum(size for _, size in kinds)
    shown = ", ".join(f"{kind} {_si(size, 'B')}" for kind, size in kinds if size >= total / 1000)
    lines.append(f"  collectives           {_si(total, 'B')} a device and step: {shown or 'none'}")
    seconds = {k: v for k, v in made.roofline_seconds.items() if v is not None}
    if made.step_seconds_bound is not None:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        lines.append(f"  step at least         {made.step_seconds_bound:.3f} s ({parts})")
        rate = made.tokens_per_second_bound
        lines.append(
            f"  tokens/s at most      {rate:,.0f}; at half of that {rate / 2:,.0f}, padding counted"
        )
        lines.append(
            f"  {made.steps:,} steps".ljust(24)
            + f"{made.days_bound:.2f} days at that bound, {made.days_at_half:.2f} at half of it"
        )
    return "\n".join(lines)


def _row(made: Any) -> str:
    total = sum(made.collective_bytes.values()) / 1e9
    bound = made.step_seconds_bound
    return (
        f"{made.flags()}  {_gib(made.hbm_peak_bytes)}, {made.matmul_flops / 1e12:.1f} TFLOP, "
        f"{total:.1f} GB" + (f", {bound:.3f} s" if bound else "")
    )


def _what_would(made: Any, found: Any) -> str:
    if found is not None:
        return f"what fits: {found.flags()} ({_gib(found.hbm_peak_bytes)})"
    return (
        f"nothing tried fits {made.devices} of these: take a larger slice, a smaller BATCH_SIZE or "
        "shorter TASK_FEATURE_LENGTHS"
    )


def _si(amount: float, unit: str) -> str:
    """Return an amount with its prefix: 44.32 TFLOP, 5.74 GB, 310.00 kB."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if amount >= 10**power:
            return f"{amount / 10**power:.2f} {prefix}{unit}"
    return f"{amount / 1000:.2f} k{unit}"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f} GiB"
