"""Time Canary's labels beside HuggingFace transformers.

Both have T5 1.0 small (60M parameters) with the same random weights, and contexts of 128 token ids.
Both run in float32, the default on a CPU, and with products in bfloat16. Ours scores the five
labels exactly, from one pass of the encoder, as `canary label --no_rots` does. Transformers
generates greedily as many tokens as a label has. Its log-likelihoods of the labels are compared
with ours, to check that the weights are the same.
"""

import argparse
import json
import pathlib
import sys
import tempfile

from tools import bench_rates, bench_sides
from tools.bench_rates import timed

BATCH, CONTEXT = 32, 128
# T5's own if it is here, because the pieces of a label decide the rate.
VOCABULARIES = ("../shared/data/t5_cc_all.32000.100extra.model", "tasks/sample/vocabulary.model")


def contexts() -> list[list[int]]:
    """Return a batch of full rows of random pieces, each with EOS."""
    import numpy as np

    random = np.random.default_rng(0)
    rows = random.integers(3, 1900, (BATCH, CONTEXT - 1))  # of the sample's vocabulary too
    return [[*row, 1] for row in rows.tolist()]


def network():
    """Return T5 1.0 small."""
    from cosmo.engine.model import t5

    # By hand, because gin/models has no T5 1.0 of this size.
    return t5.T5Config(
        vocab_size=32128,
        emb_dim=512,
        num_heads=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        head_dim=64,
        mlp_dim=2048,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        dtype="float32",
        scan_layers=False,
    )


def lengths(labels: list[list[int]]) -> dict[str, int]:
    """Return the tokens to generate: of the longest label, and of the casual one with EOS."""
    # Random weights write no labels, so both lengths are timed. A batch takes the tokens of the
    # longest label, because RoTs follow any label but the casual one, which is the first.
    return {"any": max(map(len, labels)), "casual": len(labels[0]) + 1}


def ours(args: argparse.Namespace) -> dict:
    """Time Canary's labels without RoTs."""
    from canary import Canary, module
    from cosmo.engine.data import datasets

    rows = [datasets.Row(str(i), "", tuple(ids)) for i, ids in enumerate(contexts())]
    found, scores = {}, {}
    for dtype in ("float32", "bfloat16"):
        # Nothing is generated, so any length of targets will do.
        sizes = {"inputs": CONTEXT, "targets": 16}
        canary = Canary.load(args.weights, batch_size=BATCH, lengths=sizes, dtype=dtype)

        def one(canary=canary, dtype=dtype):
            # Without RoTs nothing is generated, so that both sides do the same work.
            answers = canary.answers(rows, rots=False, decoding=canary.decoding())
            scores[dtype] = [module.label_scores(answer) for answer in answers]

        found[dtype] = timed(one, args.steps, BATCH)
    return {**found, "scores": scores, "labels": canary.choices}


def huggingface(args: argparse.Namespace) -> dict:
    """Time generation by transformers, and return its log-likelihoods of the labels."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(args.weights).eval()
    inputs = torch.tensor(contexts())
    labels = json.loads(pathlib.Path(args.weights).with_name("labels.json").read_text())
    found = {}
    for name, new in lengths(labels).items():
        found[name] = timed(
            # Random weights end anywhere, so the length is forced.
            lambda new=new: model.generate(inputs, max_new_tokens=new, min_new_tokens=new),
            args.steps,
            BATCH,
        )
    scores = []
    with torch.no_grad():
        for tokens in labels:
            wanted = torch.tensor([tokens] * BATCH)
            logp = model(input_ids=inputs, labels=wanted).logits.log_softmax(-1)
            scores.append(logp.gather(-1, wanted[..., None])[..., 0].sum(-1).tolist())
    # After the scores, which are compared in float32.
    model.to(torch.bfloat16)
    new = lengths(labels)["any"]
    found["any_bfloat16"] = timed(
        lambda: model.generate(inputs, max_new_tokens=new, min_new_tokens=new), args.steps, BATCH
    )
    # By row, as ours are.
    return {**found, "scores": list(zip(*scores, strict=True))}


OURS = ("float32", "bfloat16")
THEIRS = ("any", "casual", "any_bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `label`."""
    parser.description = __doc__
    bench_rates.add_arguments(parser)
    parser.add_argument("--vocabulary", metavar="FILE", help="T5's, if not in ../shared")


def run(args: argparse.Namespace) -> None:
    """Measure both sides in turn and print the table; with --side run one side."""
    if args.side:
        print(json.dumps({"ours": ours, "huggingface": huggingface}[args.side](args)))
        return
    vocabulary = args.vocabulary or next(p for p in VOCABULARIES if pathlib.Path(p).exists())
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, *THEIRS)}
    with tempfile.TemporaryDirectory() as folder:
        args.weights = f"{folder}/weights"
        bench_sides.write_weights(args.weights, network(), vocabulary)
        for number in range(args.rounds):
            mine = bench_rates.run_side("label", "ours", args)
            # Transformers scores the same tokens, and need not import our tasks.
            (pathlib.Path(folder) / "labels.json").write_text(json.dumps(mine["labels"]))
            theirs = bench_rates.run_side("label", "huggingface", args)
            if theirs is None:
                print("transformers is not installed here (see --hf_python)")
            for name in OURS:
                rates[name] += mine[name]["rates"]
            for name in THEIRS if theirs else ():
                rates[name] += theirs[name]["rates"]
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    sizes, new = sorted(map(len, mine["labels"])), lengths(mine["labels"])
    print(
        f"T5 1.0 small, batch {BATCH}, contexts of {CONTEXT} tokens, {vocabulary}:\n"
        f"labels of {sizes[0]} to {sizes[-1]} pieces"
    )
    names = {
        "float32": "ours",
        "bfloat16": "ours, --dtype=bfloat16",
        "any": f"transformers, any label ({new['any']} tokens)",
        "casual": f"transformers, all casual ({new['casual']} tokens)",
        "any_bfloat16": f"transformers in bfloat16, any label ({new['any']})",
    }
    found = {names[name]: values for name, values in rates.items() if values}
    print(bench_rates.rate_table(found, "dialogues/s", "ours", digits=1))
    for dtype in OURS if theirs else ():
        rows = zip(mine["scores"][dtype], theirs["scores"], strict=True)
        most = max(abs(a - b) for row in rows for a, b in zip(*row, strict=True))
        print(f"  log-likelihoods of the labels, ours in {dtype}: at most {most:.1e} nats apart")
