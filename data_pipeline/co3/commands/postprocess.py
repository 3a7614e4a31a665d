r"""Filters, names, duplicates and statistics alone, over a finished corpus; no model is asked.

For the records of a run, with Canary's labels for instance, or for the published SODA. It works
in --processes of this machine. With --runner it is an Apache Beam pipeline
(extra `pipeline`): on the DirectRunner here, on Dataflow, Flink or Spark elsewhere. Arguments after
-- go to Beam. Both leave the same bytes. Beam's workers read --input and write to --output, so both
must lie where all machines reach them.

  python -m data_pipeline postprocess --input=/tmp/soda --output=/tmp/clean --canary_labels=l.jsonl
  python -m data_pipeline postprocess --input=/tmp/soda --output=/tmp/clean --runner=DirectRunner \\
    -- --direct_num_workers=4
"""

from __future__ import annotations

import argparse

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import resolve
from cosmo.engine.base.worker_processes import usable_cores
from data_pipeline.co3 import clean, report, schema
from data_pipeline.co3.postprocess import Settings


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `postprocess`."""
    flags.description = __doc__
    flags.add_argument("--input", nargs="+", required=True, metavar="PATH", help="runs, or files")
    flags.add_argument("--output", required=True, metavar="DIR")
    flags.add_argument("--canary_labels", help="JSON lines of id and label")
    flags.add_argument("--least_turns", type=int, default=4)
    flags.add_argument("--most_turns", type=int, default=20)
    flags.add_argument("--moderation_threshold", type=float, default=0.5)
    flags.add_argument("--seed", type=int, default=0, help="of the names (%(default)s)")
    flags.add_argument("--processes", type=int, help="default: one for each core")
    flags.add_argument("--runner", help="Beam's: DirectRunner, DataflowRunner, ...")
    flags.add_argument("--no_parquet", action="store_true", help="leave out soda.parquet")


def run_postprocess(args: argparse.Namespace) -> int:
    """Run `postprocess`; return the exit code."""
    # Ignored options would leave the user with another run than was meant.
    if args.rest and not args.runner:
        raise UserError(f"{args.rest[0]}: arguments after -- go to Beam, which needs --runner")
    # Beam counts its own workers, so this flag would change nothing.
    if args.runner and args.processes is not None:
        raise UserError(
            "--processes is not for --runner: give Beam's own option after --, such as "
            "-- --direct_num_workers=4"
        )
    output = resolve(args.output)
    # The result would replace the rows that it is made from.
    if str(output.absolute()) in [str(resolve(path).absolute()) for path in args.input]:
        raise UserError(f"--output={output} is an input: give another folder")
    numbers = ("seed", "least_turns", "most_turns", "moderation_threshold")
    settings = Settings(**{name: getattr(args, name) for name in numbers})
    processes = args.processes or usable_cores()
    executor = clean.executor(args.runner, args.rest, processes)
    made = report.build(
        {"input": " ".join(args.input), "seed": args.seed, "canary": args.canary_labels},
        *clean.clean(args.input, output, settings, executor, args.canary_labels, processes),
        {},
        {},
    )
    report.write(output, made)
    schema.write_parquet(output, wanted=not args.no_parquet)
    if not args.quiet:
        print(report.table(made))
    return 0
