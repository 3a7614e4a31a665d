"""Measure rates of several sides in turn, and print their medians beside each other."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from cosmo.engine.base.command_line import HUGE_PAGES
from cosmo.engine.base.tables import text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks whose sides run in processes of their own."""
    parser.add_argument("--steps", type=int, default=4, help="measured repetitions a process (4)")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side, in turn (3)")
    threads = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=threads, help="of every side (all cores)")
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)


def timed(run: Callable[[], object], steps: int, units: int) -> dict:
    """Return {"rates": units a second, "cpu_rates": units a CPU-second} of `steps` calls.

    A call before them is not counted.
    """
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):  # the first call compiles
        began, cpu_began = time.monotonic(), time.process_time()
        run()
        seconds.append(time.monotonic() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    return {
        "rates": [units / s for s in seconds[1:]],
        "cpu_rates": [units / s for s in cpu_seconds[1:]],
    }


def processor() -> str:
    """Return the processor, its cores that this process may use, its extensions, and the load."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    found = set(values.get("flags", "").split()) & {"avx2", "avx512f", "amx_tile"}
    kind, cores = values.get("model name", platform.processor()), len(os.sched_getaffinity(0))
    extensions = ", ".join(sorted(found)) or "no AVX2"
    load = " ".join(f"{average:.1f}" for average in os.getloadavg())
    return f"{kind}, {cores} cores, {extensions}; load average {load}"


def run_side(verb: str, side: str, args: argparse.Namespace, *flags: str) -> dict | None:
    """Return a side's result; None if its libraries are not installed there."""
    # In a process of its own, because two frameworks in one share threads and memory. Peers may be
    # installed elsewhere, where ours is not.
    python = sys.executable if side == "ours" else args.hf_python
    command = [python, "-m", "tools.bench", verb, f"--side={side}", f"--steps={args.steps}"]
    # Every side has the huge pages with which `python -m cosmo` starts itself, and equal threads.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    tuned = {"GLIBC_TUNABLES": HUGE_PAGES, **threads}
    # XLA takes a thread for each core, and a child inherits its parent's cores. `preexec_fn` would
    # fork, and a fork of a process that has used JAX may hang.
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(ours)[: args.threads])
    try:
        done = subprocess.run(
            [*command, f"--weights={args.weights}", *flags],
            capture_output=True,
            text=True,
            env={**os.environ, **tuned},
        )
    finally:
        os.sched_setaffinity(0, ours)
    if done.returncode:
        if "ModuleNotFoundError" in done.stderr:
            return None
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    # Libraries may print before it.
    return json.loads(done.stdout.splitlines()[-1])


def rate_table(rates: Mapping[str, Sequence[float]], unit: str, baseline: str, digits=0) -> str:
    """Return a row for each side: median, number, range, and ratio to the median of `baseline`."""
    rows = [["", unit, "of", "least", "most", f"x {baseline}"]]
    # Medians and ranges, because neighbours on a shared machine slow single repetitions down.
    median = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        numbers = [f"{x:,.{digits}f}" for x in (median[side], min(values), max(values))]
        ratio = f"{median[side] / median[baseline]:.2f}" if baseline in median else "-"
        rows.append([side, numbers[0], str(len(values)), *numbers[1:], ratio])
    return text_table(rows, indent=2)
