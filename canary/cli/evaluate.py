"""`python -m canary eval`: measure a checkpoint on ProsocialDialog, or compare guards."""

import argparse
import json
import pathlib
from collections import Counter
from typing import TYPE_CHECKING

from canary.cli import against, flags
from cosmo.engine.base import json_lines
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

if TYPE_CHECKING:
    from canary.report import Gold


def run(args: argparse.Namespace) -> None:
    """Print a table; write metrics.json and predictions.jsonl into a folder."""
    from canary import evaluation, report
    from cosmo.engine.base.atomic import write_atomic
    from cosmo.engine.base.folders import prepare_folder
    from cosmo.engine.base.progress import Progress
    from cosmo.engine.checkpoints import any_format

    if args.predictions is not None or args.contexts is not None:
        return _from_file(args)
    if args.against is None and args.checkpoint is None:
        known = ("checkpoint", "against", "predictions")
        raise UserError("give a model, its predictions or another guard", setting=known)
    if against.is_asked(args):
        return against.run(args)
    # Read before the model is loaded: a wrong path costs no loading.
    cases = flags.first_examples(evaluation.cases(args.input, args.split), args)
    if not cases:
        raise UserError(
            f"{args.input}, split {args.split}: nothing to measure: no dialogue has all its rows, "
            "or --num_examples is 0",
            setting="input",
        )
    settings = flags.model_settings(args, args.batch_size)
    output = args.output or any_format.results_folder(args.checkpoint, "canary_eval", "output")
    # Before the model is loaded, because a folder that cannot be written to costs no evaluation.
    folder = prepare_folder(output, "output")
    canary = settings.open()
    decoding = flags.decoding_config(args, settings)
    golds = [case.gold for case in cases]
    # Rows with gold RoTs are answered twice: once to label, once to score the RoTs.
    progress = Progress(len(cases) + sum(bool(gold.rots) for gold in golds), unit="row")

    def on_batch(counts: Counter[str]) -> None:
        progress.add(counts["records"])

    try:
        founds = evaluation.measure(canary, cases, decoding, args.seed, on_batch)
    # Also after an error: the terminal's cursor leaves the bar.
    finally:
        progress.finish()
    made = report.report(golds, founds, _baseline(args))
    # Beside the numbers, so that the folder explains itself without the command.
    about = {
        "checkpoint": args.checkpoint,
        "input": args.input,
        "split": args.split,
        "label_style": settings.style,
        "turn_separator": settings.separator,
        "task_feature_lengths": dict(settings.session.task_feature_lengths),
    }
    # Indented, because people read it.
    write_atomic(folder / "metrics.json", json.dumps({**about, **made}, indent=1))
    lines = map(evaluation.line, cases, founds)
    write_atomic(folder / "predictions.jsonl", json_lines.lines(lines))
    print(report.table(made))
    print(f"{folder}: metrics.json, predictions.jsonl")


def _from_file(args: argparse.Namespace) -> None:
    """Print the table of a file of predictions; or write the contexts that such a file answers."""
    from canary import evaluation, predictions, report
    from cosmo.engine.base.atomic import write_atomic
    from cosmo.engine.base.folders import prepare_folder

    if args.against is not None or args.checkpoint is not None:
        raise UserError(
            "a file of predictions stands for a model: give no other",
            setting=("predictions", "contexts", "checkpoint", "against"),
        )
    cases = list(evaluation.cases(args.input, args.split))
    used = flags.first_examples(cases, args)
    if not used:
        raise UserError(f"{args.input}, split {args.split}: nothing to measure", setting="input")
    if args.contexts is not None:
        write_atomic(args.contexts, json_lines.lines(predictions.contexts(used)))
        print(f"{args.contexts}: {len(used):,} contexts")
    if args.predictions is None:
        return
    founds = predictions.read(args.predictions, cases, len(used))
    made = report.report([case.gold for case in used], founds, _baseline(args))
    if args.output is not None:
        about = {"predictions": args.predictions, "input": args.input, "split": args.split}
        folder = prepare_folder(args.output, "output")
        write_atomic(folder / "metrics.json", json.dumps({**about, **made}, indent=1))
    print(report.table(made, args.name or pathlib.PurePath(args.predictions).stem))


def _baseline(args: argparse.Namespace) -> "Gold | None":
    """Return the most frequent answer of the training split; None if --input has no such split."""
    from canary import evaluation, report
    from cosmo.tasks.files import resolve, splits_of

    if args.split == "train" or "train" not in splits_of(args.input):
        return None
    if not resolve(args.input).is_dir():
        return None  # one file serves every split: its training split is what is evaluated
    # From the training split, because a baseline may not see the answers that it is measured on.
    return report.most_frequent([case.gold for case in evaluation.cases(args.input, "train")])


VERB = Verb(
    help="measure a checkpoint on ProsocialDialog, or compare it with other guards",
    description="Measure labels and rules of thumb on every row of ProsocialDialog, with the "
    "paper's rows beside: prints a table, writes metrics.json and predictions.jsonl. With "
    "--against, or on a corpus of two classes, compare guards: ROC-AUC, accuracy, false positives, "
    "latency. Each command adds its guards to --output; one that was stopped continues. With "
    "--predictions, measure anybody's answers: lines of JSON {id, label, probabilities, rots, "
    "rot_log_likelihood, rot_tokens}, of which an id and a label or rots must be there; "
    "--contexts writes the ids and what is to be answered.",
    examples="""\
  python -m canary eval --checkpoint=/tmp/canary --input=data/prosocial_dialog --split=test
  python -m canary eval --checkpoint=/tmp/canary --input=test.jsonl --num_examples=100
  python -m canary eval --checkpoint=/tmp/canary --input=data/prosocial_dialog \\
    --against=http://127.0.0.1:8000/v1 --model=llama-guard-3-1b --style=llama_guard \\
    --output=/tmp/guards
  python -m canary eval --input=data/prosocial_dialog --contexts=/tmp/contexts.jsonl
  python -m canary eval --input=data/prosocial_dialog --predictions=bert.jsonl --name=BERT
""",
    run=run,
    flags=f"""
--input PATH!         ProsocialDialog or ToxiChat: a file, or a folder with train*,
                      validation* and test* files; or lines {{turns, label}}, label one of the
                      five, "safe" or "unsafe"
--split NAME=test     which split of a folder
--output DIR          gets metrics.json and predictions.jsonl, or guards.json and verdicts
                      (default: canary_eval/ or canary_against/ in the run's folder)
--num_examples N:int  only so many (all)
--batch_size N=32     at a time
measuring another model's answers:
--contexts FILE       gets the contexts to answer, {{id, turns}}
--predictions FILE    the answers, a line for each context (--name: of its row)
comparing guards:
--against URL         a guard's API, such as http://127.0.0.1:8000/v1 (extra: guards)
--model NAME          of the guard at its server
--style openai|canary|llama_guard|shieldgemma|prompt  how it is asked: moderations of a text
                      (openai, the default) or of messages (canary, as cosmo serve has them),
                      Llama Guard's chat, ShieldGemma's Yes or No, or a question to any chat
                      model
--name NAME           of its row and files (default: the model's)
--turns all|last      what a guard sees: the dialogue (all, the default) or its last turn
--safe_labels LIST=__casual__  of the five labels, those that count as safe
--concurrency N=8     calls at once
--timeout_seconds S=60.0  for an answer
--api_key_env NAME=OPENAI_API_KEY  the environment variable with the guard's key
--overwrite           forget the verdicts of this command's guards, and ask again
{flags.MODEL.replace("CKPT!", "CKPT ")}
{flags.GENERATION}
""",
)
