"""Export a task to Mechanical Turk, Label Studio or Potato.

mturk writes page.html and items.csv; label_studio config.xml and tasks.json; potato config.yaml and
items.jsonl. Qualification items stay out: each of these has tests of its own. `annotate collect`
reads the results back.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.exchange import label_studio, mturk, potato
from data_pipeline.annotation.task_files import Item, Task, read_task

log = logging.getLogger("data_pipeline")

FLAGS = """
--to mturk|label_studio|potato  where the task is judged (required)
--task FILE!  the task
--output FOLDER!  where the files go
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate export`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_export(args: argparse.Namespace) -> int:
    """Write the files; return the exit code."""
    if args.to is None:
        raise UserError("give --to=mturk, --to=label_studio or --to=potato")
    task, folder = read_task(args.task), Path(args.output)
    items = [item for item in task.items if item.role != "qualification"]
    if len(items) < len(task.items):
        log.warning("left out: %d qualification items", len(task.items) - len(items))
    durable.make_folder(folder)
    files = _files(args.to, task, items)
    for name, content in files.items():
        write_atomic(folder / name, content)
    if not args.quiet:
        print(f"{folder}: {', '.join(files)}; {len(items)} items, {task.judges_per_item} judges "
              "each")  # fmt: skip
    return 0


def _files(to: str, task: Task, items: list[Item]) -> dict[str, str | bytes]:
    if to == "mturk":
        return {"page.html": mturk.page_html(task), "items.csv": mturk.items_csv(task, items)}
    if to == "label_studio":
        return {
            "config.xml": label_studio.config(task),
            "tasks.json": label_studio.tasks(task, items),
        }
    return {"config.yaml": potato.config(task), "items.jsonl": potato.items(task, items)}
