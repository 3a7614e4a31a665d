"""Read the results of an export back: they are checked, and appended to --answers.

--input is the results CSV of Mechanical Turk, the JSON export of Label Studio, or Potato's folder.
Results of another task are an error. Rows that cannot be used go to ANSWERS.quarantined.jsonl.
Answers that --answers has already are not added again. A file that `annotate serve` has open is
refused: the server would not know of the new answers.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.answers import (
    Answer,
    Quarantined,
    append_answers,
    check_answer,
    check_person,
    lock_answers,
    write_quarantined,
)
from data_pipeline.annotation.commands import common
from data_pipeline.annotation.exchange import label_studio, mturk, potato
from data_pipeline.annotation.task_files import Task, read_task

log = logging.getLogger("data_pipeline")

READERS = {
    "mturk": mturk.read_results,
    "label_studio": label_studio.read_results,
    "potato": potato.read_results,
}
FLAGS = """
--source mturk|label_studio|potato  where the task was judged (required)
--task FILE!  the task
--input PATH!  the results
--answers FILE!  where the answers are appended
--strict  exit code 1 if a row was set aside
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate collect`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_collect(args: argparse.Namespace) -> int:
    """Append the answers; return the exit code."""
    if args.source is None:
        raise UserError("give --source=mturk, --source=label_studio or --source=potato")
    task, path = read_task(args.task), Path(args.answers)
    with lock_answers(path):
        return _collect(args, task, path)


def _collect(args: argparse.Namespace, task: Task, path: Path) -> int:
    known = common.known_answers(task, path)
    given = {(a.judge, a.item): a for a in known.kept}
    new: list[Answer] = []
    bad: list[Quarantined] = []
    again = 0  # rows whose answer is known already
    for number, line, found in READERS[args.source](task, args.input):
        reason = found if isinstance(found, str) else ""
        if not reason:
            earlier = given.get((found.judge, found.item))
            try:
                check_person(found.judge)
                check_answer(task, found)
                if earlier is not None and earlier.answers != found.answers:
                    raise ValueError(
                        f"doubled: got judge {found.judge!r} and item {found.item!r} again, with "
                        "other answers"
                    )
            except ValueError as error:
                reason = str(error)
            else:
                again += earlier is not None
                if earlier is None:
                    given[found.judge, found.item] = found
                    new.append(found)
        if reason:
            bad.append(Quarantined(str(args.input), number, reason, line))
    durable.make_folder(path.parent)
    append_answers(path, new)
    aside = Path(f"{path}.quarantined.jsonl")
    write_quarantined(aside, bad)
    if bad:
        log.warning("%d rows set aside in %s, the first: %s", len(bad), aside, bad[0].reason)
    if not args.quiet:
        print(f"{path}: {len(new)} new answers, {len(known.kept)} before, {again} of the rows "
              f"known already, {len(bad)} set aside")  # fmt: skip
    return 1 if args.strict and bad else 0
