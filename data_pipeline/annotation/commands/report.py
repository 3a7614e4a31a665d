"""Report the answers to a task: votes, agreement, tests, judges, models, the papers' tables.

People's and models' votes are never added up. With --min_gold=0.7, people with less than this share
of right gold answers are left out, and those who failed the qualification. The report names them,
and has the votes before and after. With --output it writes report.json, report.txt,
quarantined.jsonl (lines that cannot be used, with reasons) and plots of comparisons.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import report, report_text
from data_pipeline.annotation.answers import write_quarantined
from data_pipeline.annotation.commands import common

log = logging.getLogger("data_pipeline")

FLAGS = """
--task FILE!  the task
--output FOLDER  where report.json, report.txt, plots and quarantined.jsonl go
--seed N=0  of the bootstrap
--min_gold SHARE:float  leave out people with fewer right gold answers, or not qualified
--json  print JSON
--no_plots  leave out the plots
--strict  exit code 1 if a line was set aside
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate report`."""
    parser.description = __doc__
    parser.add_argument("--answers", nargs="+", required=True, metavar="FILE")
    add_flags(parser, FLAGS)


def run_report(args: argparse.Namespace) -> int:
    """Print and write the report; return the exit code."""
    if importlib.util.find_spec("krippendorff") is None:
        raise UserError("krippendorff is not installed: pip install -e '.[stats]'")
    task, answers = common.task_and_answers(args)
    made = report.build(task, answers, args.seed, min_gold=args.min_gold)
    printed = report_text.text(made)
    if args.output:
        folder = Path(args.output)
        durable.make_folder(folder)
        write_atomic(folder / "report.json", json.dumps(made, indent=1) + "\n")
        write_atomic(folder / "report.txt", printed)
        write_quarantined(folder / "quarantined.jsonl", answers.quarantined)
        if args.plots:
            _plot(made, folder)
    print(json.dumps(made, indent=1) if args.json else printed, end="")
    for one in answers.quarantined[:5]:
        log.warning("set aside: %s:%d: %s", one.file, one.line, one.reason)
    return 1 if args.strict and answers.quarantined else 0


def _plot(made: dict, folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no plots: matplotlib is not installed (pip install -e '.[plot]')")
        return
    from data_pipeline.annotation import plots

    for path in plots.draw(made, folder):
        log.info("%s", path)
