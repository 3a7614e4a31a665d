"""Measure time and memory of converting a large checkpoint: `python -m tools.bench_convert`.

Writes a T5X checkpoint of random numbers in the shape of a published T5 1.1 (xl: 2.85 billion
parameters, 11 GB). Sends it through `python -m cosmo import` and `export` in every direction. Each
command's peak resident memory stands beside the bound of 1.5 times the largest tensor of its source
plus 1 GiB. Takes four times the checkpoint's size on disk, and removes it.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
from etils import epath

from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.interop import names, t5x
from cosmo.engine.model import t5
from tools import bench_sides

SIZES = ("small", "large", "xl")
# The step of the LM-adapted T5 that Cosmo starts from.
STEP = 1_100_000


def write_random(folder: str, config: t5.T5Config) -> int:
    """Write a T5X checkpoint of random numbers; return the bytes of its largest tensor."""
    # 4 million numbers, over and over: 2.85 billion fresh ones would take longer than the
    # conversion.
    noise = np.random.default_rng(0).standard_normal(2**22).astype(np.float32)
    arrays, largest = {}, 0
    for parameter in names.parameters(config):
        stack = (parameter.layers,) if parameter.side else ()
        # Not Python's hash, which differs from one process to the next.
        seed = zlib.crc32("/".join(parameter.path).encode())

        # Any part is made when it is asked for, so that the source needs no memory either.
        def read(index, seed=seed):
            shape = tuple(part.stop - part.start for part in index)
            start = (seed + 7919 * sum(part.start for part in index)) % (len(noise) // 2)
            return np.resize(noise[start:], shape)

        shape = (*stack, *parameter.shape)
        arrays[parameter.path] = lazy.LazyArray(shape, np.dtype(np.float32), read)
        largest = max(largest, 4 * int(np.prod(parameter.shape)))
    out = epath.Path(folder) / f"checkpoint_{STEP}"
    out.mkdir(parents=True)
    t5x.write_checkpoint(out, STEP, arrays, config, None, lambda count: None)
    return largest


def measure(*arguments: str) -> tuple[float, int]:
    """Return (seconds, peak resident bytes) of `python -m cosmo ARGUMENTS`."""
    began = time.monotonic()
    command = [sys.executable, "-m", "cosmo", *arguments, "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    # wait4 gives this child's peak. RUSAGE_CHILDREN has the largest of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    # Linux counts in KiB.
    return time.monotonic() - began, usage.ru_maxrss * 1024


def main(argv: list[str] | None = None) -> int:
    """Convert in every direction; return 1 if a conversion took more memory than the bound."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="xl", help="of T5 1.1 (xl)")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    # A folder may be given, because the system's temporary one is often in memory.
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        at = {
            name: str(pathlib.Path(work) / name) for name in ("t5x", "ours", "hf", "again", "out")
        }
        largest = write_random(at["t5x"], bench_sides.network(f"t5_1_1_{args.size}"))
        bound = 1.5 * largest + 2**30
        print(f"T5 1.1 {args.size}: largest tensor {largest / 2**20:.0f} MiB, bound {_mib(bound)}")
        highest = 0
        for name, arguments in (
            ("T5X to ours", ["import", f"--source={at['t5x']}", f"--output={at['ours']}"]),
            ("ours to HuggingFace", ["export", "--format=hf", f"--checkpoint={at['ours']}",
                                     f"--output={at['hf']}"]),
            ("HuggingFace to ours", ["import", f"--source={at['hf']}", f"--output={at['again']}"]),
            ("ours to T5X", ["export", "--format=t5x", f"--checkpoint={at['again']}",
                             f"--output={at['out']}"]),
        ):  # fmt: skip
            seconds, peak = measure(*arguments)
            highest = max(highest, peak)
            print(f"  {name:<20} {seconds:6.0f} s, peak {_mib(peak)}", flush=True)
    return int(highest > bound)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
