"""The verbs of the command line: their flags, their help pages, and what runs them.

Loads nothing heavy, so that `--help` and a misspelled flag answer at once. A flag whose `dest` is
in capitals is a gin macro: giving it is giving `--gin.THAT_MACRO=VALUE`, after all files.
"""

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Callable
from typing import NoReturn


@dataclasses.dataclass(frozen=True)
class Verb:
    """`run` is "module:function" of the parsed arguments, imported only when it is called.

    `gin_file` holds the verb's defaults; None: the verb takes no gin settings. `takes_settings`:
    whether it does so with these flags. `saved_settings`: without --gin_file it reads
    MODEL_DIR/config.gin.
    """

    help: str
    description: str
    examples: str
    run: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    gin_file: str | None = None
    takes_settings: Callable[[argparse.Namespace], bool] = lambda args: True
    saved_settings: bool = True


SETTINGS_HELP = """\
settings:
  --gin.NAME=VALUE      override a macro or a parameter (t5.T5Config.emb_dim); {gin_file}
                        and gin/defaults/ list the macros with their defaults
"""


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


def _add_macros(parser: argparse._ActionsContainer, table) -> None:
    for flag, macro, kind, value, text in table:
        parser.add_argument(flag, dest=macro, type=kind, metavar=value, help=text)


def _infer_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is answered, and where the answers go")
    what.add_argument(
        "--input",
        metavar="FILE",
        help="JSON lines of {narrative, instruction, turns}, all but turns optional, also id and "
        "response; plain or .gz. Without it the SeqIO mixture's examples are answered",
    )
    what.add_argument(
        "--output",
        metavar="PATH",
        help="FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and "
        "rejected.jsonl; without --input a folder (default: inferences/ in the run's folder)",
    )
    text = "predict (default), or score: the log-likelihood of the responses"
    _add_macros(what, [("--mode", "MODE", str, "MODE", text)])

    work = parser.add_argument_group("how the work is cut")
    work.add_argument("--num_shards", type=int, default=1, metavar="N", help="output files (1)")
    work.add_argument(
        "--shards",
        metavar="LIST",
        help="the shards that this command takes, such as 0-3 or 2,5 (default: all); several "
        "commands may share one output",
    )
    work.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="records between saves, which is what a kill can cost (default: 64 batches)",
    )
    _add_macros(work, [("--batch_size", "INFER_BATCH_SIZE", int, "N", "records at a time (32)")])
    work.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run left at --output, and start anew",
    )
    _add_macros(parser.add_argument_group("generation (greedy by default)"), GENERATION)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--situation", metavar="TEXT", help="instead of being asked for it")
    parser.add_argument("--role", metavar="TEXT", help="instead of being asked for it")
    _add_macros(parser, CHAT)


def _cache_arguments(p: argparse.ArgumentParser) -> None:
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
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)


def _import_arguments(p: argparse.ArgumentParser) -> None:
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


def _export_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--format", choices=["t5x", "hf"], required=True, help="what to write")
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


