"""Answer a waiting task by a script, to try the pipeline without people.

Takes the task that `prosocial make` waits for, or every unanswered one of its folder. The workers'
names begin with "scripted-", and the card states that no person took part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.answers import append_answers
from data_pipeline.annotation.commands.common import known_answers
from data_pipeline.annotation.task_files import read_task
from data_pipeline.prosocial import worker
from data_pipeline.prosocial.commands.make import SCRIPTED

FLAGS = """
--output DIR!  the folder of `prosocial make`
--workers N=6  scripted workers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `prosocial work`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_work(args: argparse.Namespace) -> int:
    """Append the answers that are missing; return the exit code."""
    folder = Path(args.output)
    tasks = sorted((folder / "tasks").glob("*.jsonl"))
    if not tasks:
        raise UserError(f"{folder}/tasks has no task: start `prosocial make` first")
    for file in tasks:
        # A step with an outcome needs no further answers.
        if (folder / "steps" / file.name).exists():
            continue
        task, path = read_task(file), folder / "answers" / file.name
        durable.make_folder(path.parent)
        known = known_answers(task, path)
        made = list(worker.answers(task, list(known.kept), args.workers, SCRIPTED))
        append_answers(path, made)
        if not args.quiet:
            print(f"{path}: {len(made)} answers of {args.workers} scripted workers")
    return 0
