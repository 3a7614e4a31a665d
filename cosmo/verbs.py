"""The verbs of the command line: their flags, their help pages, and what runs them.

Loads nothing heavy, so that `--help` and a misspelled flag answer at once. A flag whose `dest` is
in capitals is a gin macro: giving it is giving `--gin.THAT_MACRO=VALUE`, after all files.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Callable

from cosmo import flags
from cosmo.engine.base import terminal


@dataclasses.dataclass(frozen=True)
class Verb:
    """`run` is "module:function" of the parsed arguments, imported only when it is called.

    `gin_file` holds the verb's defaults; None: the verb takes no gin settings. `takes_settings`:
    whether it does so with these flags. `saved_settings`: without --gin_file it reads
    MODEL_DIR/config.gin. `bindings` hold before the user's own. `environment` names a function of
    the arguments: variables to set before JAX is loaded.
    """

    help: str
    description: str
    examples: str
    run: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    gin_file: str | None = None
    takes_settings: Callable[[argparse.Namespace], bool] = lambda args: True
    saved_settings: bool = True
    bindings: tuple[str, ...] = ()
    environment: str | None = None


SETTINGS_HELP = """\
settings:
  --gin.NAME=VALUE      override a macro or a parameter (t5.T5Config.emb_dim); {gin_file}
                        and gin/defaults/ list the macros with their defaults
"""


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
        "at the very row after a stop, and needs no TensorFlow (with EVAL_PERIOD=None). A command "
        "that was stopped, even killed, goes on when it is given again; a finished one checks the "
        "files, and replaces damaged ones.",
        examples="""\
  python -m cosmo cache --gin_file=gin/cosmo/tiny.gin --output=/tmp/rows --epochs=10
  python -m cosmo cache --gin_file=gin/cosmo/cosmo_3b.gin --output=/data/cosmo_rows --epochs=4 \\
    --processes=32 --gin.SODA_PATH=data/soda --gin.PROSOCIAL_PATH=data/prosocial_dialog
  python -m cosmo cache --output=/tmp/rows --show=0,17
""",
        run="cosmo.commands:run_cache",
        add_arguments=flags.cache_arguments,
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
        add_arguments=flags.infer_arguments,
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
        add_arguments=flags.chat_arguments,
        gin_file="gin/runs/infer.gin",
    ),
    "plan": Verb(
        help="what a training step needs on a TPU slice or on GPUs, without having them",
        description="Compile the step that train would run for a TPU slice, with the real TPU "
        "compiler (extra `tpu`), or for CPU devices, and say whether it fits, what it computes and "
        "sends, and how fast it can be at best; for GPUs by arithmetic. What the settings leave "
        "open is chosen as train would. Exit code 1 if it does not fit. An INITIAL_CHECKPOINT_PATH "
        "is not needed.",
        examples="""\
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v3:4x4 --start_step=1100000
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_11b.gin --topology=v3:8x8 --json --hlo=step.txt
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v5e:4x8 --sweep
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=h100:8 --start_step=1100000
""",
        run="cosmo.planning:run_plan",
        add_arguments=flags.plan_arguments,
        gin_file="gin/runs/plan.gin",
        saved_settings=False,
        bindings=("MODEL_DIR = None", "INITIAL_CHECKPOINT_PATH = None"),
        environment="cosmo.planning:environment",
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
        add_arguments=flags.import_arguments,
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
        add_arguments=flags.export_arguments,
    ),
}


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line but for --gin.NAME=VALUE, and the parser of each verb."""
    top = terminal.Parser(
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
    return terminal.parse(top, by_verb, arguments)


def macros(args: argparse.Namespace) -> list[str]:
    """The gin bindings that were given as flags."""
    return [f"{k} = {v!r}" for k, v in vars(args).items() if k.isupper() and v is not None]
