"""`python -m cosmo import` and `export`: the command line of `cosmo.engine.interop`."""

import argparse

from etils import epath

from cosmo.engine.interop import convert, sources, tokenizer
from tasks import vocabularies

FORMATS = {"t5x": "t5x", "hf": "huggingface"}  # as on the command line: as in the engine


def add_import_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of `import`."""
    p.add_argument(
        "--format", choices=list(FORMATS), help="what --source is; found out if not said"
    )
    p.add_argument(
        "--source",
        required=True,
        metavar="PATH",
        help="a T5X checkpoint (checkpoint_STEP, or the folder over several: the latest), local or "
        "gs://, or a HuggingFace folder",
    )
    p.add_argument(
        "--output",
        required=True,
        metavar="CKPT",
        help="folder that gets checkpoints/STEP, for INITIAL_CHECKPOINT_PATH or CHECKPOINT_PATH",
    )
    p.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="its SentencePiece model, to be kept with it; a HuggingFace folder's own if not given",
    )
    p.add_argument(
        "--optimizer_state",
        action="store_true",
        help="take over T5X's Adafactor state, for RESTORE_OPTIMIZER_STATE=True",
    )
    p.add_argument(
        "--step", type=int, help="the step to count from, if not the checkpoint's own (hf: 0)"
    )


def run_import(args: argparse.Namespace) -> None:
    """`import`: another system's checkpoint to one of ours."""
    path = args.vocabulary
    if path is None and (epath.Path(args.source) / tokenizer.SPIECE).exists():
        path = str(epath.Path(args.source) / tokenizer.SPIECE)
    source = convert.import_checkpoint(
        args.source,
        args.output,
        format=FORMATS.get(args.format),
        vocabulary=vocabularies.load(path) if path else None,
        optimizer_state=args.optimizer_state,
        step=args.step,
    )
    step = source.step if args.step is None else args.step
    count = sources.parameter_count(source.network)
    print(f"{source}: {count:,} parameters, now {args.output}/checkpoints/{step}")
    if path is None:
        print("no vocabulary is known; --vocabulary=FILE would keep it with the checkpoint")


def add_export_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    p.add_argument("--format", choices=list(FORMATS), required=True, help="what to write")
    p.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="MODEL_DIR of a run (its latest checkpoint) or MODEL_DIR/checkpoints/STEP; T5X's and "
        "HuggingFace's are read too",
    )
    p.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="hf: the folder to make; t5x: the folder to make checkpoint_STEP in",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="hf: of the weights; float16 is refused, with the reason (default float32)",
    )
    p.add_argument(
        "--max_shard_gb", type=float, default=5.0, help="hf: size of a weights file (default 5)"
    )
    p.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="hf: the SentencePiece model for the tokenizer files, if not the one that the "
        "checkpoint was trained with",
    )


def run_export(args: argparse.Namespace) -> None:
    """`export`: a checkpoint to HuggingFace's or T5X's format."""
    path = args.vocabulary
    if args.format == "hf" and path is None:
        source = sources.open_source(args.checkpoint)
        path = source.description.get("vocabulary", {}).get("path")
    if path is not None:
        path = vocabularies.load(path).path
    source = convert.export_checkpoint(
        args.checkpoint,
        args.output,
        format=FORMATS[args.format],
        dtype=args.dtype,
        max_shard_gb=args.max_shard_gb,
        vocabulary_path=path if args.format == "hf" else None,
    )
    count = sources.parameter_count(source.network)
    where = f"{args.output}/checkpoint_{source.step}" if args.format == "t5x" else args.output
    print(f"{source}: {count:,} parameters, now {where}")
    if args.format == "hf" and path is None:
        print("no tokenizer was written: no vocabulary is known (--vocabulary=FILE)")
