"""Measure time and memory of converting a large checkpoint: `python -m tools.bench_convert`.

Writes a T5X checkpoint of random numbers in the shape of a published T5 1.1 (xl: 2.85 billion
parameters, 11 GB). Sends it through `python -m cosmo import` and `export` in every direction. Each
command's peak resident memory stands beside the bound of 1.5 times the largest tensor of its source
plus 1 GiB. Takes four times the checkpoint's size on disk, and removes it. A BlenderBot goes
through HuggingFace's format alone: T5X has none.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
from etils import epath

from cosmo.engine.base import config as gin_files
from cosmo.engine.base import saved_settings
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import huggingface, names, t5x
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.models import NetworkConfig
from tools import bench_sides

SIZES = ("small", "large", "xl")  # of T5 1.1
BLENDERBOT_SIZES = ("blenderbot_400m", "blenderbot_1b", "blenderbot_3b")
# The step of the LM-adapted T5 that Cosmo starts from.
STEP = 1_100_000


def random_params(config: NetworkConfig) -> tuple[dict[Path, lazy.LazyArray], int]:
    """Return (random parameters by path, the bytes of the largest tensor)."""
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
    return arrays, largest


def write_random(folder: str, config: NetworkConfig) -> int:
    """Write a checkpoint of random numbers; return the bytes of its largest tensor.

    A T5 becomes T5X's, a BlenderBot a HuggingFace folder.
    """
    arrays, largest = random_params(config)
    if isinstance(config, BlenderbotConfig):
        out = epath.Path(folder)
        out.mkdir(parents=True)
        huggingface.write_folder(out, arrays, config, "float32", 10**10, lambda count: None)
        return largest
    out = epath.Path(folder) / f"checkpoint_{STEP}"
    out.mkdir(parents=True)
    t5x.write_checkpoint(out, STEP, arrays, config, None, lambda count: None)
    return largest


def network_of(size: str) -> NetworkConfig:
    """Return the network of one of SIZES or BLENDERBOT_SIZES."""
    if size not in BLENDERBOT_SIZES:
        return bench_sides.network(f"t5_1_1_{size}")
    text = (gin_files.ROOT / f"gin/models/{size}.gin").read_text()
    sizes = {name.lower(): value for name, value in saved_settings.macros_in(text).items()}
    fields = {field.name for field in dataclasses.fields(BlenderbotConfig)}
    return BlenderbotConfig(**{k: v for k, v in sizes.items() if k in fields})


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
    sizes = SIZES + BLENDERBOT_SIZES
    parser.add_argument("--size", choices=sizes, default="xl", help="of T5 1.1, or BlenderBot's")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    # A folder may be given, because the system's temporary one is often in memory.
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        at = {
            name: str(pathlib.Path(work) / name) for name in ("t5x", "ours", "hf", "again", "out")
        }
        blenderbot = args.size in BLENDERBOT_SIZES
        largest = write_random(at["hf" if blenderbot else "t5x"], network_of(args.size))
        bound = 1.5 * largest + 2**30
        print(f"{args.size}: largest tensor {largest / 2**20:.0f} MiB, bound {_mib(bound)}")
        highest = 0
        conversions = (
            ("T5X to ours", ["import", f"--source={at['t5x']}", f"--output={at['ours']}"]),
            ("ours to HuggingFace", ["export", "--format=hf", f"--checkpoint={at['ours']}",
                                     f"--output={at['hf']}"]),
            ("HuggingFace to ours", ["import", f"--source={at['hf']}", f"--output={at['again']}"]),
            ("ours to T5X", ["export", "--format=t5x", f"--checkpoint={at['again']}",
                             f"--output={at['out']}"]),
        )  # fmt: skip
        if blenderbot:
            conversions = (
                ("HuggingFace to ours", ["import", f"--source={at['hf']}",
                                         f"--output={at['ours']}"]),
                ("ours to HuggingFace", ["export", "--format=hf", f"--checkpoint={at['ours']}",
                                         f"--output={at['out']}"]),
            )  # fmt: skip
        for name, arguments in conversions:
            seconds, peak = measure(*arguments)
            highest = max(highest, peak)
            print(f"  {name:<20} {seconds:6.0f} s, peak {_mib(peak)}", flush=True)
    return int(highest > bound)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
