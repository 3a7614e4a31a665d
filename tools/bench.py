"""Speed beside a peer, in one run on one machine: `python -m tools.bench train|decode`.

Each side runs in processes of its own, in turn, and the medians are compared. T5 1.1 small (77M
parameters), float32, full batches of random tokens. The peer is HuggingFace transformers on
PyTorch: it is measured if it can be imported here, or by --hf_python in another environment. Ours
runs with huge pages, as `python -m cosmo` starts itself.
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

from cosmo.__main__ import HUGE_PAGES

SIZES = {"batch": 8, "inputs": 256, "targets": 64}
VOCAB, EMB, HEADS, LAYERS, HEAD, MLP = 32128, 512, 6, 8, 64, 1024


def random_batch(seed: int = 0) -> dict:
    """Full rows of random tokens (no padding, no EOS), as numpy."""
    import numpy as np

    random = np.random.default_rng(seed)
    shape = {n: (SIZES["batch"], SIZES[n]) for n in ("inputs", "targets")}
    return {n: random.integers(2, 32000, s).astype(np.int32) for n, s in shape.items()}


def ours(args: argparse.Namespace) -> dict:
    """Our engine's numbers: seconds of each step, or of each generation."""
    import jax
    import numpy as np

    from cosmo.engine import decoding, models, step, t5

    config = t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=EMB,
        num_heads=HEADS,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        head_dim=HEAD,
        mlp_dim=MLP,
        dtype="float32",
        dropout_rate=args.dropout_rate,
        scan_layers=args.scan_layers,
    )
    model = models.EncoderDecoderModel(config)
    batch = random_batch()
    seconds = []
    if args.what == "train":
        settings = step.StepConfig()
        run = jax.jit(step.make_train_step(model, settings, seed=0), donate_argnums=0)
        state = jax.jit(lambda: step.init_state(model, settings, 0))()
        features = {
            "encoder_input_tokens": batch["inputs"],
            "decoder_input_tokens": np.pad(batch["targets"], ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": batch["targets"],
        }
        for _ in range(args.steps + 1):
            began = time.monotonic()
            state, sums = run(state, features)
            jax.block_until_ready((state, sums))
            seconds.append(time.monotonic() - began)
        tokens = batch["inputs"].size + batch["targets"].size
    else:
        params = jax.jit(lambda: models.init(model, jax.random.key(0)))()
        settings = decoding.DecodingConfig(
            max_new_tokens=SIZES["targets"],
            temperature=0.0 if args.top_p is None else 1.0,
            top_p=args.top_p or 1.0,
        )
        run = jax.jit(lambda p, x, k: models.predict(model, p, x, settings, k))
        keys = jax.random.split(jax.random.key(1), SIZES["batch"])
        for _ in range(args.steps + 1):
            began = time.monotonic()
            out = np.asarray(run(params, batch["inputs"], keys).tokens)
            seconds.append(time.monotonic() - began)
        if not out[..., -1].any():
            raise SystemExit("every row ended before the last position: nothing to compare")
        tokens = SIZES["batch"] * SIZES["targets"]
    return {"seconds": seconds[1:], "tokens": tokens}


def huggingface(args: argparse.Namespace) -> dict:
    """The same of HuggingFace transformers on PyTorch."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=EMB,
            d_kv=HEAD,
            d_ff=MLP,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=args.dropout_rate,
            decoder_start_token_id=0,
        )
    )
    batch = {name: torch.tensor(array).long() for name, array in random_batch().items()}
    seconds = []
    if args.what == "train":
        from transformers.optimization import Adafactor

        model.train()
        optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, warmup_init=False)
        for _ in range(args.steps + 1):
            began = time.monotonic()
            model(input_ids=batch["inputs"], labels=batch["targets"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.monotonic() - began)
        tokens = sum(array.numel() for array in batch.values())
    else:
        model.eval()
        new = SIZES["targets"]
        sampling = (
            {} if args.top_p is None else {"do_sample": True, "top_p": args.top_p, "top_k": 0}
        )
        for _ in range(args.steps + 1):
            began = time.monotonic()
            model.generate(batch["inputs"], max_new_tokens=new, min_new_tokens=new, **sampling)
            seconds.append(time.monotonic() - began)
        tokens = SIZES["batch"] * new
    return {"seconds": seconds[1:], "tokens": tokens}


SIDES = {"ours": ours, "huggingface": huggingface}


def measure(side: str, python: str, args: argparse.Namespace) -> dict | None:
    """Run one side in a process of its own; None if its libraries are not installed there."""
    command = [python, "-m", "tools.bench", args.what, f"--side={side}", f"--steps={args.steps}"]
    command += [f"--dropout_rate={args.dropout_rate}"]
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


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["train", "decode"], help="train steps, or generation")
    parser.add_argument("--steps", type=int, default=4, help="measured repetitions a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side, in turn")
    parser.add_argument("--dropout_rate", type=float, default=0.0, help="train: of both sides")
    parser.add_argument("--top_p", type=float, help="decode: nucleus sampling instead of greedy")
    parser.add_argument("--scan_layers", action="store_true", help="scan layers, not unroll them")
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return 0

    pythons = {"ours": sys.executable, "huggingface": args.hf_python}
    rates: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for side, python in pythons.items():
            result = measure(side, python, args)
            if result is None:
                continue
            rates.setdefault(side, []).extend(result["tokens"] / s for s in result["seconds"])
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
    if "huggingface" not in median:
        print("  huggingface: torch and transformers are not installed here (see --hf_python)")
    if args.what == "train":
        print(f"  process start to first finished step, cold cache: {first_step(args):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
