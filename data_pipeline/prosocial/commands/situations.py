"""Read problematic situations from Social Chemistry, ETHICS and SBIC as their publishers ship them.

Writes to --output: situations.jsonl (one a line), filters.json (what each filter leaves),
quarantined.jsonl (rows that cannot be read, with file, line and reason). Situations without rules
of thumb are also in without_rules.jsonl, which `cosmo infer --input` reads. Its answers are
`prosocial make --rules`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table
from data_pipeline.prosocial import situations, statistics

log = logging.getLogger("data_pipeline")

FLAGS = """
--social_chemistry FILE  social-chem-101.v1.0.tsv
--ethics PATH  cm_train.csv, or the folder of cm_*.csv
--sbic PATH  SBIC.v2.trn.csv, or the folder of the three
--output DIR!  a new folder
--sample N:int  draw so many of all
--seed N=0  of the sample
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `prosocial situations`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_situations(args: argparse.Namespace) -> int:
    """Write the situations; return the exit code."""
    paths = {"socialchemistry": args.social_chemistry, "ethics": args.ethics, "sbic": args.sbic}
    if not any(paths.values()):
        raise UserError("give one of --social_chemistry, --ethics, --sbic")
    if args.sample is not None and args.sample < 1:
        raise UserError(f"--sample={args.sample}: give 1 or more")
    found = situations.find(paths, args.sample, args.seed)
    folder = Path(args.output)
    durable.make_folder(folder)
    write_atomic(folder / "quarantined.jsonl", json_lines.lines(map(dataclasses.asdict, found.bad)))
    write_atomic(folder / "filters.json", json.dumps(found.counts, indent=1))
    asked = [
        {"id": one.id, "narrative": "", "instruction": "", "turns": [one.text]}
        for one in found.situations
        if not one.rots
    ]
    write_atomic(folder / "without_rules.jsonl", json_lines.lines(asked))
    # Last, because the next verb reads it: the others are whole by then.
    write_atomic(folder / "situations.jsonl", situations.lines(found))
    for bad in found.bad[:3]:
        log.warning("quarantined: %s: %s", bad.id, bad.reason)
    if not args.quiet:
        head = ["source", "left after", "rows", "situations", "paper"]
        print(text_table([head, *statistics.filters(found.counts)]))
        splits = ", ".join(f"{name} {n}" for name, n in situations.split_counts(found).items())
        print(
            f"\n{folder}/situations.jsonl: {len(found.situations)} ({splits}); "
            f"{len(found.bad)} rows quarantined"
        )
    return 0
