"""The flags of each verb. Loads nothing heavy.

A flag whose `dest` is in capitals is a gin macro: giving it is giving `--gin.THAT_MACRO=VALUE`.
"""

import argparse

from cosmo.engine.base import command_line

# Flags that are gin macros: flag, macro, type, name of the value, help with the default.
GENERATION = (
    ("--max_new_tokens", "MAX_NEW_TOKENS", int, "N", "longest answer in tokens (128)"),
    ("--temperature", "TEMPERATURE", float, "T", "above 0, sample (0.0: the likeliest token)"),
    ("--top_k", "TOP_K", int, "K", "sample from the K likeliest tokens (0: from all)"),
    ("--top_p", "TOP_P", float, "P", "sample from the likeliest tokens of mass P (1.0)"),
    ("--num_samples", "NUM_SAMPLES", int, "N", "sampled answers to each record (1)"),
    ("--beam_size", "BEAM_SIZE", int, "N", "above 1, search with so many beams (1)"),
    ("--length_penalty", "LENGTH_PENALTY", float, "A", "above 0, beams favour length (0.6)"),
    ("--seed", "RANDOM_SEED", int, "N", "a sample depends on it and on the record's id (0)"),
)
CHAT = (
    ("--temperature", "CHAT_TEMPERATURE", float, "T", "0 takes the likeliest token (1.0)"),
    ("--top_p", "CHAT_TOP_P", float, "P", "sample from the likeliest tokens of mass P (0.95)"),
    ("--max_new_tokens", "MAX_NEW_TOKENS", int, "N", "longest answer in tokens (128)"),
    ("--seed", "RANDOM_SEED", int, "N", "same seed and same lines, same talk (0)"),
)


def add_macros(parser: argparse._ActionsContainer, table) -> None:
    """Add the flags of a table such as GENERATION."""
    for flag, macro, kind, value, text in table:
        parser.add_argument(flag, dest=macro, type=kind, metavar=value, help=text)


def quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `quickstart`."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="DIR", help="(runs/quickstart)"
    )
    parser.add_argument(
        "--train_steps", type=int, default=400, metavar="N", help="(400; the recipe has 600)"
    )


def infer_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `infer`."""
    what = parser.add_argument_group("what is answered, and where the answers go")
    what.add_argument(
        "--input",
        metavar="FILE",
        help="JSON lines of {narrative, instruction, turns}, all but turns optional, also id and "
        "response; compressed (gz, bz2, xz, zst) or not. Without it the SeqIO mixture's examples "
        "are answered",
    )
    what.add_argument(
        "--output",
        metavar="PATH",
        help="FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and "
        "rejected.jsonl; without --input a folder (default: inferences/ in the run's folder)",
    )
    text = "predict (default), or score: the log-likelihood of the responses"
    add_macros(what, [("--mode", "MODE", str, "MODE", text)])

    work = parser.add_argument_group("how the work is cut")
    command_line.sharding_arguments(work, "records", "64 batches")
    add_macros(work, [("--batch_size", "INFER_BATCH_SIZE", int, "N", "records at a time (32)")])
    work.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run left at --output, and start anew",
    )
    add_macros(parser.add_argument_group("generation (greedy by default)"), GENERATION)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `chat`."""
    parser.add_argument("--situation", metavar="TEXT", help="instead of being asked for it")
    parser.add_argument("--role", metavar="TEXT", help="instead of being asked for it")
    add_macros(parser, CHAT)


def plan_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of `plan`."""
    p.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="a TPU slice in chips (v3:4x4 is a v3-32, v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:2x4), "
        "cpu:8, or by arithmetic GPUs: h100:8, h200:8, a100:8",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")
    p.add_argument(
        "--start_step",
        type=int,
        default=0,
        metavar="N",
        help="steps of TRAIN_STEPS that the starting checkpoint has done already (0)",
    )
    many = p.add_argument_group("trying many settings")
    many.add_argument(
        "--sweep", action="store_true", help="plan every combination; rank those that fit"
    )
    many.add_argument("--partitions", metavar="A,B", help="(1,2,4,8)")
    many.add_argument("--microbatches", metavar="A,B", help="(1,2)")
    many.add_argument("--remat_policies", metavar="A,B", help="(minimal,full)")


def cache_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of `cache`."""
    p.add_argument(
        "--output", required=True, metavar="DIR", help="the cache: train's --gin.CACHE_PATH"
    )
    p.add_argument(
        "--epochs",
        type=int,
        default=1,
        metavar="N",
        help="times through the mixture, each with other drops and neighbours (1)",
    )
    p.add_argument("--split", default="train", help="which split (train)")
    p.add_argument("--processes", type=int, metavar="N", help="at once (as many as cores)")
    p.add_argument(
        "--shards_per_epoch",
        type=int,
        metavar="N",
        help="files an epoch, which is what a kill can cost and processes can share (by size, 1 to "
        "16); the rows depend on it, unlike on --processes",
    )
    p.add_argument(
        "--allow_unknown",
        action="store_true",
        help="cache text of which more than 1%% of the pieces are unknown to the vocabulary",
    )
    p.add_argument("--overwrite", action="store_true", help="remove the cache that is there")
    look = p.add_argument_group("looking at a cache (no --gin_file is needed)")
    look.add_argument(
        "--show", metavar="ROW[,ROW...]", help="print the examples of these rows, from 0"
    )
    look.add_argument(
        "--vocabulary", metavar="FILE", help="if it is no longer where it was (--show)"
    )


def import_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of `import`."""
    p.add_argument(
        "--format", choices=["t5x", "hf"], help="what --source is; found out if not said"
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


def export_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    p.add_argument("--format", choices=["t5x", "hf"], required=True, help="what to write")
    p.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP, or MODEL_DIR/"
        "best of early stopping; T5X's and HuggingFace's are read too",
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
