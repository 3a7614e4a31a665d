"""Make a task of a page about one dialogue: rots, proofreading, safety, validation, commonsense.

--input is a corpus of dialogues, recognised by its looks, or lines of a task file without its head.
Such a line ({id, context, narrative, rots, texts, predicted}) may hold all that a page shows. A
page that shows nothing, such as `survey`, needs none: everybody answers it once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import read_records
from data_pipeline.annotation import pages, pairs
from data_pipeline.annotation.commands import common
from data_pipeline.annotation.task_files import Item

FLAGS = """
--page NAME!  {pages}, or a page of your own (.toml)
--input PATH  a corpus, or lines of items
--output FILE!  the task file
--split NAME=test  of a corpus
--items N:int  how many, drawn by seed (default: all)
--min_turns N=1  of a dialogue
--max_turns N:int  of a dialogue
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate make`."""
    parser.description = __doc__
    single = [name for name in pages.names() if "options" not in pages.load(name).shows]
    add_flags(parser, FLAGS.replace("{pages}", ", ".join(single)) + common.STUDY_FLAGS)


def run_make(args: argparse.Namespace) -> int:
    """Write the task file; return the exit code."""
    page = pages.load(args.page)
    if "options" in page.shows:
        raise UserError(f"--page={args.page} compares two things: use `annotate pairs`")
    dropped: Counter = Counter()
    if bool(page.shows) != bool(args.input):
        problem = "give --input" if page.shows else "it shows nothing, so --input has no use"
        raise UserError(f"--page={args.page}: {problem}")
    if not page.shows:
        by_id = {page.name: Item(page.name)}
    elif _holds_items(args.input):
        by_id = {item.id: item for item in common.read_items(resolve(args.input), "item")}
    else:
        found = pairs.read_dialogues(args.input, args.split, dropped)
        kept = pairs.filtered(found, args.min_turns, args.max_turns, dropped=dropped)
        by_id = {item.id: item for item in pairs.items_of_dialogues(page, kept)}
    items = [by_id[name] for name in pairs.sample(by_id, args.items, args.seed)]
    task = common.study(
        args, page, items, judges_per_item=args.judges_per_item or 3,
        made_by={"input": args.input, "left_out": dict(dropped)},
    )  # fmt: skip
    common.write(Path(args.output), task, dropped, args.quiet)
    return 0


def _holds_items(path: str) -> bool:
    """Return whether a file's first record is an item of a task file."""
    place = resolve(path)
    if not place.is_file() or not place.name.endswith((".jsonl", ".json", ".ndjson")):
        return False
    first = next((row for _, row in read_records(place)), None)
    # ProsocialDialog's rows have a context too, which is one text.
    return isinstance(first, dict) and isinstance(first.get("context"), list)
