"""Write a page of feedback for each judge: gold results, agreement, answers that differ.

--output gets one HTML page a person, which needs no other file and names no other judge. Its
feedback.jsonl has the same and the page's name. Models get none. Sides are as the judge saw them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import feedback
from data_pipeline.annotation.commands import common

FLAGS = """
--task FILE!  the task
--output FOLDER!  where the pages go
--most N=20  answers that differ, on each page
--no_gold_items  count gold alone: judges who continue must not learn the answers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate feedback`."""
    parser.description = __doc__
    parser.add_argument("--answers", nargs="+", required=True, metavar="FILE")
    add_flags(parser, FLAGS)


def run_feedback(args: argparse.Namespace) -> int:
    """Write the pages; return the exit code."""
    if args.most < 0:
        raise UserError(f"got {args.most}: give 0 or more", setting="most")
    task, answers = common.task_and_answers(args)
    made = feedback.build(task, answers, args.most, args.gold_items)
    folder = Path(args.output)
    durable.make_folder(folder)
    lines = []
    for judge, one in sorted(made.items()):
        name = feedback.file_name(judge)
        write_atomic(folder / name, feedback.page(task, one))
        lines.append({"file": name, **one})
    common.write_lines(folder / "feedback.jsonl", lines)
    if not args.quiet:
        aside = f", {len(answers.quarantined)} lines set aside" if answers.quarantined else ""
        print(f"{folder}: {len(made)} pages and feedback.jsonl{aside}")
    return 0
