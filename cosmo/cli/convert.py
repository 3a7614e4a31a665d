"""`python -m cosmo import` and `export`: convert checkpoints from and to other formats."""

import argparse

from cosmo.engine.base.command_line import Verb

# {on the command line: in the engine}
FORMATS = {"t5x": "t5x", "hf": "huggingface", "parlai": "parlai", "ctranslate2": "ctranslate2"}


def run_import(args: argparse.Namespace) -> None:
    """Write another system's checkpoint as one of ours, and print where it is."""
    from cosmo.engine.checkpoints import any_format, convert
    from cosmo.engine.checkpoints.interop import huggingface
    from cosmo.tasks import vocabularies

    # Found and read before the weights: a wrong file costs no conversion.
    path = args.vocabulary or any_format.open_source(args.source).vocabulary_path
    source = convert.import_checkpoint(
        args.source,
        args.output,
        format=FORMATS.get(args.format),
        vocabulary=vocabularies.load(path) if path else None,
        optimizer_state=args.optimizer_state,
        step=args.step,
        allow_nonfinite=args.allow_nonfinite,
    )
    step = source.step if args.step is None else args.step
    # Printed as the path that INITIAL_CHECKPOINT_PATH takes.
    output = args.output.rstrip("/")
    print(f"{source}: {source.parameter_count:,} parameters, now {output}/checkpoints/{step}")
    # Token ids without their vocabulary mean nothing, so the user should keep one.
    byte_tokenizer = source.description.get("byte_tokenizer")
    if byte_tokenizer:
        print(huggingface.BYTES.format(tokenizer=byte_tokenizer))
    elif path is None:
        print(
            "no vocabulary is known: --vocabulary=FILE keeps it with the checkpoint (T5's "
            "spiece.model, or BlenderBot's vocab.json beside merges.txt)"
        )


def run_export(args: argparse.Namespace) -> None:
    """Write a checkpoint in HuggingFace's, T5X's or CTranslate2's format; print where it is."""
    from cosmo.engine.checkpoints import any_format, convert
    from cosmo.tasks import vocabularies

    opened = any_format.open_source(args.checkpoint)
    path = args.vocabulary or opened.vocabulary_path
    if path:
        vocabulary = vocabularies.load(path)
        convert.check_vocabulary_of(opened, vocabulary)
        path = vocabulary.path  # a name in the package becomes a path
    source = convert.export_checkpoint(
        args.checkpoint,
        args.output,
        format=FORMATS[args.format],
        dtype=args.dtype,
        max_shard_gb=args.max_shard_gb,
        vocabulary_path=path,
        model_type=args.model_type,
    )
    where = f"{args.output}/checkpoint_{source.step}" if args.format == "t5x" else args.output
    print(f"{source}: {source.parameter_count:,} parameters, now {where}")
    # T5X's checkpoints have no place for a tokenizer, so nothing is missing there.
    if args.format != "t5x" and path is None:
        print("no tokenizer was written: no vocabulary is known (--vocabulary=FILE)")


IMPORT = Verb(
    help="turn a checkpoint of T5X, HuggingFace or ParlAI into one of ours",
    description="Turn a T5X checkpoint, a HuggingFace folder (T5, BlenderBot) or a ParlAI model "
    "(BlenderBot, the published Canary) into one of ours, tensor by tensor. The network is read "
    "from it; no gin file is needed. Memory does not grow with the model. (Training and "
    "inference also take such paths as they are.)",
    examples="""\
  python -m cosmo import --format=t5x --output=/tmp/t5_xl_lm \\
    --source=gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_xl/checkpoint_1100000
  python -m cosmo import --format=hf --source=/data/cosmo-xl --output=/tmp/cosmo_xl
  python -m cosmo import --format=parlai --source=/data/canary/model --output=/tmp/canary \\
    --vocabulary=/data/t5/spiece.model
""",
    run=run_import,
    flags="""
--format t5x|hf|parlai  format of --source (default: found out)
--source PATH!     a T5X checkpoint (checkpoint_STEP, or the folder over several: the
                   latest), local or gs://; a HuggingFace folder; or the file of a ParlAI
                   model (its .opt and .dict files beside it), or its folder
--output CKPT!     folder that gets checkpoints/STEP, for INITIAL_CHECKPOINT_PATH or
                   CHECKPOINT_PATH
--vocabulary FILE  its vocabulary, to be kept with it; the one beside it if not given
--optimizer_state  take over T5X's Adafactor state, for RESTORE_OPTIMIZER_STATE=True
--allow_nonfinite  import weights that hold NaN or infinity, which are an error otherwise
--step STEP:int    the step to count from, if not the checkpoint's own (hf, parlai: 0)
""",
)


EXPORT = Verb(
    help="write a checkpoint as a HuggingFace folder, for T5X or for CTranslate2",
    description="Write a checkpoint as a HuggingFace folder, which AutoTokenizer and "
    "AutoModelForSeq2SeqLM load, or as a T5X checkpoint, with Adafactor's state where there "
    "is one. Memory does not grow with the model. ctranslate2 (extra `ct2`) writes a folder for "
    "CTranslate2, a fast engine for processors, float32 or int8; there the weights are in memory.",
    examples="""\
  python -m cosmo export --format=hf --checkpoint=/tmp/run --output=/tmp/cosmo-hf
  python -m cosmo export --format=t5x --checkpoint=/tmp/run/checkpoints/600 --output=/tmp/t5x
  python -m cosmo export --format=ctranslate2 --dtype=int8 --checkpoint=/tmp/run --output=/tmp/ct2
""",
    run=run_export,
    flags="""
--format t5x|hf|ctranslate2!  what to write
--checkpoint CKPT!  MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP,
                    or MODEL_DIR/best of early stopping; T5X's and HuggingFace's are read
                    too
--output DIR!       the folder to make; t5x: the folder to make checkpoint_STEP in
--dtype float32|bfloat16|float16|int8=float32  of the weights. hf: float32, bfloat16 (float16 is
                    refused, with the reason); ctranslate2: float32, int8
--model_type t5|mt5|umt5  hf: the class, if not that of the folder it was imported from
--max_shard_gb GB=5.0  hf: size of a weights file
--vocabulary FILE   hf, ctranslate2: the vocabulary for the tokenizer files, if not the one that the
                    checkpoint was trained with
""",
)
