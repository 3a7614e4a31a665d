"""`python -m tools.bench label`: dialogues labelled a second, beside HuggingFace transformers.

T5 1.0 small (60M parameters) with random weights, the same for both, contexts of 128 tokens,
float32 as both do by default on a CPU, and with products in bfloat16. Ours scores the five labels
exactly, from one pass of the encoder (what `canary label --no_rots` does); transformers generates
greedily as many tokens as a label's text takes. A batch must be given the tokens of the longest
label, for its rows go on with RoTs, not with EOS, after any label but the casual one; it ends after
the casual label and EOS if all its rows are casual. Random weights write no labels of their own, so
both lengths are timed (in bfloat16 the longest). Both sides are given token ids. That both have the
same weights is checked: transformers' own log-likelihoods of the labels are compared with ours.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable

from tools.bench_sides import timed

BATCH, CONTEXT = 32, 128
VOCABULARIES = ("../shared/data/t5_cc_all.32000.100extra.model", "tasks/sample/vocabulary.model")


def contexts() -> list[list[int]]:
    """A batch of full rows of random pieces, each with EOS."""
    import numpy as np

    random = np.random.default_rng(0)
    rows = random.integers(3, 1900, (BATCH, CONTEXT - 1))  # of the sample's vocabulary too
    return [[*row, 1] for row in rows.tolist()]


def write_weights(folder: str, vocabulary: str) -> None:
    """Fresh weights of T5 1.0 small as a HuggingFace folder with its vocabulary."""
    import jax
    import numpy as np
    from etils import epath

    from cosmo.engine.checkpoints import lazy
    from cosmo.engine.checkpoints.description import flat
    from cosmo.engine.checkpoints.interop import huggingface, tokenizer
    from cosmo.engine.model import models, t5

    network = t5.T5Config(
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
    model = models.EncoderDecoderModel(network)
    params = jax.jit(lambda: models.init(model, jax.random.key(0)))()
    arrays = {p: lazy.from_array(np.asarray(x)) for p, x in flat(params).items()}
    out = epath.Path(folder)
    out.mkdir()
    huggingface.write_folder(out, arrays, network, "float32", 10**10, lambda count: None)
    tokenizer.write_tokenizer(out, vocabulary)


def lengths(labels: list[list[int]]) -> dict[str, int]:
    """Tokens to generate: of the longest label, and of the casual one (the first) with EOS."""
    return {"any": max(map(len, labels)), "casual": len(labels[0]) + 1}


def ours(args: argparse.Namespace) -> dict:
    """Canary's labels alone."""
    from canary import Canary, module
    from cosmo.engine.data import datasets

    rows = [datasets.Row(str(i), "", tuple(ids)) for i, ids in enumerate(contexts())]
    found, scores = {}, {}
    for dtype in ("float32", "bfloat16"):
        sizes = {"inputs": CONTEXT, "targets": 16}
        canary = Canary.load(args.weights, batch_size=BATCH, lengths=sizes, dtype=dtype)

        def one(canary=canary, dtype=dtype):
            answers = canary.answers(rows, rots=False, decoding=canary.decoding())
            scores[dtype] = [module.label_scores(answer) for answer in answers]

        found[dtype] = timed(one, args.steps, BATCH)
    return {**found, "scores": scores, "labels": canary.choices}


def huggingface(args: argparse.Namespace) -> dict:
    """Generation of so many tokens by transformers, and its log-likelihoods of the labels."""
    import json

    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(args.weights).eval()
    inputs = torch.tensor(contexts())
    labels = json.loads(pathlib.Path(args.weights).with_name("labels.json").read_text())
    found = {}
    for name, new in lengths(labels).items():
        found[name] = timed(
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
    model.to(torch.bfloat16)
    new = lengths(labels)["any"]
    found["any_bfloat16"] = timed(
        lambda: model.generate(inputs, max_new_tokens=new, min_new_tokens=new), args.steps, BATCH
    )
    return {**found, "scores": list(zip(*scores, strict=True))}


OURS = ("float32", "bfloat16")
THEIRS = ("any", "casual", "any_bfloat16")
SIDES = {"ours": ours, "huggingface": huggingface}


def main(args: argparse.Namespace, measure: Callable) -> None:
    """Measure both sides in turn and print the table."""
    import json

    vocabulary = args.vocabulary or next(p for p in VOCABULARIES if pathlib.Path(p).exists())
    with tempfile.TemporaryDirectory() as folder:
        args.weights = f"{folder}/weights"
        write_weights(args.weights, vocabulary)
        rates: dict[str, list[float]] = {name: [] for name in (*OURS, *THEIRS)}
        for number in range(args.rounds):
            mine = measure("ours", sys.executable, args)
            (pathlib.Path(folder) / "labels.json").write_text(json.dumps(mine["labels"]))
            for name in OURS:
                rates[name] += [BATCH / s for s in mine[name]["seconds"]]
            theirs = measure("huggingface", args.hf_python, args)
            if theirs is None:
                print("transformers is not installed here (see --hf_python)")
            for name in THEIRS if theirs else ():
                rates[name] += [BATCH / s for s in theirs[name]["seconds"]]
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    sizes, new = sorted(map(len, mine["labels"])), lengths(mine["labels"])
    print(
        f"T5 1.0 small, batch {BATCH}, contexts of {CONTEXT} tokens, {vocabulary}:\n"
        f"labels of {sizes[0]} to {sizes[-1]} pieces, dialogues/s (median, range)"
    )
    names = {
        "float32": "ours, five labels scored",
        "bfloat16": "ours, --dtype=bfloat16",
        "any": f"transformers, any label ({new['any']} tokens)",
        "casual": f"transformers, all casual ({new['casual']} tokens)",
        "any_bfloat16": f"transformers in bfloat16, any label ({new['any']})",
    }
    middle = {name: statistics.median(values) for name, values in rates.items() if values}
    for name, value in middle.items():
        span = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
        ratios = " and ".join(f"{middle[dtype] / value:.2f}" for dtype in OURS)
        ratio = f", ours is {ratios} x as fast" if name in THEIRS else ""
        print(f"  {names[name]:<45} {value:6.1f} ({span}){ratio}")
    if theirs:
        for dtype in OURS:
            rows = zip(mine["scores"][dtype], theirs["scores"], strict=True)
            most = max(abs(a - b) for row in rows for a, b in zip(*row, strict=True))
            print(
                f"  log-likelihoods of the labels, ours in {dtype}: at most {most:.1e} nats apart"
            )
