"""Merge the outputs of several --shard=i/n into those of one run.

Shards that are missing, given twice, overlapping or made with other settings are an error. The
shards' journals stay in their folders, where a shard can be resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cosmo.engine.base.errors import UserError
from data_pipeline.co3 import merge, report, schema


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `merge`."""
    flags.description = __doc__
    flags.add_argument("--inputs", type=Path, nargs="+", required=True, metavar="DIR")
    flags.add_argument("--output", type=Path, required=True)
    flags.add_argument("--no_parquet", action="store_true", help="leave out soda.parquet")


def run_merge(args: argparse.Namespace) -> int:
    """Run `merge`; return the exit code."""
    # Before anything is written: the result would replace a shard.
    if args.output.resolve() in [folder.resolve() for folder in args.inputs]:
        raise UserError(f"--output={args.output} is an input: give another folder")
    made = merge.merge(args.inputs, args.output)
    schema.write_parquet(args.output, wanted=not args.no_parquet)
    if not args.quiet:
        print(report.table(made))
    return 0
