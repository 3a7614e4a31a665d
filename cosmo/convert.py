"""`python -m cosmo import` and `export`: the command line of `cosmo.engine.checkpoints.interop`."""

import argparse

from cosmo.engine.checkpoints import any_format, convert
from cosmo.tasks import vocabularies

FORMATS = {"t5x": "t5x", "hf": "huggingface"}  # as on the command line: as in the engine


def run_import(args: argparse.Namespace) -> None:
    """Run `import`: write another system's checkpoint as one of ours."""
    path = args.vocabulary or any_format.open_source(args.source).vocabulary_path
    source = convert.import_checkpoint(
        args.source,
        args.output,
        format=FORMATS.get(args.format),
        vocabulary=vocabularies.load(path) if path else None,
        optimizer_state=args.optimizer_state,
        step=args.step,
    )
    step = source.step if args.step is None else args.step
    count = any_format.parameter_count(source.network)
    output = args.output.rstrip("/")
    print(f"{source}: {count:,} parameters, now {output}/checkpoints/{step}")
    if path is None:
        print(
            "no vocabulary is known: --vocabulary=FILE keeps it with the checkpoint (of a "
            "HuggingFace model, its spiece.model)"
        )


def run_export(args: argparse.Namespace) -> None:
    """Run `export`: write a checkpoint in HuggingFace's or T5X's format."""
    path = args.vocabulary
    if path is None:
        path = any_format.open_source(args.checkpoint).vocabulary_path
    if path is not None:
        path = vocabularies.load(path).path
    source = convert.export_checkpoint(
        args.checkpoint,
        args.output,
        format=FORMATS[args.format],
        dtype=args.dtype,
        max_shard_gb=args.max_shard_gb,
        vocabulary_path=path,
    )
    count = any_format.parameter_count(source.network)
    where = f"{args.output}/checkpoint_{source.step}" if args.format == "t5x" else args.output
    print(f"{source}: {count:,} parameters, now {where}")
    if args.format == "hf" and path is None:
        print("no tokenizer was written: no vocabulary is known (--vocabulary=FILE)")
