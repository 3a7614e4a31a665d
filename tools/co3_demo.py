"""Make a corpus and train on it, offline: triples, teacher, filters, a small Cosmo, an answer.

Each stage is a command that a user could type; `make co3-demo` runs this. The scripted teacher
stands in for a language model. The exit code is 1 if the pipeline keeps less than MIN_KEPT_SHARE of
the usable triples, or if the model has not learnt. Its perplexity on held-out dialogues must be
below that of a unigram model divided by MIN_PERPLEXITY_RATIO.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cosmo import plot
from cosmo.cli.quickstart import exchange_text, loss_table, unigram_perplexity
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.demo import demo_folder, run_module
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks import vocabularies
from cosmo.tasks.families import soda_file_examples
from cosmo.tasks.formatting import Example

TRIPLES = "data_pipeline/co3/sample/triples.jsonl"
GIN_FILE = "gin/cosmo/tiny.gin"
OUTPUT = "runs/co3_demo"
VOCABULARY = "tasks/sample/vocabulary.model"
MIN_KEPT_SHARE = 0.5
# A model that learnt token frequencies alone has a ratio of 1, as in the quickstart.
MIN_PERPLEXITY_RATIO = 3.0
BEFORE_ASKING = ("triples", "sentence")  # stages that reject what cannot be used


@contextlib.contextmanager
def teacher() -> Iterator[str]:
    """Start a scripted teacher in a process of its own, on a free port; yield its base URL."""
    # Port 0: the system chooses a free one, and the teacher prints it.
    arguments = ["data_pipeline", "teacher", "--port=0"]
    print(f"\n$ python -m {' '.join(arguments)} &", flush=True)
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline().strip()
            # It has ended, and its own error is on stderr.
            if not said:
                sys.exit("error: the teacher did not start")
            print(said, flush=True)
            yield said.split()[2].rstrip(",")
        finally:
            process.terminate()
            process.communicate()  # reads what it prints last, or it could not end


def by_split(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return the lines of soda.jsonl by the split that each names."""
    # CO3 takes a hash of the head where the triples name no split: dialogues on one event share a
    # split, so that no held-out event was learnt under another relation.
    splits: dict[str, list[str]] = {}
    for line in lines:
        splits.setdefault(json.loads(line)["split"], []).append(line)
    return splits


