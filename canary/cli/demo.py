"""Train a small Canary on the bundled sample, and measure it on held-out dialogues, offline.

Takes a few minutes on a laptop. Each stage is a command that a user could type: run it from the
repository's root. The report has the most frequent answer as a baseline, and three dialogues. Exit
code 1 if the model has not learnt: 85% of its labels must be right. The F1 of its rules of thumb
must be over twice the baseline's.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.demo import demo_folder, run_module
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table

if TYPE_CHECKING:
    from canary.evaluation import Case

GIN_FILE = "gin/canary/canary_tiny.gin"
SAMPLE = "tasks/sample/canary"
OUTPUT = "runs/canary_demo"
SPLIT = "test"
# The demo reaches 0.885 and 0.682 on 2 cores; the most frequent answer 0.328 and 0.231.
MIN_ACCURACY = 0.85  # of the five labels
MIN_F1_RATIO = 2.0  # to the most frequent RoTs


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and report; return the exit code, 1 if the model has not learnt."""
    with demo_folder(args.output, "canary demo", OUTPUT) as folder:
        return run_in(folder, args)


def run_in(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Do as `run` does, in an empty folder."""
    from cosmo.tasks import files

    began = time.monotonic()
    # Without the flag the recipe decides.
    steps = [f"--gin.TRAIN_STEPS={args.train_steps}"] if args.train_steps else []
    run_module("cosmo", "train", f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR={folder}", *steps)
    # Before the evaluation: the report gives the time of training alone.
    trained = time.monotonic() - began
    where = (f"--checkpoint={folder}", f"--input={files.resolve(SAMPLE)}", f"--split={SPLIT}")
    run_module("canary", "eval", *where, f"--output={folder}/canary_eval")
    return 0 if report(folder, trained, time.monotonic() - began) else 1


def report(folder: pathlib.Path, train_seconds: float, seconds: float) -> bool:
    """Print the evaluation in `folder` and three dialogues. Return whether the model has learnt."""
    from canary.evaluation import cases

    measured = json.loads((folder / "canary_eval/metrics.json").read_text())
    text = (folder / "canary_eval/predictions.jsonl").read_text()
    # By id, because the dialogues shown are chosen from the corpus, not from this file.
    lines = {line["id"]: line for line in map(json.loads, text.splitlines())}
    print(f"\nThree dialogues of the {SPLIT} split, as the model labels them:")
    for dialogue in examples(list(cases(SAMPLE, SPLIT))):
        print(f"\n{dialogue_text(dialogue, lines)}")

    accuracy, f1 = measured["five_labels"]["accuracy"], measured["rots"]["f1"]
    baseline = measured["baseline"]
    learnt = accuracy >= MIN_ACCURACY and f1 > MIN_F1_RATIO * baseline["f1"]
    print(f"\n{'=' * 78}\nCanary: {train_seconds:.0f} s of training, {seconds:.0f} s in all\n")
    rows = [["held-out contexts", "this model", "most frequent", "wanted"]]
    for name, *values in (
        ("accuracy, five labels", accuracy, baseline["accuracy"], MIN_ACCURACY),
        ("RoT F1", f1, baseline["f1"], MIN_F1_RATIO * baseline["f1"]),
    ):
        rows.append([name, *(f"{value:.3f}" for value in values)])
    print(text_table(rows))
    print(
        f"\nMost frequent in training: {baseline['label']}, and where RoTs apply\n"
        f"{baseline['rots']}\n\nAsk it, from {pathlib.Path.cwd()}:\n"
        f'  {sys.executable} -m canary ask --checkpoint={folder} "I might skip the line at the '
        'bakery."\n'
    )
    if not learnt:
        print(
            f"FAILED: the model did not learn. Accuracy must be at least {MIN_ACCURACY}, and RoT "
            f"F1 more than {MIN_F1_RATIO:.0f} times that of the most frequent answer.",
            file=sys.stderr,
        )
    return learnt


def examples(cases: "Sequence[Case]") -> "list[list[Case]]":
    """Return three dialogues: the first that turns casual, the first emergency, and small talk.

    Each is its contexts in order. Raises UserError if `cases` lack one of them.
    """
    # Ids are DIALOGUE-CONTEXT, and contexts of a dialogue are neighbours.
    dialogues = [
        list(group) for _, group in groupby(cases, lambda case: case.id.rpartition("-")[0])
    ]

    def first(description: str, fits: Callable[[list[str]], bool]) -> "list[Case]":
        for dialogue in dialogues:
            if fits([case.gold.label for case in dialogue]):
                return dialogue
        raise UserError(f"{SAMPLE}, split {SPLIT}, has no dialogue that {description}")

    # By the corpus's labels, not by the model's answers: else the demo would choose its successes.
    casual, danger = "__casual__", "__needs_intervention__"
    return [
        first(
            "goes from caution to casual",
            lambda labels: danger not in labels and labels[0] != casual == labels[-1],
        ),
        first("needs intervention", lambda labels: labels[0] == danger and len(labels) > 1),
        first("is casual throughout", lambda labels: {*labels} == {casual} and len(labels) > 1),
    ]


def dialogue_text(dialogue: "Sequence[Case]", lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a dialogue as people read it, with the model's and the corpus's label of each turn.

    `lines` are those of predictions.jsonl by their ids.
    """
    text = []
    for case in dialogue:
        line = lines[case.id]
        if len(case.turns) > 1:
            text.append(f"  B: {case.turns[-2]}")
        text.append(f"  A: {case.turns[-1]}")
        # Two, because neighbouring grades of caution are often close.
        likely = sorted(line["probabilities"].items(), key=lambda item: -item[1])[:2]
        found = ", ".join(f"{label} {share:.2f}" for label, share in likely)
        gold = f"{case.gold.label} {', '.join(case.gold.rots)}".rstrip()
        text += [f"       model:  {found}", f"               {line['rot_text'] or '(no RoT)'}"]
        text += [f"       corpus: {gold}"]
    return "\n".join(text)


VERB = Verb(
    help="train a small Canary on the bundled sample and measure it, offline",
    description=__doc__,
    examples="""\
  python -m canary demo
  python -m canary demo --output=/tmp/demo
""",
    run=run,
    flags=f"""
--output DIR={OUTPUT}  gets the run; an earlier finished one is kept as DIR-previous
--train_steps N:int  instead of the recipe's TRAIN_STEPS
""",
)
