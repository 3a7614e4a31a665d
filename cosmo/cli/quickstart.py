"""Train a small Cosmo on the sample corpus, evaluate it before and after, and question it, offline.

The model has 1.3 million parameters. Each stage is a command that a user could type, and is
printed. A finished quickstart of the output folder is kept beside it, in runs/quickstart-previous.
Exit code 1 if the model has not learnt: its validation perplexity must end below a third of a
unigram model's.
"""

import argparse
import collections
import json
import math
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.demo import demo_folder, run_module
from cosmo.engine.base.tables import text_table

if TYPE_CHECKING:
    from cosmo.engine.base.vocabulary import Vocabulary
    from cosmo.tasks.formatting import Example

GIN_FILE = "gin/cosmo/tiny.gin"
OUTPUT = "runs/quickstart"
SAMPLE = "tasks/sample"
# Not less, because a model that learnt token frequencies alone has a ratio of 1.
MIN_PERPLEXITY_RATIO = 3.0


def run(args: argparse.Namespace) -> int:
    """Run every stage; return the exit code, 1 if the model has not learnt."""
    with demo_folder(args.output, "quickstart", OUTPUT) as folder:
        return run_in(folder, args)


def run_in(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Do as `run` does, in an empty folder."""
    from cosmo.tasks import files

    began = time.monotonic()
    where = f"--gin.MODEL_DIR={folder}"
    steps = f"--gin.TRAIN_STEPS={args.train_steps}"
    # The table compares the losses before and after.
    before = "--gin.RUN_EVAL_BEFORE_TRAINING=True"
    run_module("cosmo", "train", f"--gin_file={GIN_FILE}", where, before, steps)
    run_module("cosmo", "eval", where, f"--gin.EVAL_OUTPUT_DIR={folder}/eval")
    # The sample is in the package, wherever it is installed.
    questions, answers = files.resolve(f"{SAMPLE}/questions.jsonl"), f"{folder}/answers.jsonl"
    run_module("cosmo", "infer", where, f"--input={questions}", f"--output={answers}")
    return 0 if report(folder, time.monotonic() - began) else 1


def report(folder: pathlib.Path, seconds: float) -> bool:
    """Print the report and draw the loss curve. Return whether the model has learnt."""
    from cosmo import plot
    from cosmo.tasks import vocabularies
    from cosmo.tasks.metrics import f1

    vocabulary = vocabularies.load(f"{SAMPLE}/vocabulary.model")
    train, held_out = examples("train"), examples("validation")
    unigram = unigram_perplexity(train, held_out, vocabulary)
    rows = plot.read_metrics(folder / "metrics.jsonl")
    try:
        plot.plot(rows, folder / "loss.png", "Cosmo, tiny, on the sample corpus", math.log(unigram))
    except ImportError:  # the extra `plot` is optional
        print("no loss.png: pip install matplotlib draws it")

    predictions = {}
    for path in sorted((folder / "eval").glob("*-predictions.jsonl")):
        predictions[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [line for lines in predictions.values() for line in lines]
    targets = [line["targets"] for line in answers]
    # Over all tasks: the sample's splits are small.
    ours = f1(targets, [line["prediction"] for line in answers])["f1"]
    # The constant answer is the baseline of a model that ignores its input.
    (commonest, _), *_ = collections.Counter(e.response for e in train).most_common(1)
    constant = f1(targets, [commonest] * len(targets))["f1"]

    table, step, ratio = loss_table(rows, unigram)
    print(f"\n{'=' * 78}\nQuickstart: {step} steps, {seconds:.0f} s in all\n\n{table}")
    print(
        f"\nF1 of {len(answers)} generated answers: {ours:.3f}; "
        f"of always answering {commonest!r}: {constant:.3f}"
    )
    print("\nThree exchanges from the validation set:")
    # Always the same dialogues, so that two quickstarts can be compared.
    for task, index in (("soda", 3), ("soda", -5), ("prosocial_dialog", 7)):
        print(f"\n{exchange_text(predictions[f'{task}-predictions.jsonl'][index])}")
    print(f"""
Files in {folder}:
  loss.png             the loss curves
  metrics.jsonl        every number logged; tensorboard/ holds them too
  config.gin           the settings of the run
  checkpoints/         to resume from, evaluate or question
  eval/                metrics and predictions for the whole validation set
  answers.jsonl        answers to the records of {SAMPLE}/questions.jsonl

So small a model knows the words of its corpus, and little sense. Talk to it, from
{pathlib.Path.cwd()}:
  {sys.executable} -m cosmo chat --gin.MODEL_DIR={folder}
""")
    # Two proofs: of what it expects, and of what it writes.
    learnt = ratio > MIN_PERPLEXITY_RATIO and ours > constant
    if not learnt:
        print(
            "FAILED: the model did not learn. Perplexity must be below "
            f"1/{MIN_PERPLEXITY_RATIO:.0f} of the unigram model's (it is 1/{ratio:.2f}) and F1 "
            "above the constant answer's.",
            file=sys.stderr,
        )
    return learnt


def examples(split: str) -> "list[Example]":
    """Return all examples of the sample corpus, as the tasks make them."""
    from cosmo.tasks.families import prosocial_file_examples, soda_file_examples

    return [
        *soda_file_examples(f"{SAMPLE}/soda", split),
        *prosocial_file_examples(f"{SAMPLE}/prosocial", split),
    ]


def unigram_perplexity(
    train: "list[Example]", held_out: "list[Example]", vocabulary: "Vocabulary"
) -> float:
    """Return the perplexity per target token, EOS included, of add-one smoothed unigram counts."""

    def tokens(items):
        for item in items:
            yield from vocabulary.encode(item.response)
            # The model's perplexity counts EOS too.
            yield vocabulary.eos_id

    counts = collections.Counter(tokens(train))
    # Add-one: a token that training never had must not make the perplexity infinite.
    total = sum(counts.values()) + vocabulary.size
    logs = [math.log((counts[token] + 1) / total) for token in tokens(held_out)]
    return math.exp(-sum(logs) / len(logs))


def loss_table(rows: list[dict], unigram: float) -> tuple[str, int, float]:
    """Return (table of a run's first and last evaluation, last step, ratio of perplexities).

    `rows` are those of metrics.jsonl, `unigram` is the perplexity of the unigram model. The ratio
    is that perplexity divided by the run's last one.
    """
    evaluations = [row for row in rows if "eval/all/loss" in row]
    before, after = evaluations[0], evaluations[-1]
    table = [["validation", "before", "after", "unigram model"]]
    for name, key, other, places in (
        ("loss (nats a token)", "eval/all/loss", math.log(unigram), 3),
        ("perplexity", "eval/all/perplexity", unigram, 1),
    ):
        table.append([name, *(f"{x:.{places}f}" for x in (before[key], after[key], other))])
    return text_table(table), after["step"], unigram / after["eval/all/perplexity"]


def exchange_text(line: dict) -> str:
    """Return a line of predictions as people read it: the dialogue, the answer, the reference."""
    # Narrative and instruction may be missing; the dialogue is always last.
    *parts, dialogue = line["inputs"].split(" <sep> ")
    text = [f"  ({part})" for part in parts]
    text += [f"  - {turn}" for turn in dialogue.split(" <turn> ")]
    text += [f"  model:     {line['prediction']}", f"  reference: {line['targets']}"]
    return "\n".join(text)


VERB = Verb(
    help="train, evaluate and question a small model on the sample corpus, offline",
    description=__doc__,
    examples="""\
  python -m cosmo quickstart
  python -m cosmo quickstart --output=/tmp/quickstart --train_steps=100
""",
    run=run,
    flags=f"""
--output DIR={OUTPUT}  the folder of the run
--train_steps N=300  steps; the recipe has 600
""",
)
