"""`python -m canary toxichat`: measure a model's responses to ToxiChat's threads."""

import argparse
import dataclasses
import json

from cosmo.engine.base import json_lines
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

REPORTS = "toxichat.json"


def run(args: argparse.Namespace) -> None:
    """Print table 5 with the model's row; write the counts and the judgements into a folder."""
    from canary import toxichat
    from cosmo.engine.base.atomic import write_atomic
    from cosmo.engine.base.folders import prepare_folder
    from cosmo.engine.base.work_units import read_json
    from cosmo.tasks.readers import TOXICHAT_BOTS

    found = toxichat.threads(args.input, args.split, args.threads != "all")
    contexts = [toxichat.Context(one.id, one.turns) for one in found]
    if not contexts:
        raise UserError(f"{args.input}, split {args.split}: no such thread", setting="input")
    if args.contexts is not None:
        write_atomic(args.contexts, json_lines.lines(map(dataclasses.asdict, contexts)))
        print(f"{args.contexts}: {len(contexts):,} threads")
    if args.responses is None:
        if args.contexts is None:
            raise UserError("nothing to do", setting=("contexts", "responses"))
        return
    bad = toxichat.read_bad_words(args.bad_words) if args.bad_words else None
    gold = None
    if args.responses in TOXICHAT_BOTS:
        responses, gold = toxichat.shipped(found, args.responses)
        contexts = [one for one in contexts if one.id in responses]
    else:
        responses = toxichat.read_responses(args.responses, contexts)
    folder = prepare_folder(args.output, "output") if args.output else None
    judgements = _judgements(args, contexts, responses, gold)
    name = args.name or args.responses
    made = toxichat.report(name, responses, judgements, bad)
    reports = {}
    if folder is not None:
        # Each command adds its row.
        reports = read_json(folder / REPORTS) or {}
    reports[name] = made
    if folder is not None:
        write_atomic(folder / REPORTS, json.dumps(reports, indent=1))
        lines = [
            {"id": one.id, "response": responses[one.id], **dataclasses.asdict(judgements[one.id])}
            for one in contexts
            if one.id in judgements
        ]
        file = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.")
        write_atomic(folder / f"{file or 'model'}.jsonl", json_lines.lines(lines))
    print(toxichat.table(list(reports.values())), end="")


def _judgements(args, contexts, responses, gold):
    """Return the judgements that the flags ask for: of models, of a file, or the annotators'."""
    from canary import classifier, toxichat
    from cosmo.tasks.toxichat import OFFENSE, STANCE

    models = {STANCE: args.stance, OFFENSE: args.offense}
    if args.labels is not None:
        if any(models.values()):
            raise UserError("labels come from one source", setting=("labels", "stance", "offense"))
        return toxichat.read_judgements(args.labels, contexts)
    if not any(models.values()):
        # Without any judge, bad n-grams and negations are counted alone.
        return gold or {}
    settings = {
        "batch_size": args.batch_size,
        "vocabulary": args.vocabulary,
        "dtype": args.dtype,
        "num_partitions": args.num_partitions,
    }
    made = {}
    for task, path in models.items():
        # One model at a time: both may not fit.
        model = classifier.load(path, task, **settings) if path else None
        pair = (model, None) if task == STANCE else (None, model)
        made[task] = toxichat.judge(contexts, responses, *pair)
        del model, pair
    return {
        one.id: toxichat.Judgement(made[STANCE][one.id].stance, made[OFFENSE][one.id].offensive)
        for one in contexts
    }


VERB = Verb(
    help="measure a model's responses to ToxiChat's threads: stance, offence, bad n-grams",
    description="Print table 5 of the ProsocialDialog paper with a row for a model's responses to "
    "ToxiChat's threads: how many disagree or agree with the last turn, are offensive, hold bad "
    "n-grams or a negation. Judges are two classifiers, a file of labels, or ToxiChat's own "
    "labels for the responses that it ships (dgpt, gpt3).",
    examples="""\
  python -m canary toxichat --input=data/ToxiChat --contexts=/tmp/threads.jsonl
  python -m canary toxichat --input=data/ToxiChat --responses=replies.jsonl --name=Prost \\
    --stance=/tmp/stance --offense=/tmp/offense --bad_words=word_based_bias_list.csv
  python -m canary toxichat --input=data/ToxiChat --responses=gpt3 --threads=all
""",
    run=run,
    flags="""
--input PATH!         ToxiChat: a file, or a folder with train*, dev* and test* files
--split NAME=test     which split of a folder
--threads offensive|all  those whose last turn is offensive (the default), or all
--contexts FILE       gets the threads to answer, {id, turns}
--responses FILE      lines {id, response}, one for each thread; or the word dgpt or gpt3,
                      whose responses ToxiChat ships
--name NAME           of the row (default: the value of --responses)
--output DIR          gets toxichat.json, to which each command adds its row, and NAME.jsonl
judges:
--stance CKPT         a run of gin/canary/toxichat_stance.gin, or a classifier of transformers
--offense CKPT        a run of gin/canary/offense.gin or toxichat_offense.gin, or the same
--labels FILE         lines {id, stance, offensive} of any other judge
--bad_words FILE      Zhou et al. 2021's word_based_bias_list.csv, or one n-gram a line
--vocabulary FILE     if none is kept with the checkpoints
--batch_size N=32     at a time
--dtype float32|bfloat16  of products (float32 on a CPU, else bfloat16)
--num_partitions N=1  devices a model copy
""",
)