def write_splits(corpus: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
    """Write a run's soda.jsonl as a file a split, as SODA is published; return their sizes."""
    splits = by_split((corpus / "soda.jsonl").read_text(encoding="utf-8").splitlines())
    folder.mkdir()
    for name, lines in splits.items():
        write_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    return {name: len(lines) for name, lines in splits.items()}


def kept_share(made: Mapping[str, Any]) -> float:
    """Return the records of a run (its report.json), divided by the usable triples."""
    unusable = sum(sum(made["rejected"].get(stage, {}).values()) for stage in BEFORE_ASKING)
    # At least 1: every triple may be unusable.
    return made["records"] / max(made["triples"] - unusable, 1)


def question(held_out: Sequence[Example]) -> Example:
    """Return the first held-out example in the middle of a conversation."""
    # Two turns, because a first turn shows no use of context.
    return next((e for e in held_out if len(e.turns) == 2), held_out[0])


def report(folder: pathlib.Path, seconds: Mapping[str, float]) -> bool:
    """Print the report and draw the curve. Return whether pipeline and model pass."""
    made = json.loads((folder / "corpus/report.json").read_text())
    train = list(soda_file_examples(f"{folder}/soda", "train"))
    held_out = list(soda_file_examples(f"{folder}/soda", "validation"))
    vocabulary = vocabularies.load(VOCABULARY)
    # The vocabulary is the sample's, not this corpus's: the report counts what it lacks.
    pieces = [piece for e in (*train, *held_out) for piece in vocabulary.encode(e.response)]
    unigram = unigram_perplexity(train, held_out, vocabulary)
    rows = plot.read_metrics(folder / "model/metrics.jsonl")
    table, step, ratio = loss_table(rows, unigram)
    plot.plot(rows, folder / "loss.png", "Cosmo, tiny, on a corpus of CO3", math.log(unigram))
    # One question, so the file has one line.
    answer = json.loads((folder / "answer.jsonl").read_text())

    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    share = kept_share(made)
    corpus = made["corpus"]
    print(f"\n{'=' * 78}\nCO3: {times}; {sum(seconds.values()):.0f} s in all\n")
    print(
        f"{made['triples']} triples, {made['conversations']} conversations, {made['records']} "
        f"records: {share:.0%} of the triples that can be used\n"
        f"{made['this_start']['calls']} calls to the teacher; {corpus['turns']} turns a dialogue, "
        f"{corpus['utterance_length']} words an utterance\n"
        f"{len(train)} examples to learn from, {len(held_out)} held out (other heads); "
        f"{pieces.count(vocabulary.unk_id)} of {len(pieces)} pieces unknown\n"
    )
    print(f"after {step} steps:\n{table}")
    print(f"\nOne exchange from the held-out dialogues:\n\n{exchange_text(answer)}")
    print(f"""
Files in {folder}:
  corpus/              soda.jsonl, rejected.jsonl, report.txt, report.png, README.md, journal/
  soda/                the records by split, as the tasks read them
  model/               the run: config.gin, metrics.jsonl, checkpoints/
  loss.png             the loss curves

Talk to it, from {pathlib.Path.cwd()}:
  {sys.executable} -m cosmo chat --gin.MODEL_DIR={folder}/model
""")
    # All faults are named at once, because a demo takes minutes.
    faults = []
    if share < MIN_KEPT_SHARE:
        faults.append(f"{share:.0%} of the usable triples became records, not {MIN_KEPT_SHARE:.0%}")
    if ratio < MIN_PERPLEXITY_RATIO:
        faults.append(
            "the model did not learn: its perplexity must be below "
            f"1/{MIN_PERPLEXITY_RATIO:.0f} of the unigram model's, and is 1/{ratio:.2f}"
        )
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return not faults


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.co3_demo", description=__doc__)
    parser.add_argument("--triples", default=TRIPLES, help="ATOMIC's (%(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="triples (%(default)s)")
    parser.add_argument(
        "--output", default=OUTPUT, help="folder; a finished demo there becomes OUTPUT-previous"
    )
    parser.add_argument("--train_steps", type=int, default=300, help="(%(default)s)")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Make the corpus, train, ask and report; return the exit code."""
    with demo_folder(args.output, "co3 demo", OUTPUT) as folder:
        return run_in(folder, args)


def run_in(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Do as `run` does, in an empty folder."""
    began = time.monotonic()
    seconds = {}
    corpus, where = folder / "corpus", f"--gin.MODEL_DIR={folder}/model"
    with teacher() as url:
        named = (f"--triples={args.triples}", f"--limit={args.limit}", f"--output={corpus}")
        server = (f"--base_url={url}", "--model=teacher", "--concurrency=16")
        run_module("data_pipeline", "co3", *named, *server)
    sizes = write_splits(corpus, folder / "soda")
    print(f"\n{folder}/soda: " + ", ".join(f"{name} {n}" for name, n in sizes.items()))
    try:
        # Before training: a corpus without held-out dialogues is found in seconds.
        asked = question(list(soda_file_examples(f"{folder}/soda", "validation")))
    except DataError as error:
        raise UserError(f"too few records to hold some out, raise --limit: {error}") from error
    seconds["corpus"] = time.monotonic() - began

    run_module(
        "cosmo",
        "train",
        f"--gin_file={GIN_FILE}",
        where,
        "--gin.MIXTURE_OR_TASK_NAME=soda",
        f"--gin.SODA_PATH={folder}/soda",
        f"--gin.TRAIN_STEPS={args.train_steps}",
        f"--gin.EVAL_PERIOD={args.train_steps}",
        # The table compares the losses before and after.
        "--gin.RUN_EVAL_BEFORE_TRAINING=True",
    )
    seconds["training"] = time.monotonic() - began - seconds["corpus"]

    write_atomic(folder / "question.jsonl", json.dumps(dataclasses.asdict(asked)) + "\n")
    files = (f"--input={folder}/question.jsonl", f"--output={folder}/answer.jsonl")
    run_module("cosmo", "infer", where, *files)
    seconds["answer"] = time.monotonic() - began - sum(seconds.values())
    return 0 if report(folder, seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
