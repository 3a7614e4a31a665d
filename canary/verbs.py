"""The verbs of `python -m canary`: their flags, their help pages, and what runs them.

Loads nothing heavy, so that `--help` and a misspelled flag answer at once.
"""

import argparse

from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Program, Verb


def label_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `label`."""
    what = parser.add_argument_group("what is labelled, and where the labels go")
    what.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="SODA rows (JSON lines or Parquet), ProsocialDialog rows or its direct download, "
        "{turns} records (JSON lines), or DailyDialog's text; which it is, is found out; "
        "compressed (gz, bz2, xz, zst) or not",
    )
    what.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and "
        "rejected.jsonl",
    )
    what.add_argument(
        "--per_turn",
        action="store_true",
        help="label the dialogue as it was after each of its turns, in one line",
    )
    what.add_argument(
        "--no_rots",
        dest="rots",
        action="store_false",
        help="labels and probabilities alone, which is several times as fast",
    )
    model_arguments(parser)
    work = parser.add_argument_group("how the work is cut")
    work.add_argument("--batch_size", type=int, default=32, metavar="N", help="at a time (32)")
    command_line.sharding_arguments(work, "dialogues", "about 64 batches")
    work.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run left at --output, and start anew",
    )
    generation_arguments(parser)


def generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how rules of thumb are written."""
    group = parser.add_argument_group("rules of thumb (greedy by default)")
    number = group.add_argument
    number("--max_new_tokens", type=int, metavar="N", help="longest (the model's targets)")
    number("--temperature", type=float, metavar="T", help="above 0, sample (0.0)")
    number("--top_k", type=int, metavar="K", help="sample from the K likeliest (0: from all)")
    number("--top_p", type=float, metavar="P", help="sample from the likeliest of mass P (1.0)")
    number("--beam_size", type=int, metavar="N", help="above 1, search with so many beams (1)")
    number("--length_penalty", type=float, metavar="A", help="above 0, beams favour length (0.6)")
    number("--seed", type=int, default=0, metavar="N", help="of samples (0)")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the model that answers."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP, "
        "MODEL_DIR/best (of a run with early stopping), or a HuggingFace or T5X folder",
    )
    group.add_argument("--vocabulary", metavar="FILE", help="if none is kept with the checkpoint")
    group.add_argument(
        "--label_style",
        choices=["text", "sentinel"],
        help="how the model writes labels (default: the run's own, or text)",
    )
    group.add_argument(
        "--turn_separator",
        metavar="TEXT",
        help='what the model reads between turns (default: the run\'s own, or " // ")',
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of products (float32 on a CPU, else bfloat16); on a CPU with AMX bfloat16 is more "
        "than twice as fast",
    )
    group.add_argument(
        "--num_partitions", type=int, default=1, metavar="N", help="devices a model copy (1)"
    )


def ask_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `ask`."""
    parser.add_argument("dialogue", nargs="+", metavar="TURN", help="what was said, oldest first")
    parser.add_argument("--no_rots", dest="rots", action="store_false", help="the label alone")
    model_arguments(parser)
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest RoTs")


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `eval`."""
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="ProsocialDialog: a file, or a folder with train*, validation* and test* files",
    )
    parser.add_argument("--split", default="test", help="which split of a folder (test)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="gets metrics.json and predictions.jsonl (default: canary_eval/ in the run's folder)",
    )
    parser.add_argument("--num_examples", type=int, metavar="N", help="only so many (all)")
    model_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="at a time (32)")
    generation_arguments(parser)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    parser.add_argument(
        "--output",
        default="runs/canary_demo",
        metavar="DIR",
        help="gets the run; emptied first if it holds an earlier demo (runs/canary_demo)",
    )
    parser.add_argument(
        "--train_steps", type=int, metavar="N", help="instead of the recipe's TRAIN_STEPS"
    )


VERBS = {
    "label": Verb(
        help="label every dialogue of a file, of any size",
        description="Write a safety label, its probabilities and the rules of thumb that apply for "
        "every dialogue of a file. A ProsocialDialog file gives a line for each row: the dialogue "
        "up to the row's context. A command that was stopped, even killed, goes on when it is "
        "given again; records that cannot be used are set aside with the reason.",
        examples="""\
  python -m canary label --checkpoint=/tmp/canary --input=dialogues.jsonl --output=labels.jsonl
  python -m canary label --checkpoint=/tmp/canary --input=soda.jsonl.gz --output=/tmp/labels \\
    --num_shards=8 --shards=0-3 --batch_size=64 --no_rots
  python -m canary label --checkpoint=/tmp/canary --input=dialogues_text.txt \\
    --output=turns.jsonl --per_turn
""",
        run="canary.labels:run_label",
        add_arguments=label_arguments,
    ),
    "ask": Verb(
        help="label one dialogue",
        description="Label one dialogue, given as its turns (or one text whose lines they are).",
        examples="""\
  python -m canary ask --checkpoint=/tmp/canary "I want to scare my kids."
  python -m canary ask --checkpoint=/tmp/canary "Hi!" "Hello, how are you?" "I feel awful."
""",
        run="canary.labels:run_ask",
        add_arguments=ask_arguments,
    ),
    "eval": Verb(
        help="measure a checkpoint on ProsocialDialog",
        description="Measure labels and rules of thumb on every row of ProsocialDialog, with the "
        "paper's rows beside: prints a table, writes metrics.json and predictions.jsonl.",
        examples="""\
  python -m canary eval --checkpoint=/tmp/canary --input=data/prosocial_dialog --split=test
  python -m canary eval --checkpoint=/tmp/canary --input=test.jsonl --num_examples=100
""",
        run="canary.evaluation:run_eval",
        add_arguments=eval_arguments,
    ),
    "demo": Verb(
        help="train a small Canary on the bundled sample and measure it, offline",
        description="Train gin/canary/canary_tiny.gin on the sample that comes with the "
        "repository, a few minutes on a laptop, measure it on held-out dialogues beside the most "
        "frequent answer, and show three of them. Run it from the repository's root. The exit code "
        "is 1 if the model has not learnt.",
        examples="""\
  python -m canary demo
  python -m canary demo --output=/tmp/demo
""",
        run="canary.demo:run_demo",
        add_arguments=demo_arguments,
    ),
}

PROGRAM = Program(
    name="canary",
    description="Safety labels and rules of thumb for dialogues.",
    verbs=VERBS,
    loggers=("canary", "cosmo", "tasks"),
    # Settings of what Canary stands on, which no verb here takes by these names.
    flags={
        "CHECKPOINT_PATH": "--checkpoint",
        "PROSOCIAL_PATH": "--input",
        "VOCABULARY_PATH": "--vocabulary",
        "TURN_SEPARATOR": "--turn_separator",
        "LABEL_STYLE": "--label_style",
    },
)