VERBS = {
    "train": Verb(
        help="train, or go on from the latest checkpoint in MODEL_DIR",
        description="Train a model, or go on from the latest checkpoint in MODEL_DIR. MODEL_DIR "
        "then holds checkpoints, metrics.jsonl, TensorBoard files and config.gin.",
        examples="""\
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run \\
    --gin.TRAIN_STEPS=1200 --gin.BATCH_SIZE=32 --gin.DROPOUT_RATE=0.1
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run2 \\
    --gin.CACHE_PATH=/tmp/rows
""",
        run="cosmo.commands:run_train",
        gin_file="gin/runs/train.gin",
        saved_settings=False,
    ),
    "cache": Verb(
        help="write a mixture's packed rows to files, to train from without SeqIO",
        description="Run a mixture through SeqIO and write its packed rows to files. Training from "
        "them (--gin.CACHE_PATH) reads many times faster, in a globally shuffled order, goes on "
        "at the very row after a stop, and needs no TensorFlow. A command that was stopped, even "
        "killed, goes on when it is given again; a finished one checks the files, and replaces "
        "damaged ones.",
        examples="""\
  python -m cosmo cache --gin_file=gin/cosmo/tiny.gin --output=/tmp/rows --epochs=10
  python -m cosmo cache --gin_file=gin/cosmo/cosmo_3b.gin --output=/data/cosmo_rows --epochs=4 \\
    --processes=32 --gin.SODA_PATH=data/soda --gin.PROSOCIAL_PATH=data/prosocial_dialog
  python -m cosmo cache --output=/tmp/rows --show=0,17
""",
        run="cosmo.commands:run_cache",
        add_arguments=_cache_arguments,
        gin_file="gin/runs/cache.gin",
        takes_settings=lambda args: not args.show,
        saved_settings=False,
    ),
    "eval": Verb(
        help="measure a checkpoint on validation data",
        description="Measure a checkpoint on every task of its mixture: prints a table, writes "
        "metrics.json and the answers (to eval/ in the run's folder, or EVAL_OUTPUT_DIR).",
        examples="""\
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run --gin.EVAL_SPLIT=test \\
    --gin.EVAL_NUM_EXAMPLES=100 --gin.CHECKPOINT_PATH=/tmp/run/checkpoints/60
""",
        run="cosmo.commands:run_eval",
        gin_file="gin/runs/eval.gin",
    ),
    "infer": Verb(
        help="answer records (--input), or a SeqIO mixture's examples, as JSON lines",
        description="Answer records, or score their responses. A command that was stopped, even "
        "killed, goes on when it is given again; a finished one says so.",
        examples="""\
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl --output=answers.jsonl
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl.gz --output=answers \\
    --num_shards=8 --shards=0-3 --batch_size=64 --temperature=1.0 --top_p=0.95 --seed=1
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --mode=score
""",
        run="cosmo.commands:run_infer",
        add_arguments=_infer_arguments,
        gin_file="gin/runs/infer.gin",
    ),
    "chat": Verb(
        help="talk to a checkpoint in the terminal",
        description="Talk to a checkpoint. It asks for a situation and a role, then answers line "
        "by line; [RESET] forgets and asks anew, [END] leaves.",
        examples="""\
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run --role="Imagine you are Maya and speak to Ivan"
""",
        run="cosmo.commands:run_chat",
        add_arguments=_chat_arguments,
        gin_file="gin/runs/infer.gin",
    ),
    "import": Verb(
        help="turn a T5X checkpoint or a HuggingFace folder into one of ours",
        description="Turn a T5X checkpoint or a HuggingFace T5 folder into one of ours, "
        "tensor by tensor. The network is read from it; no gin file is needed. Memory does not "
        "grow with the model. (Training and inference also take such paths as they are.)",
        examples="""\
  python -m cosmo import --format=t5x --output=/tmp/t5_xl_lm \\
    --source=gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_xl/checkpoint_1100000
  python -m cosmo import --format=hf --source=/data/cosmo-xl --output=/tmp/cosmo_xl
""",
        run="cosmo.convert:run_import",
        add_arguments=_import_arguments,
    ),
    "export": Verb(
        help="write a checkpoint as a HuggingFace folder, or as T5X restores it",
        description="Write a checkpoint as a HuggingFace folder, which AutoTokenizer and "
        "AutoModelForSeq2SeqLM load, or as a T5X checkpoint, with Adafactor's state where there "
        "is one. Memory does not grow with the model.",
        examples="""\
  python -m cosmo export --format=hf --checkpoint=/tmp/run --output=/tmp/cosmo-hf
  python -m cosmo export --format=t5x --checkpoint=/tmp/run/checkpoints/600 --output=/tmp/t5x
""",
        run="cosmo.convert:run_export",
        add_arguments=_export_arguments,
    ),
}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line but for --gin.NAME=VALUE, and the parser of each verb."""
    top = _Parser(
        prog="python -m cosmo",
        description="Train, evaluate and question dialogue models.",
        epilog="python -m cosmo VERB --help shows a verb's flags, defaults and examples.",
        allow_abbrev=False,
    )
    choices = top.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    by_verb = {}
    for name, verb in VERBS.items():
        settings = SETTINGS_HELP.format(gin_file=verb.gin_file) + "\n" if verb.gin_file else ""
        sub = choices.add_parser(
            name,
            help=verb.help,
            description=textwrap.fill(verb.description, 80),
            epilog=f"{settings}examples:\n{verb.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(sub)
        if verb.gin_file:
            without = "MODEL_DIR/config.gin, which train leaves there"
            sub.add_argument(
                "--gin_file",
                action="append",
                default=[],
                metavar="FILE",
                help="an experiment, such as gin/cosmo/tiny.gin; several may be given, later ones "
                "win" + (f" (default: {without})" if verb.saved_settings else ""),
            )
            sub.add_argument("--gin_search_paths", default="", metavar="A,B",
                             help="folders where gin files are looked for too")  # fmt: skip
            sub.add_argument(
                "--distributed",
                action="store_true",
                help="one of several processes: a TPU pod, Slurm, or JAX_COORDINATOR_ADDRESS is "
                "set",
            )
        sub.set_defaults(distributed=False)
        sub.add_argument("--quiet", action="store_true", help="log warnings and errors only")
        by_verb[name] = sub
    return top, by_verb


def parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed command line; a mistake is one line on stderr and exit code 2."""
    top, by_verb = parser()
    args, unknown = top.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = list(by_verb[args.verb]._option_string_actions)
        near = difflib.get_close_matches(flag, known, 1)
        others = [v for v, sub in by_verb.items() if flag in sub._option_string_actions]
        hint = f"; did you mean {near[0]}?" if near else ""
        hint = f"; it belongs to {' and '.join(others)}" if others else hint
        by_verb[args.verb].error(f"{args.verb} does not know {flag}{hint}")
    return args


def macros(args: argparse.Namespace) -> list[str]:
    """The gin bindings that were given as flags."""
    return [f"{k} = {v!r}" for k, v in vars(args).items() if k.isupper() and v is not None]
