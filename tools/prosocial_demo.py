"""Build a small ProsocialDialog and train a Canary on it, offline.

60 situations of our own, in the publishers' formats, become dialogues: the scripted teacher drafts,
scripted workers proofread, respond, validate and label. Each stage is a command that a user could
type; `make prosocial-demo` runs this. The exit code is 1 if dialogues were lost, or if training did
not lower the loss on held-out dialogues.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from cosmo import plot
from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.demo import demo_folder, run_module
from cosmo.engine.base.errors import UserError
from data_pipeline.prosocial.commands.make import PEOPLE_WAIT
from data_pipeline.prosocial.make import steps
from tools.co3_demo import teacher

SAMPLE = pathlib.Path("data_pipeline/prosocial/sample")
GIN_FILE = "gin/canary/canary_tiny.gin"
OUTPUT = "runs/prosocial_demo"
MIN_KEPT_SHARE = 0.9  # of the situations
LOSS = "eval/canary_prosocial/loss"


def build(folder: pathlib.Path) -> None:
    """Make situations, then start `prosocial make` and the workers in turn until it is done."""
    named = (f"--social_chemistry={SAMPLE}/social-chem-101.v1.0.tsv", f"--ethics={SAMPLE}/ethics")
    run_module(
        "data_pipeline", "prosocial", "situations", *named, f"--sbic={SAMPLE}/sbic",
        f"--output={folder}/situations",
    )  # fmt: skip
    corpus = f"--output={folder}/corpus"
    with teacher() as url:
        server = (f"--base_url={url}", "--model=teacher")
        where = (f"--situations={folder}/situations/situations.jsonl", corpus)
        # Each start ends a step at least, so this many starts are enough.
        for _ in range(len(steps()) + 1):
            code = run_module(
                "data_pipeline", "prosocial", "make", *where, *server, accepted=(0, PEOPLE_WAIT)
            )
            if not code:
                return
            run_module("data_pipeline", "prosocial", "work", corpus)
    raise UserError("the corpus is not complete although every task was answered")


def train(folder: pathlib.Path, steps: int) -> None:
    """Train canary_tiny on the corpus alone, evaluated before and after."""
    run_module(
        "cosmo",
        "train",
        f"--gin_file={GIN_FILE}",
        f"--gin.MODEL_DIR={folder}/model",
        "--gin.MIXTURE_OR_TASK_NAME=canary_prosocial",
        f"--gin.PROSOCIAL_PATH={folder}/corpus/data",
        # A worker may find nothing wrong where others vote for caution, as in the published corpus.
        "--gin.MISSING_ROTS=skip",
        f"--gin.TRAIN_STEPS={steps}",
        f"--gin.EVAL_PERIOD={steps}",
        "--gin.RUN_EVAL_BEFORE_TRAINING=True",
    )


def report(folder: pathlib.Path, seconds: Mapping[str, float]) -> bool:
    """Print the report. Return whether corpus and training pass."""
    made: dict[str, Any] = json.loads((folder / "corpus/report.json").read_text())
    first = json.loads((folder / "corpus/data/train.jsonl").read_text().splitlines()[0])
    situations = (folder / "situations/situations.jsonl").read_text().count("\n")
    kept = made["ours"]["dialogues"] / situations
    losses = [row[LOSS] for row in plot.read_metrics(folder / "model/metrics.jsonl") if LOSS in row]
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    print(f"\n{'=' * 78}\nProsocialDialog: {times}; {sum(seconds.values()):.0f} s in all\n")
    splits = ", ".join(f"{name} {number}" for name, number in made["splits"].items())
    print(
        f"{situations} situations, {made['ours']['dialogues']} dialogues ({splits}), "
        f"{made['rows']} rows, {made['workers']} scripted workers\n"
        f"loss on held-out dialogues: {losses[0]:.3f} before, {losses[-1]:.3f} after\n\n"
        f"  - {first['context']}\n    {first['safety_label']}: {'; '.join(first['rots'] or ())}\n"
        f"  - {first['response']}"
    )
    print(f"""
Files in {folder}:
  situations/          situations.jsonl, filters.json, quarantined.jsonl
  corpus/              data/, provenance.jsonl, rejected.jsonl, report.json, README.md
  corpus/tasks/        the pages that people would have answered; answers/ has the script's
  model/               the run: config.gin, metrics.jsonl, checkpoints/
""")
    # All faults are named at once, because a demo takes minutes.
    faults = []
    if kept < MIN_KEPT_SHARE:
        faults.append(f"{kept:.0%} of the situations became dialogues, not {MIN_KEPT_SHARE:.0%}")
    if len(losses) < 2 or losses[-1] >= losses[0]:
        faults.append(f"the model did not learn: losses {losses}")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return not faults


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.prosocial_demo", description=__doc__)
    parser.add_argument(
        "--output", default=OUTPUT, help="folder; a finished demo there becomes OUTPUT-previous"
    )
    parser.add_argument("--train_steps", type=int, default=60, help="(%(default)s)")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Build, count, train and report; return the exit code."""
    with demo_folder(args.output, "prosocial demo", OUTPUT) as folder:
        return run_in(folder, args)


def run_in(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Do as `run` does, in an empty folder."""
    began = time.monotonic()
    seconds = {}
    build(folder)
    run_module("data_pipeline", "prosocial", "workers", f"--output={folder}/corpus")
    seconds["corpus"] = time.monotonic() - began
    run_module("tools.dataset_stats", f"{folder}/corpus/data")
    seconds["statistics"] = time.monotonic() - began - seconds["corpus"]
    train(folder, args.train_steps)
    seconds["training"] = time.monotonic() - began - sum(seconds.values())
    return 0 if report(folder, seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
