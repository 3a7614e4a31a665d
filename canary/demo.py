"""Canary learnt and measured on a laptop: what `python -m canary demo` runs.

Each stage is the command that a user would type. The demo fails if the model has not learnt: five
labels right on at least MUST_REACH of the held-out contexts, and rules of thumb (RoTs) whose F1 is
above MUST_BEAT times that of the most frequent ones.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from canary.evaluation import Case, cases
from cosmo.engine.base.demo import begin_folder
from cosmo.engine.base.errors import UserError
from cosmo.tasks import files

GIN_FILE = "gin/canary/canary_tiny.gin"
SAMPLE = "tasks/sample/canary"
OUTPUT = "runs/canary_demo"
SPLIT = "test"
MUST_REACH = 0.85
MUST_BEAT = 2.0


def run_demo(args: argparse.Namespace) -> int:
    """`demo`: train, evaluate, show; the exit code, 1 if the model has not learnt."""
    began = time.monotonic()
    folder = begin_folder(args.output, "canary demo", OUTPUT)
    steps = [f"--gin.TRAIN_STEPS={args.train_steps}"] if args.train_steps else []
    _run("cosmo", "train", f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR={folder}", *steps)
    trained = time.monotonic() - began
    where = (f"--checkpoint={folder}", f"--input={files.resolve(SAMPLE)}", f"--split={SPLIT}")
    _run("canary", "eval", *where, f"--output={folder}/canary_eval")
    return 0 if summary(folder, trained, time.monotonic() - began) else 1


def _run(package: str, *arguments: str) -> None:
    """Run `python -m package ...`, showing the command; exit with its code if it fails."""
    print(f"\n$ python -m {package} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", package, *arguments]).returncode
    if code:
        sys.exit(code)


def summary(folder: pathlib.Path, trained: float, seconds: float) -> bool:
    """Print what the evaluation in `folder` found, and three dialogues; whether it has learnt.

    `trained` and `seconds` are the time of training and of everything.
    """
    measured = json.loads((folder / "canary_eval/metrics.json").read_text())
    text = (folder / "canary_eval/predictions.jsonl").read_text()
    lines = {line["id"]: line for line in map(json.loads, text.splitlines())}
    print(f"\nThree dialogues of the {SPLIT} split, as the model labels them:")
    for dialogue in examples(cases(SAMPLE, SPLIT)):
        print(f"\n{shown(dialogue, lines)}")

    accuracy, f1 = measured["five_labels"]["accuracy"], measured["rots"]["f1"]
    baseline = measured["baseline"]
    learnt = accuracy >= MUST_REACH and f1 > MUST_BEAT * baseline["f1"]
    print(f"\n{'=' * 78}\nCanary: {trained:.0f} s of training, {seconds:.0f} s in all\n")
    print(f"{'held-out contexts':<36}{'this model':>14}{'most frequent':>16}{'wanted':>12}")
    for name, ours, theirs, wanted in (
        ("accuracy, five labels", accuracy, baseline["accuracy"], MUST_REACH),
        ("RoT F1", f1, baseline["f1"], MUST_BEAT * baseline["f1"]),
    ):
        print(f"{name:<36}{ours:>14.3f}{theirs:>16.3f}{wanted:>12.3f}")
    print(
        f"\nMost frequent in training: {baseline['label']}, and where RoTs apply\n"
        f"{baseline['rots']}\n\nAsk it, from {pathlib.Path.cwd()}:\n"
        f'  {sys.executable} -m canary ask --checkpoint={folder} "I might skip the line at the '
        'bakery."\n'
    )
    if not learnt:
        print(
            f"FAILED: the model did not learn. Accuracy must be at least {MUST_REACH}, and RoT F1 "
            f"more than {MUST_BEAT:.0f} times that of the most frequent answer.",
            file=sys.stderr,
        )
    return learnt


def examples(many: Sequence[Case]) -> list[list[Case]]:
    """Three dialogues: the first that calms down, the first emergency, the first small talk.

    Each is its contexts in order. Raises UserError if `many` lacks one of them.
    """
    dialogues = [list(group) for _, group in groupby(many, lambda case: case.id.rpartition("-")[0])]

    def first(description: str, fits: Any) -> list[Case]:
        for dialogue in dialogues:
            if fits([case.gold.label for case in dialogue]):
                return dialogue
        raise UserError(f"{SAMPLE}, split {SPLIT}, has no dialogue that {description}")

    casual, danger = "__casual__", "__needs_intervention__"
    return [
        first(
            "goes from caution to casual",
            lambda labels: danger not in labels and labels[0] != casual == labels[-1],
        ),
        first("needs intervention", lambda labels: labels[0] == danger and len(labels) > 1),
        first("is casual throughout", lambda labels: {*labels} == {casual} and len(labels) > 1),
    ]


def shown(dialogue: Sequence[Case], lines: dict[str, dict[str, Any]]) -> str:
    """A dialogue as people read it, under each context what the model and the corpus say of it."""
    text = []
    for case in dialogue:
        line = lines[case.id]
        if len(case.turns) > 1:
            text.append(f"  B: {case.turns[-2]}")
        text.append(f"  A: {case.turns[-1]}")
        likely = sorted(line["probabilities"].items(), key=lambda item: -item[1])[:2]
        found = ", ".join(f"{label} {share:.2f}" for label, share in likely)
        gold = f"{case.gold.label} {', '.join(case.gold.rots)}".rstrip()
        text += [f"       model:  {found}", f"               {line['rot_text'] or '(no RoT)'}"]
        text += [f"       corpus: {gold}"]
    return "\n".join(text)
