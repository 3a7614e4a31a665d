"""`python -m canary eval --against`: compare guards on labelled dialogues, side by side."""

import argparse
import json
import pathlib
from itertools import islice
from typing import TYPE_CHECKING

from canary.cli import flags
from cosmo.engine.base.errors import UserError

if TYPE_CHECKING:
    from canary.against import Side

SUMMARY = "guards.json"


def is_asked(args: argparse.Namespace) -> bool:
    """Return whether `eval` compares guards: --against, or a corpus with two classes alone."""
    from canary import against

    return args.against is not None or against.corpus_of(args.input, args.split) != "prosocial"


def run(args: argparse.Namespace) -> None:
    """Print a table of all sides; write guards.json and each side's verdicts into a folder."""
    from canary import against, guard_report
    from cosmo.engine.base import json_lines
    from cosmo.engine.base.atomic import write_atomic
    from cosmo.engine.base.folders import prepare_folder
    from cosmo.engine.base.progress import Progress
    from cosmo.engine.base.work_units import read_json
    from cosmo.engine.checkpoints import any_format

    safe = _safe_labels(args.safe_labels)
    if args.concurrency < 1:
        raise UserError(
            f"concurrency={args.concurrency}; it must be at least 1", setting="concurrency"
        )
    corpus, questions = against.read_questions(args.input, args.split)
    questions = list(islice(questions, args.num_examples))
    if not questions:
        raise UserError(
            f"{args.input}, split {args.split}: nothing to judge, or --num_examples is 0",
            setting="input",
        )
    output = args.output
    if output is None and args.checkpoint is None:
        raise UserError("give a folder for the verdicts", setting="output")
    output = output or any_format.results_folder(args.checkpoint, "canary_against", "output")
    folder = prepare_folder(output, "output")
    only_last = args.turns == "last"
    about = {
        "input": args.input,
        "split": args.split,
        "corpus": corpus,
        "turns": "last" if only_last else "all",
        "questions": against.digest(questions),
    }
    kept = read_json(folder / SUMMARY) or {}
    names = list(kept.get("sides", {}))
    differs = [name for name in about if name in kept and kept[name] != about[name]]
    if differs and not args.overwrite:
        raise UserError(
            f"{folder} has verdicts with other {', '.join(differs)}: give another folder, or "
            "overwrite it",
            setting=("output", "overwrite"),
        )
    names = [] if differs else names
    for side in _sides(args):
        progress = Progress(len(questions), unit="dialogue")
        try:
            lines = against.judge(
                side,
                questions,
                folder,
                only_last=only_last,
                concurrency=args.concurrency,
                overwrite=args.overwrite,
                on_done=progress.add,
            )
        # Also after an error: the terminal's cursor leaves the bar.
        finally:
            progress.finish()
        if side.name not in names:
            names.append(side.name)
        unanswered = sum(bool(line.get("unanswered")) for line in lines)
        if unanswered:
            print(f"{side.name} left {unanswered:,} unanswered: the same command asks them again")
    # From the files, so that sides of earlier commands are counted with these safe labels too.
    made = {}
    for name in names:
        data = against.verdicts_path(folder, name).read_bytes()
        made[name] = guard_report.report([*map(json_lines.value, data.splitlines())], safe)
    summary = {**about, "safe_labels": safe, "concurrency": args.concurrency, "sides": made}
    # Indented, because people read it.
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1))
    print(guard_report.table(made, corpus, safe, only_last, args.concurrency))
    print(f"{folder}: {SUMMARY}, and NAME.jsonl for each guard")


def _sides(args: argparse.Namespace) -> "list[Side]":
    """Return the guards of the flags; a local one is loaded after the others are known."""
    from canary import against
    from canary.labeller import Labeller

    sides: list[Side] = []
    if args.against is not None:
        if args.model is None:
            raise UserError("give the model's name at the guard's server", setting="model")
        sides.append(
            against.Remote(
                args.against,
                args.model,
                args.style or "openai",
                key_variable=args.api_key_env,
                timeout=args.timeout_seconds,
                name=args.name,
            )
        )
    if args.checkpoint is not None:
        settings = flags.model_settings(args, batch_size=1)
        canary = settings.open()
        labeller = Labeller(canary, max_queue=args.concurrency)
        labeller.warm_up(rots=False)
        name = pathlib.PurePath(args.checkpoint).name or "canary"
        sides.append(
            against.Local(labeller, name, args.checkpoint, canary.session.model.network.dtype)
        )
    return sides


def _safe_labels(given: str) -> tuple[str, ...]:
    from cosmo.tasks.safety import LABELS

    # Names with or without their underscores.
    safe = tuple(f"__{name.strip().strip('_')}__" for name in given.split(","))
    unknown = [name for name in safe if name not in LABELS]
    if unknown or set(safe) == set(LABELS):
        raise UserError(
            f"safe_labels={given}; give some, not all, of {', '.join(LABELS)}",
            setting="safe_labels",
        )
    return safe
