"""The quickstart: train a small Cosmo on a laptop, evaluate it, question it, and report.

Each stage is the command that a user would type; `python -m cosmo quickstart` runs this. It fails
if the model has not learnt: its validation perplexity must end below a third of a unigram model's.
"""

import argparse
import collections
import json
import math
import pathlib
import subprocess
import sys
import time

from cosmo import plot
from cosmo.engine.base import demo_folder
from cosmo.tasks import files, vocabularies
from cosmo.tasks.families import prosocial_file_examples, soda_file_examples
from cosmo.tasks.formatting import Example
from cosmo.tasks.metrics import f1

GIN_FILE = "gin/cosmo/tiny.gin"
OUTPUT = "runs/quickstart"
SAMPLE = "tasks/sample"
MUST_BEAT = 3.0  # the unigram model's perplexity, divided by ours, at least


def run(*arguments: str) -> None:
    """Run `python -m cosmo ...`, showing the command; exit with its code if it fails."""
    print(f"\n$ python -m cosmo {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "cosmo", *arguments]).returncode
    if code:
        sys.exit(code)


def examples(split: str) -> list[Example]:
    """All examples of the sample corpus, as the tasks make them."""
    return [
        *soda_file_examples(f"{SAMPLE}/soda", split),
        *prosocial_file_examples(f"{SAMPLE}/prosocial", split),
    ]


def unigram_perplexity(train: list[Example], held_out: list[Example], vocabulary) -> float:
    """Perplexity per target token, EOS included, of add-one smoothed unigram counts."""

    def tokens(items):
        for item in items:
            yield from vocabulary.encode(item.response)
            yield vocabulary.eos_id

    counts = collections.Counter(tokens(train))
    total = sum(counts.values()) + vocabulary.size
    logs = [math.log((counts[token] + 1) / total) for token in tokens(held_out)]
    return math.exp(-sum(logs) / len(logs))


def shown(line: dict) -> str:
    """One exchange as people read it."""
    *parts, dialogue = line["inputs"].split(" <sep> ")
    text = [f"  ({part})" for part in parts]
    text += [f"  - {turn}" for turn in dialogue.split(" <turn> ")]
    text += [f"  model:     {line['prediction']}", f"  reference: {line['targets']}"]
    return "\n".join(text)


def report(folder: pathlib.Path, seconds: float) -> bool:
    """Print the report and draw the curve; whether the model has learnt."""
    vocabulary = vocabularies.load(f"{SAMPLE}/vocabulary.model")
    train, held_out = examples("train"), examples("validation")
    unigram = unigram_perplexity(train, held_out, vocabulary)
    rows = plot.read_metrics(folder / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/all/loss" in row]
    before, after = evaluations[0], evaluations[-1]
    try:
        plot.plot(rows, folder / "loss.png", "Cosmo, tiny, on the sample corpus", math.log(unigram))
    except ImportError:  # the extra `plot` is optional
        print("no loss.png: pip install matplotlib draws it")

    predictions = {}
    for path in sorted((folder / "eval").glob("*-predictions.jsonl")):
        predictions[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [line for lines in predictions.values() for line in lines]
    targets = [line["targets"] for line in answers]
    ours = f1(targets, [line["prediction"] for line in answers])["f1"]
    (commonest, _), *_ = collections.Counter(e.response for e in train).most_common(1)
    constant = f1(targets, [commonest] * len(targets))["f1"]

    ratio = unigram / after["eval/all/perplexity"]
    learnt = ratio > MUST_BEAT and ours > constant
    print(f"\n{'=' * 78}\nQuickstart: {after['step']} steps, {seconds:.0f} s in all\n")
    print(f"{'validation':<34}{'before':>12}{'after':>12}{'unigram model':>16}")
    print(
        f"{'loss (nats a token)':<34}{before['eval/all/loss']:>12.3f}"
        f"{after['eval/all/loss']:>12.3f}{math.log(unigram):>16.3f}"
    )
    print(
        f"{'perplexity':<34}{before['eval/all/perplexity']:>12.1f}"
        f"{after['eval/all/perplexity']:>12.1f}{unigram:>16.1f}"
    )
    print(
        f"\nF1 of {len(answers)} generated answers: {ours:.3f}; "
        f"of always answering {commonest!r}: {constant:.3f}"
    )
    print("\nThree exchanges from the validation set:")
    for lines, index in (("soda", 3), ("soda", -5), ("prosocial_dialog", 7)):
        print(f"\n{shown(predictions[f'{lines}-predictions.jsonl'][index])}")
    print(f"""
Files in {folder}:
  loss.png             the loss curves
  metrics.jsonl        every number logged; tensorboard/ holds them too
  config.gin           the settings of the run
  checkpoints/         to resume from, evaluate or question
  eval/                metrics and predictions for the whole validation set
  answers.jsonl        answers to the records of {SAMPLE}/questions.jsonl

Talk to it, from {pathlib.Path.cwd()}:
  {sys.executable} -m cosmo chat --gin.MODEL_DIR={folder}
""")
    if not learnt:
        print(
            f"FAILED: the model did not learn. Perplexity must be below 1/{MUST_BEAT:.0f} of the "
            f"unigram model's (it is 1/{ratio:.2f}) and F1 above the constant answer's.",
            file=sys.stderr,
        )
    return learnt


def run_quickstart(args: argparse.Namespace) -> int:
    """Run `quickstart`; return the exit code, 1 if the model has not learnt."""
    began = time.monotonic()
    folder = demo_folder.begin(args.output, "quickstart", OUTPUT)
    where = f"--gin.MODEL_DIR={folder}"
    steps = f"--gin.TRAIN_STEPS={args.train_steps}"
    run("train", f"--gin_file={GIN_FILE}", where, "--gin.RUN_EVAL_BEFORE_TRAINING=True", steps)
    run("eval", where, f"--gin.EVAL_OUTPUT_DIR={folder}/eval")
    questions, answers = files.resolve(f"{SAMPLE}/questions.jsonl"), f"{folder}/answers.jsonl"
    run("infer", where, f"--input={questions}", f"--output={answers}")
    return 0 if report(folder, time.monotonic() - began) else 1
