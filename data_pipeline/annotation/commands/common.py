"""Flags that several verbs of `annotate` share, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError, shown
from cosmo.tasks.record_files import read_records
from data_pipeline.annotation import pages, pairs
from data_pipeline.annotation.answers import Answers, check_file, read_answers
from data_pipeline.annotation.task_files import Item, Task, item_of, read_task, write_task

log = logging.getLogger("data_pipeline")

STUDY_FLAGS = """
the study:
--seed N=0  of samples and sides
--judges_per_item N:int  people who judge each item (3, or the preset's)
--min_seconds S=0.0  a person's answer that took less is set aside
--gold FILE  items with known answers, mixed in: lines of a task file with a field expected
--gold_every N=10  one gold item in so many items
--qualification FILE  the same, which a judge has to pass first
--qualification_pass SHARE=0.8  of right answers to these
--consent TEXT  in place of the page's own sentence
--wage TEXT  what judges read about their pay, as "12 euros an hour, paid each Friday"
"""


def study(args: argparse.Namespace, page: pages.Page, items: Sequence[Item], **known: Any) -> Task:
    """Return the task of a command's flags. Raises UserError."""
    if args.consent is not None:
        page = dataclasses.replace(page, consent=args.consent)
    gold = read_items(args.gold, "gold") if args.gold else []
    tests = read_items(args.qualification, "qualification") if args.qualification else []
    everything = [*tests, *gold, *items]
    doubled = [name for name, n in Counter(item.id for item in everything).items() if n > 1]
    if doubled:
        raise UserError(f"the id {shown(doubled[0])} occurs twice: ids must differ")
    try:
        return Task(
            page,
            tuple(everything),
            seed=args.seed,
            min_seconds=args.min_seconds,
            gold_every=args.gold_every if gold else 0,
            qualification_pass=args.qualification_pass if tests else 0.0,
            wage=args.wage or "",
            **known,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def read_items(path: Any, role: str) -> list[Item]:
    """Return the items of a file of JSON lines, as of `role`; DataError names a bad line."""
    items = []
    for place, row in read_records(Path(path)):
        try:
            items.append(item_of({**row, "role": role} if isinstance(row, dict) else row))
        except ValueError as error:
            raise place.error("a broken item", str(error), "an item of a task file") from None
    return items


def write(path: Path, task: Task, dropped: Counter, quiet: bool) -> None:
    """Write a task file, and print what it holds. Raises UserError for a task without items."""
    if not task.of_role("item"):
        raise UserError(f"no item is left{pairs.left_out(dropped)}: give more records")
    try:
        durable.make_folder(path.parent)
        write_task(path, task)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"an item does not fit page {task.page.name!r}: {error}") from error
    for reason, number in dropped.items():
        log.warning("left out: %d x %s", number, reason)
    if not quiet:
        roles = Counter(item.role for item in task.items)
        counts = ", ".join(f"{number} x {role}" for role, number in roles.items())
        print(f"{path}: page {task.page.name}, {counts}, {task.judges_per_item} judges an item, "
              f"task {task.fingerprint}")  # fmt: skip


def task_and_answers(args: argparse.Namespace) -> tuple[Task, Answers]:
    """Return the task and the answers of the flags --task and --answers."""
    task = read_task(args.task)
    return task, read_answers(task, args.answers)


def known_answers(task: Task, path: Path) -> Answers:
    """Return the answers of a file, none where it is missing or empty."""
    check_file(path)
    if not path.exists() or not path.read_bytes().strip():
        return Answers(())
    return read_answers(task, [path])


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write JSON lines atomically."""
    write_atomic(path, json_lines.lines(values))
