"""Let a language model judge a task, marked as a model: the judge "model:NAME".

Each comparison is judged twice, with A and B exchanged. Answers are appended to --answers, which
may hold people's already. Calls are journaled in ANSWERS.calls: the same command resumes, and pays
for nothing twice. Replies that cannot be read are in ANSWERS.unreadable.jsonl. A file that
`annotate serve` or another process has open is refused: give the model a file of its own.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import model_judge
from data_pipeline.annotation.answers import append_answers, check_judge, lock_answers
from data_pipeline.annotation.ask import ask_all
from data_pipeline.annotation.commands import common
from data_pipeline.annotation.fields import plain
from data_pipeline.annotation.task_files import Task, read_task
from data_pipeline.calls import flags

log = logging.getLogger("data_pipeline")

FLAGS = """
--task FILE!  the task
--answers FILE!  where the model's answers are appended
--judge NAME  the model's name as a judge (default: --model)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate judge`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)
    flags.add_server(parser.add_argument_group("server"))
    flags.add_limits(parser.add_argument_group("limits"))


def run_judge(args: argparse.Namespace) -> int:
    """Ask the model and append its answers; return the exit code."""
    flags.check(args)
    task, path = read_task(args.task), Path(args.answers)
    judge = model_judge.judge_name(args.judge or args.model)
    try:
        check_judge(judge)  # before the calls, which may cost money
    except ValueError as error:
        raise UserError(str(error), setting="judge") from None
    # Held over the calls, so that nobody pays for answers that could not be stored.
    with lock_answers(path):
        return _judge(args, task, path, judge)


def _judge(args: argparse.Namespace, task: Task, path: Path, judge: str) -> int:
    known = common.known_answers(task, path)
    left = model_judge.judgements(task, known.kept, judge)
    asked = ask_all(
        {name: start for name, (_, _, start) in left.items()},
        flags.server(args), flags.allowance(args), Path(f"{path}.calls"), args.form, args.tries,
    )  # fmt: skip
    made = [
        model_judge.answer_of(task, *left[name][:2], choices, judge)
        for name, choices in asked.results.items()
    ]
    append_answers(path, made)
    unreadable = Path(f"{path}.unreadable.jsonl")
    if asked.rejected:
        common.write_lines(unreadable, [plain(one) for one in asked.rejected.values()])
        log.warning("%d judgements have no readable answer: %s", len(asked.rejected), unreadable)
    elif not asked.stopped:
        unreadable.unlink(missing_ok=True)
    if not args.quiet:
        print(f"{path}: {len(made)} answers of {judge}, {len(known.kept)} before")
    return asked.exit_code
