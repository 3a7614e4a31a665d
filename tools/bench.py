"""Measure speed, beside the peers on one machine: `python -m tools.bench VERB`.

Each side runs in processes of its own, in turn, and medians are compared. The peers are
HuggingFace transformers on PyTorch and, for decoding, CTranslate2 (float32, int8) and ONNX Runtime.
They are measured if they can be imported here, or by --hf_python in another environment.
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

from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import HUGE_PAGES, Program, Verb, imported
from cosmo.engine.base.tables import text_table
from tools import bench_rates, bench_sides


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train` and `decode`."""
    bench_rates.add_arguments(parser)
    parser.add_argument("--dropout_rate", type=float, default=0.0, help="train: of both sides")
    targets = bench_sides.SIZES["targets"]
    parser.add_argument("--new_tokens", type=int, default=targets, help="decode: of each answer")
    parser.add_argument("--top_p", type=float, help="decode: nucleus sampling instead of greedy")
    parser.add_argument("--scan_layers", action="store_true", help="scan layers, not unroll them")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    from tools import bench_device

    add_peer_arguments(parser)
    bench_device.add_arguments(parser)


def run_train(args: argparse.Namespace) -> None:
    """Compare train steps, and time the first one; with --model measure a large model alone."""
    if args.model:
        from tools import bench_device

        bench_device.run(args)
    elif args.side:
        # The last line of a side's output is its result: see `bench_rates.run_side`.
        print(json.dumps(bench_sides.SIDES["train"][args.side](args)))
    else:
        compare("train", args)
        seconds = first_step(args)
        print(f"  process start to first finished step, cold cache: {seconds:.1f} s")


