r"""Filters, names, duplicates and statistics alone, over records that are there; asks no model.

For records that a run has left (with Canary's labels, say, which were not there before), or for
SODA as published. Works in --processes of this machine; with --runner it is an Apache Beam
pipeline (extra `pipeline`), on the DirectRunner here, on Dataflow, Flink or Spark elsewhere:
what follows -- goes to Beam.

  python -m data_pipeline postprocess --input=/tmp/soda --output=/tmp/clean --canary_labels=l.jsonl
  python -m data_pipeline postprocess --input=/tmp/soda --output=/tmp/clean --runner=DirectRunner \\
    -- --direct_num_workers=4
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cosmo.engine.base.errors import UserError
from data_pipeline.co3 import batch, corpus, prompts, report


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `postprocess`."""
    flags.description = __doc__
    flags.add_argument("--input", nargs="+", required=True, metavar="PATH", help="runs, or files")
    flags.add_argument("--output", required=True, metavar="DIR")
    flags.add_argument("--canary_labels", default="", help="JSON lines of id and label")
    flags.add_argument("--least_turns", type=int, default=4)
    flags.add_argument("--most_turns", type=int, default=20)
    flags.add_argument("--moderation_threshold", type=float, default=0.5)
    flags.add_argument("--prompts")
    flags.add_argument("--seed", type=int, default=0, help="of the names (%(default)s)")
    flags.add_argument("--processes", type=int, help="all cores if not given")
    flags.add_argument("--runner", help="Beam's: DirectRunner, DataflowRunner, ...")
    flags.add_argument("--no_parquet", action="store_true", help="leave out soda.parquet")


def run_postprocess(args: argparse.Namespace) -> int:
    """Run `postprocess`; return the exit code."""
    beams = args.rest
    _check(args, beams)
    names = ("seed", "canary_labels", "least_turns", "most_turns")
    choices = batch.Choices(
        **{name: getattr(args, name) for name in names},
        prompts=args.prompts or str(prompts.DEFAULT),
        moderation_threshold=args.moderation_threshold,
    )
    if args.runner:
        return _by_beam(args, choices, beams)
    output = Path(args.output)
    inputs = [Path(path) for path in args.input]
    if any(path.resolve() == output.resolve() for path in inputs):
        raise UserError(f"--output={output} is an input: give another folder")
    numbers, reasons = batch.clean(inputs, output, choices, args.processes or os.cpu_count() or 1)
    about = {"input": " ".join(args.input), "seed": args.seed}
    about["canary"] = args.canary_labels or None
    made = report.build(about, numbers, reasons, {}, {})
    report.write(output, made)
    corpus.parquet(output, wanted=not args.no_parquet)
    if not args.quiet:
        print(report.table(made))
    return 0


def _check(args, beams: list[str]) -> None:
    """Raises UserError for flags that would do nothing."""
    if not args.runner:
        if beams:
            raise UserError(f"{beams[0]}: what follows -- goes to Beam, which needs --runner")
        return
    if args.processes is not None:
        raise UserError(
            "--processes means nothing with --runner: give Beam's own option after --, such as "
            "-- --direct_num_workers=4"
        )
    if args.no_parquet:
        raise UserError("--no_parquet means nothing with --runner, which writes no Parquet")
    if args.prompts:
        raise UserError("--prompts means nothing with --runner, which asks no model")
    if len(args.input) > 1:
        raise UserError("--runner takes one --input: a folder, or a pattern of files in quotes")


def _by_beam(args, choices: batch.Choices, beams: list[str]) -> int:
    try:
        from apache_beam.io.filesystems import FileSystems

        from data_pipeline.co3 import beam
    except ImportError as error:
        raise UserError(
            f"{error}: install Apache Beam in an environment of its own (pip install -e "
            "'.[pipeline]'), or leave out --runner"
        ) from error
    rows = args.input[0]
    rows = rows if rows.endswith(".jsonl") else f"{rows.rstrip('/')}/soda*.jsonl"
    origins = f"{rows.rpartition('/')[0] or '.'}/provenance*.jsonl"
    ours = [f"--rows={rows}", f"--output={args.output}"]
    numbers = ("seed", "least_turns", "most_turns", "moderation_threshold")
    ours += [f"--{name}={getattr(args, name)}" for name in numbers]
    if FileSystems.match([origins])[0].metadata_list:
        ours.append(f"--provenance={origins}")
    if args.canary_labels:
        known = batch.settings_of(choices).canary  # an error is told here, not on a worker
        if known.keys() == {str(number) for number in range(len(known))}:
            raise UserError(
                f"--canary_labels={args.canary_labels} numbers rows, which a pipeline does not "
                "count: leave out --runner, or give the ids of provenance.jsonl"
            )
        ours.append(f"--canary_labels={args.canary_labels}")
    beam.main([*ours, f"--runner={args.runner}", *beams])
    if not args.quiet:
        print(
            f"{args.output}/soda-*.jsonl, provenance-*, rejected-*, statistics.json, counts.jsonl"
        )
    return 0
