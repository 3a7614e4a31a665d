"""`python -m canary.prost eval`: measure a checkpoint on the paper's seven corpora."""

import argparse
import json
from collections import Counter

from canary.cli.flags import decoding_fields, first_examples
from canary.prost.cli import flags
from cosmo.engine.base import json_lines
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Print tables 3 and 8 with this model's rows; write metrics.json and predictions.jsonl."""
    from canary.prost import evaluation
    from cosmo.engine.base.atomic import write_atomic
    from cosmo.engine.base.folders import prepare_folder
    from cosmo.engine.base.progress import Progress
    from cosmo.engine.checkpoints import any_format

    # Read before the model is loaded: a wrong path costs no loading.
    named = evaluation.CORPORA if args.task == "all" else args.task.split(",")
    tasks = list(dict.fromkeys(name.strip() for name in named))  # one named twice is measured once
    settings = flags.model_settings(args, args.batch_size)
    corpora = evaluation.corpora(args.checkpoint, args.data)
    unknown = [task for task in tasks if task not in corpora]
    if unknown:
        raise UserError(
            f"no such task: {unknown[0]!r}; known are all, {', '.join(corpora)}", setting="task"
        )
    for task in tasks:
        corpora[task].files(args.split)  # its error names the corpus and where to get it
    examples = {task: first_examples(corpora[task].examples(args.split), args) for task in tasks}
    empty = [task for task, found in examples.items() if not found]
    if empty:
        raise UserError(f"{empty[0]}, split {args.split}: nothing to measure", setting="task")
    output = args.output or any_format.results_folder(args.checkpoint, "prost_eval", "output")
    folder = prepare_folder(output, "output")
    decoding = settings.decoding(**decoding_fields(args))
    prost = settings.with_session(settings.session.open()[0])
    with_gold = settings.variant == "rot_and_response"
    rounds = [(task, "own") for task in tasks]
    if with_gold and evaluation.PROSOCIAL in tasks:
        rounds.append((evaluation.PROSOCIAL, "gold"))
    # Each example is answered once and scored once.
    progress = Progress(2 * sum(len(examples[task]) for task, _ in rounds), unit="row")

    def on_batch(counts: Counter[str]) -> None:
        progress.add(counts["records"])

    # Beside the numbers, so that the folder explains itself without the command.
    about = {
        "checkpoint": args.checkpoint,
        "split": args.split,
        "variant": settings.variant,
        "decoding": decoding.settings(),
        "task_feature_lengths": dict(settings.session.task_feature_lengths),
    }
    made, lines = {}, []
    try:
        for task, rots in rounds:
            found = evaluation.measure(prost, examples[task], decoding, rots, args.seed, on_batch)
            made[task if rots == "own" else f"{task} gold"] = evaluation.report(
                examples[task], found
            )
            pairs = zip(examples[task], found, strict=True)
            lines += [evaluation.line(task, example, one, rots) for example, one in pairs]
            # After each task: a command that is stopped loses one.
            write_atomic(folder / "metrics.json", json.dumps({**about, "tasks": made}, indent=1))
            write_atomic(folder / "predictions.jsonl", json_lines.lines(lines))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(made)} of {len(rounds)} measurements were finished and are in {folder}"
        ) from None
    # Also after an error: the terminal's cursor leaves the bar.
    finally:
        progress.finish()
    print(evaluation.tables(settings.variant, made))
    for task, found in made.items():
        for name, what in (
            ("cut", "a history that was cut to fit"),
            ("answers_of_another_form", "an answer whose marks are wrong"),
        ):
            if found[name]:
                print(f"{task}: {found[name]} of {found['examples']} examples have {what}")
    print(f"{folder}: metrics.json, predictions.jsonl")


VERB = Verb(
    help="measure a checkpoint on the seven corpora",
    description="Measure BLEU-4, F1 and perplexity of responses on the seven corpora, with the "
    "paper's tables 3 and 8 beside: prints both tables, writes metrics.json and predictions.jsonl.",
    examples="""\
  python -m canary.prost eval --checkpoint=/tmp/prost --task=all
  python -m canary.prost eval --checkpoint=/tmp/prost --task=prost_prosocial --data=/data \\
    --num_examples=500 --beam_size=1 --min_length=0
""",
    run=run,
    flags=f"""
--task NAMES=all      tasks, separated by commas: prost_prosocial, prost_dailydialog,
                      prost_topical_chat, prost_persona_chat, prost_wizard, prost_empathetic,
                      prost_blended
--data DIR            the folder of the corpora, each in its folder: prosocial_dialog,
                      dailydialog, topical_chat, persona_chat, wizard_of_wikipedia,
                      empathetic_dialogues, blended_skill_talk (default: the run's own paths)
--split NAME=test     which split
--output DIR          gets metrics.json and predictions.jsonl (default: prost_eval/ in the
                      run's folder)
--num_examples N:int  only so many of each task (all)
--batch_size N=32     at a time
{flags.MODEL}
{flags.GENERATION}
""",
)