def run_decode(args: argparse.Namespace) -> None:
    """Compare generation from the same weights, and time the first token."""
    if args.side:
        print(json.dumps(bench_sides.SIDES["decode"][args.side](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.weights = f"{folder}/weights"
        # Generation has no dropout, and a HuggingFace folder stores layers apart either way.
        args_of_model = argparse.Namespace(dropout_rate=0.0, scan_layers=False)
        vocabulary = "tasks/sample/vocabulary.model"
        bench_sides.write_weights(args.weights, bench_sides.our_network(args_of_model), vocabulary)
        whole = compare("decode", args)
        one = compare("decode", argparse.Namespace(**{**vars(args), "new_tokens": 1}))
        print_parts(whole, one, args.new_tokens)
        seconds = first_token(args.weights)
        print(f"  process start to first token, warm compilation cache: {seconds:.1f} s")


def print_parts(
    whole: dict[str, list[float]], one: dict[str, list[float]], new_tokens: int
) -> None:
    """Print each side's milliseconds of the encoder with one token, and of a further step.

    Arguments are tokens a CPU-second, of answers of `new_tokens` tokens and of one.
    """
    rows = [["", "encoder and one step, CPU-ms", "a further step, CPU-ms"]]
    batch = bench_sides.SIZES["batch"]
    for side in whole.keys() & one.keys():
        first = 1000 * batch / statistics.median(one[side])
        call = 1000 * batch * new_tokens / statistics.median(whole[side])
        step = (call - first) / max(new_tokens - 1, 1)
        rows.append([side, f"{first:,.0f}", f"{step:.1f}"])
    print(text_table(sorted(rows), indent=2))


def compare(verb: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Measure every side in turn and print the tables; return tokens a CPU-second by side."""
    flags = [f"--dropout_rate={args.dropout_rate}", f"--new_tokens={args.new_tokens}"]
    flags += [f"--top_p={args.top_p}"] if args.top_p is not None else []
    flags += ["--scan_layers"] if args.scan_layers else []
    sides = bench_sides.SIDES[verb]
    rates: dict[str, list[float]] = {}
    cpu_rates: dict[str, list[float]] = {}
    answers = {}
    # Sides in turn, so that a slow minute of a shared machine falls on each of them.
    for number in range(args.rounds):
        for side in sides:
            result = bench_rates.run_side(verb, side, args, *flags)
            if result is None:
                continue
            rates.setdefault(side, []).extend(result["rates"])
            cpu_rates.setdefault(side, []).extend(result["cpu_rates"])
            answers[side] = result.get("answer")
            latest = statistics.median(rates[side])
            print(f"round {number + 1}: {side} {latest:.0f} tokens/s", file=sys.stderr)
    kind = "training, input and target tokens" if verb == "train" else "generated tokens"
    sizes = bench_sides.SIZES
    length = sizes["targets"] if verb == "train" else args.new_tokens
    shape = f"batch {sizes['batch']}, {sizes['inputs']}/{length}"
    print(f"T5 1.1 small, {shape}, float32: {kind}")
    print(f"{bench_rates.processor()}; {args.threads} threads a side")
    print(bench_rates.rate_table(rates, "tokens/s", "huggingface"))
    print(bench_rates.rate_table(cpu_rates, "tokens/CPU-s", "huggingface"))
    for side in sides:
        if side not in rates:
            print(f"  {side}: is not installed here (see --hf_python)")
    if verb == "decode" and args.top_p is None:  # samples differ by design
        for side, answer in answers.items():
            rows = zip(answer, answers["ours"], strict=True)
            same = statistics.mean(a == b for row in rows for a, b in zip(*row, strict=True))
            if side != "ours":
                print(f"  {side}: {same:.1%} of its tokens are ours")
    return cpu_rates


def first_step(args: argparse.Namespace) -> float:
    """Return the seconds from the start of `python -m cosmo train` to its first finished step."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder) / "run/metrics.jsonl"
        command = [sys.executable, "-m", "cosmo", "train", "--gin_file=gin/cosmo/tiny.gin"]
        command += ["--gin_file=gin/models/t5_1_1_small.gin", f"--gin.MODEL_DIR={folder}/run"]
        # A line of metrics after each step shows the first one. The run is killed long before its
        # last.
        command += ["--gin.BATCH_SIZE=8", "--gin.STATS_PERIOD=1", "--gin.TRAIN_STEPS=1000"]
        command += [f"--gin.SCAN_LAYERS={args.scan_layers}", "--quiet"]
        # An empty compilation cache, because the first start is the one that users wait for.
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment)
        try:
            while not (metrics.exists() and metrics.read_text()):
                if process.poll() is not None:
                    raise SystemExit("python -m cosmo train failed")
                # 50 ms are little beside the 20 s of a cold start.
                time.sleep(0.05)
            return time.monotonic() - began
        finally:
            # Not SIGTERM, on which a run saves a checkpoint first.
            process.kill()
            process.wait()


FIRST_TOKEN = """
import cosmo, sys
from cosmo.engine.base import command_line
command_line.set_up_jax()
cosmo.load(sys.argv[1]).generate(["Hello!"], max_new_tokens=1)
"""


def first_token(weights: str) -> float:
    """Return the seconds from the start of a process to its first token."""
    environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{pathlib.Path(weights).parent}/cache"
    # JAX keeps programs that took 1 s to compile. Here all are kept, as the second start finds
    # them.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for _ in range(2):  # the first process compiles
        began = time.monotonic()
        command = [sys.executable, "-c", FIRST_TOKEN, weights]
        subprocess.run(command, check=True, env=environment)
    return time.monotonic() - began


def _verb(module: str, help: str) -> Verb:
    # Imported when called, because the Python of a peer may lack what the other benchmarks need.
    add_arguments = imported(module, "add_arguments")
    return Verb(help=help, run=imported(module, "run"), add_arguments=add_arguments)


PROGRAM = Program(
    name="tools.bench",
    description=__doc__,
    verbs={
        "train": Verb(
            help="train steps beside transformers; with --model a large T5 on accelerators",
            description="Train steps of T5 1.1 small (77M parameters), float32, full batches of "
            "random tokens, and the time to the first step.",
            run=run_train,
            add_arguments=add_train_arguments,
        ),
        "decode": Verb(
            help="generation beside transformers and CTranslate2",
            description="Generation by T5 1.1 small (77M parameters), float32, full batches of "
            "random tokens, the same weights for all sides, and the time to the first token.",
            run=run_decode,
            add_arguments=add_peer_arguments,
        ),
        "input": _verb(
            "tools.bench_input", "reading training examples: SeqIO live, and a cache of rows"
        ),
        "serve": _verb("tools.bench_serve", "cosmo serve: one client, and many at once"),
        "label": _verb("tools.bench_label", "Canary's labels beside transformers"),
        "labeller": _verb("tools.bench_labeller", "single labels of a guard: p50 and p95"),
        "agreement": _verb(
            "tools.bench_agreement", "CTranslate2's answers beside ours, token by token"
        ),
        "device": _verb(
            "tools.bench_device_cases", "large T5s on accelerators: training, decoding, labels"
        ),
        "pipeline": _verb(
            "tools.bench_pipeline", "CO3: post-processing on one core, and calls a second"
        ),
    },
    loggers=(),
    # Each side sets up its own libraries; the Python of a peer may have no JAX.
    uses_jax=False,
)


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; return the exit code."""
    return command_line.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
