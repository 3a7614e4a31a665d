"""Train two small Prosts and a small Canary on the bundled samples, and compare them, offline.

Takes a few minutes on a laptop. Each stage is a command that a user could type: run it from the
repository's root. One Prost learns responses alone, the other rules of thumb (RoTs) and responses.
The report has three exchanges, one of them steered by Canary, and the numbers of the paper's table
3 for both.
Exit code 1 if responses after the corpus's RoTs have no higher F1 than responses alone.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.demo import demo_folder, run_module

if TYPE_CHECKING:
    from canary.prost.agent import Prost

GIN_FILE = "gin/prost/prost_tiny.gin"
CANARY_GIN_FILE = "gin/canary/canary_tiny.gin"
CANARY_STEPS = 200
OUTPUT = "runs/prost_demo"
SPLIT = "test"
TASK = "prost_prosocial"
# The demo evaluates once, at the end: each evaluation on seven corpora takes half a minute.
ONLY_TRAIN = (
    *("--gin.EVAL_PERIOD=None", "--gin.EARLY_STOPPING_PATIENCE=None"),
    *("--gin.PLATEAU_FACTOR=None", "--gin.CHECKPOINT_PERIOD=None"),
)
VARIANTS = ("response_only", "rot_and_response")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and report; return the exit code, 1 if RoTs did not help."""
    with demo_folder(args.output, "prost demo", OUTPUT) as folder:
        return run_in(folder, args)


def run_in(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Do as `run` does, in an empty folder."""
    began = time.monotonic()
    # Without the flag the recipe decides.
    steps = [f"--gin.TRAIN_STEPS={args.train_steps}"] if args.train_steps else []
    for variant in VARIANTS:
        run_module(
            "cosmo",
            "train",
            f"--gin_file={GIN_FILE}",
            f"--gin.MODEL_DIR={folder}/{variant}",
            f"--gin.PROST_VARIANT={variant}",
            *ONLY_TRAIN,
            *steps,
        )
    run_module(
        "cosmo",
        "train",
        f"--gin_file={CANARY_GIN_FILE}",
        f"--gin.MODEL_DIR={folder}/canary",
        f"--gin.TRAIN_STEPS={args.canary_steps}",
        *ONLY_TRAIN,
    )
    for variant in VARIANTS:
        run_module(
            "canary.prost",
            "eval",
            f"--checkpoint={folder}/{variant}",
            f"--task={TASK}",
            f"--split={SPLIT}",
        )
    return 0 if report(folder, time.monotonic() - began) else 1


def report(folder: pathlib.Path, seconds: float) -> bool:
    """Print what both models measured and three exchanges. Return whether RoTs have helped."""
    from canary.prost.agent import Prost
    from canary.prost.evaluation import PROSOCIAL, ROWS, cell
    from cosmo.engine.base.tables import text_table
    from cosmo.tasks import paper_tables

    found = {}
    for variant in VARIANTS:
        path = folder / variant / "prost_eval" / "metrics.json"
        tasks = json.loads(path.read_text())["tasks"]
        for rots in ("own", "gold"):
            made = tasks.get(PROSOCIAL if rots == "own" else f"{PROSOCIAL} gold")
            if made is not None:
                found[ROWS[variant, rots]] = made
    steered = Prost.load(
        str(folder / "rot_and_response"), canary=str(folder / "canary"), batch_size=1
    )
    print("\nThree exchanges of the model that writes RoTs:")
    print("\n" + "\n\n".join(exchanges(steered, folder)))
    print(f"\n{'=' * 78}\nProst: {seconds:.0f} s in all\n")
    rows = [["held-out responses", "BLEU-4", "F1", "perplexity", "the paper's F1"]]
    for name, made in found.items():
        numbers = (
            made["bleu4"],
            made["f1"],
            made["perplexity"],
            paper_tables.PROSOCIAL["responses"][name][1],
        )
        rows.append([name, *map(cell, numbers)])
    print(text_table(rows))
    print(
        "\nA small network on small samples: its numbers compare with each other, not with the "
        f"paper's.\nTalk to it, from {pathlib.Path.cwd()}:\n"
        f"  {sys.executable} -m canary.prost chat --checkpoint={folder}/rot_and_response "
        f"--canary={folder}/canary\n"
    )
    alone = found[ROWS["response_only", "own"]]["f1"]
    after = found[ROWS["rot_and_response", "gold"]]["f1"]
    if after <= alone:
        print(
            f"FAILED: F1 is {after:.2f} after the corpus's RoTs and {alone:.2f} without; RoTs "
            "should help, as in the paper's table 3.",
            file=sys.stderr,
        )
    return after > alone


def exchanges(prost: "Prost", folder: pathlib.Path) -> list[str]:
    """Return three exchanges as text: its own RoTs, small talk, and Canary's RoTs."""
    import dataclasses

    from canary.prost import bulk_replies

    path = folder / "rot_and_response" / "prost_eval" / "predictions.jsonl"
    lines: list[Mapping[str, Any]] = [json.loads(text) for text in path.read_text().splitlines()]
    own = [line for line in lines if line["rots_from"] == "own" and len(line["turns"]) == 1]
    # By the corpus, not by the model's answers: else the demo would choose its successes.
    grave = [line["turns"] for line in own if line["target_rots"]]
    casual = [line["turns"] for line in own if not line["target_rots"]]
    alone = dataclasses.replace(prost, canary=None)
    chirps = prost.canary.chirp(grave)
    steered = [turns for turns, chirp in zip(grave, chirps, strict=True) if chirp.rots]
    wanted = [
        ("with RoTs of its own", alone, grave[0]),
        ("small talk", alone, (casual or grave[1:])[0]),
        ("steered by Canary", prost, (steered or grave)[-1]),
    ]
    return [
        "\n".join([f"{name}:", *(f"A: {turn}" for turn in turns), answer])
        for name, model, turns in wanted
        for answer in [bulk_replies.of(model, model.reply(list(turns)))]
    ]


VERB = Verb(
    help="train two small Prosts and a Canary on the bundled samples and compare them, offline",
    description=__doc__,
    examples="""\
  python -m canary.prost demo
  python -m canary.prost demo --output=/tmp/demo
""",
    run=run,
    flags=f"""
--output DIR={OUTPUT}  gets the runs; earlier finished ones are kept as DIR-previous
--train_steps N:int  instead of the recipe's TRAIN_STEPS
--canary_steps N={CANARY_STEPS}  of the Canary that steers
""",
)
