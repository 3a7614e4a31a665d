"""Report on each worker of a run: agreement, edits, lengths, and pay by the hour.

For staged feedback (Kim et al. 2022, appendix A): agreement is the share of safety votes that most
of the other workers gave too. Pay is by the seconds that were recorded. Workers appear by
pseudonym; --names=FILE writes which name has which, for you alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table
from data_pipeline.prosocial import make, people, statistics
from data_pipeline.prosocial.store import Store

FLAGS = """
--output DIR!  the folder of `prosocial make`
--wage N=15.0  of an hour, in your currency
--seconds_per_item N:float  where no seconds were recorded
--report FILE  the table as JSON
--names FILE  names and pseudonyms as JSON: keep it private
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `prosocial workers`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_workers(args: argparse.Namespace) -> int:
    """Print the table; return the exit code."""
    store = Store(Path(args.output))
    outcomes = [store.read(path.stem) for path in sorted((store.folder / "steps").glob("*.jsonl"))]
    if not outcomes:
        raise UserError(f"{store.folder}/steps has no step: start `prosocial make` first")
    # Quarantined dialogues were worked on too.
    records = [*outcomes[-1].records]
    records += [one for outcome in outcomes for one in outcome.rejected if "rounds" in one]
    found = statistics.workers(records)
    table = [
        ["worker", "items", "hours", "pay", "agreement", "edits/item", "words/response", "reports"]
    ]
    for name, one in sorted(found.items()):
        seconds = one["seconds"]
        if args.seconds_per_item is not None:
            seconds += args.seconds_per_item * (one["items"] - one["timed"])
        one |= {"hours": round(seconds / 3600, 3), "pay": round(args.wage * seconds / 3600, 2)}
        table.append(
            [
                name, str(one["items"]), f"{one['hours']:.2f}", f"{one['pay']:.2f}",
                _share(one["agreement"], one["votes"]), _mean(one["edits"], one["proofread"]),
                _mean(one["response_words"], one["responses"]),
                _share(one["reports"], one["validated"]),
            ]
        )  # fmt: skip
    if args.report:
        write_atomic(args.report, json.dumps(found, indent=1))
    if args.names:
        salt = store.salt()
        pairs = {people.pseudonym(judge, salt): judge for judge in store.judges()}
        write_atomic(args.names, json.dumps(pairs, indent=1, ensure_ascii=False))
    if not args.quiet:
        print(text_table(table))
        total = sum(one["pay"] for one in found.values())
        print(f"\n{len(found)} workers, {total:.2f} in all at {args.wage:g} an hour")
        done = len(outcomes)
        print(f"steps done: {done} of {max(done, len(make.steps()))}")
    return 0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _mean(total: float, number: int) -> str:
    return f"{total / number:.1f}" if number else "-"
