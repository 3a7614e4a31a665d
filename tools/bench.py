"""Speed beside the peers on one machine: `python -m tools.bench train|decode|input|label`.

Each side runs in processes of its own, in turn, and the medians are compared. T5 1.1 small (77M
parameters), float32, full batches of random tokens; `decode` gives all sides the same weights. The
peers are HuggingFace transformers on PyTorch and, for decoding, CTranslate2: they are measured if
they can be imported here, or by --hf_python in another environment. Ours runs with huge pages, as
`python -m cosmo` starts itself. `input` is another comparison: of SeqIO live and a cache of rows;
`label` is of Canary's labels (see `bench_label`), `pipeline` of CO3: post-processing on one core,
and calls a second.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from cosmo.engine.base.command_line import HUGE_PAGES
from tools import bench_device, bench_input, bench_label, bench_pipeline
from tools.bench_sides import SIDES, SIZES, write_weights


def measure(side: str, python: str, args: argparse.Namespace) -> dict | None:
    """Run one side in a process of its own; None if its libraries are not installed there."""
    command = [python, "-m", "tools.bench", args.what, f"--side={side}", f"--steps={args.steps}"]
    command += [f"--dropout_rate={args.dropout_rate}", f"--weights={args.weights}"]
    command += [f"--top_p={args.top_p}"] if args.top_p is not None else []
    command += ["--scan_layers"] if args.scan_layers else []
    environment = dict(os.environ)
    if side == "ours":
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        if "ModuleNotFoundError" in done.stderr:
            return None
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_step(args: argparse.Namespace) -> float:
    """Seconds from the start of `python -m cosmo train` to its first finished step.

    The real command with SeqIO, the sample corpus and an empty compilation cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder) / "run/metrics.jsonl"
        command = [sys.executable, "-m", "cosmo", "train", "--gin_file=gin/cosmo/tiny.gin"]
        command += ["--gin_file=gin/models/t5_1_1_small.gin", f"--gin.MODEL_DIR={folder}/run"]
        command += ["--gin.BATCH_SIZE=8", "--gin.STATS_PERIOD=1", "--gin.TRAIN_STEPS=1000"]
        command += [f"--gin.SCAN_LAYERS={args.scan_layers}", "--quiet"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment)
        try:
            while not (metrics.exists() and metrics.read_text()):
                if process.poll() is not None:
                    raise SystemExit("python -m cosmo train failed")
                time.sleep(0.05)
            return time.monotonic() - began
        finally:
            process.kill()
            process.wait()


FIRST_TOKEN = """
import cosmo, sys
from cosmo.engine.base import command_line
command_line.set_up_jax()
cosmo.load(sys.argv[1]).generate(["Hello!"], max_new_tokens=1)
"""


def first_token(args: argparse.Namespace) -> float:
    """Seconds from the start of a process to its first token, compiled in an earlier one."""
    environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{pathlib.Path(args.weights).parent}/cache"
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for _ in range(2):
        began = time.monotonic()
        command = [sys.executable, "-c", FIRST_TOKEN, args.weights]
        subprocess.run(command, check=True, env=environment)
    return time.monotonic() - began


def compare(args: argparse.Namespace) -> None:
    """Measure every side in turn and print the table."""
    rates: dict[str, list[float]] = {}
    answers = {}
    for number in range(args.rounds):
        for side in SIDES[args.what]:
            result = measure(side, sys.executable if side == "ours" else args.hf_python, args)
            if result is None:
                continue
            rates.setdefault(side, []).extend(result["tokens"] / s for s in result["seconds"])
            answers[side] = result.get("answer")
            latest = statistics.median(rates[side])
            print(f"round {number + 1}: {side} {latest:.0f} tokens/s", file=sys.stderr)
    kind = "training, input and target tokens" if args.what == "train" else "generated tokens"
    shape = f"batch {SIZES['batch']}, {SIZES['inputs']}/{SIZES['targets']}"
    print(f"T5 1.1 small, {shape}, float32: {kind}")
    median = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        ratio = f", {median[side] / median['huggingface']:.2f} x" if "huggingface" in median else ""
        print(
            f"  {side:<12} {median[side]:8.0f} tokens/s (of {len(values)}: {min(values):.0f} to "
            f"{max(values):.0f}){ratio}"
        )
    for side in SIDES[args.what]:
        if side not in median:
            print(f"  {side}: is not installed here (see --hf_python)")
    if args.what == "decode" and args.top_p is None:
        for side, answer in answers.items():
            rows = zip(answer, answers["ours"], strict=True)
            same = statistics.mean(a == b for row in rows for a, b in zip(*row, strict=True))
            if side != "ours":
                print(f"  {side}: {same:.1%} of its tokens are ours")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = [*SIDES, "input", "label", "pipeline"]
    parser.add_argument(
        "what", choices=choices, help="train steps, generation, reading, labels, or CO3"
    )
    parser.add_argument("--steps", type=int, default=4, help="measured repetitions a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side, in turn")
    parser.add_argument("--dropout_rate", type=float, default=0.0, help="train: of both sides")
    parser.add_argument("--top_p", type=float, help="decode: nucleus sampling instead of greedy")
    parser.add_argument("--scan_layers", action="store_true", help="scan layers, not unroll them")
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has the peers")
    bench_device.add_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=15, help="input, pipeline: of each measurement"
    )
    parser.add_argument("--vocabulary", metavar="FILE", help="label: T5's, if not in ../shared")
    parser.add_argument("--triples", help="pipeline: a file of your own; made up without it")
    parser.add_argument("--limit", type=int, default=1200, help="pipeline: triples to ask about")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.what == "input":
        bench_input.main(args)
        return 0
    if args.what == "pipeline":
        bench_pipeline.main(args)
        return 0
    if args.side:
        sides = bench_label.SIDES if args.what == "label" else SIDES[args.what]
        print(json.dumps(sides[args.side](args)))
        return 0
    if args.what == "label":
        bench_label.main(args, measure)
        return 0
    if args.model:
        return bench_device.main(args)
    with tempfile.TemporaryDirectory() as folder:
        args.weights = f"{folder}/weights"
        if args.what == "decode":
            write_weights(args.weights)
        compare(args)
        if args.what == "train":
            seconds = first_step(args)
            print(f"  process start to first finished step, cold cache: {seconds:.1f} s")
        else:
            seconds = first_token(args)
            print(f"  process start to first token, warm compilation cache: {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
