"""`python -m cosmo chat`: talk to a checkpoint in the terminal."""

import argparse

from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb

GENERATION = (
    ("--temperature", "CHAT_TEMPERATURE", float, "T", "0 takes the likeliest token (1.0)"),
    ("--top_p", "CHAT_TOP_P", float, "P", "sample from the likeliest tokens of mass P (0.95)"),
    ("--max_new_tokens", "MAX_NEW_TOKENS", int, "N", "longest answer in tokens (128)"),
    ("--seed", "RANDOM_SEED", int, "N", "same seed and same lines, same talk (0)"),
)


def run(args: argparse.Namespace) -> None:
    """Chat with a checkpoint in the terminal."""
    from cosmo import chat
    from cosmo.engine.base import config

    chat.talk(config.call(chat.ChatConfig), args.situation, args.role)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `chat`."""
    parser.add_argument("--situation", metavar="TEXT", help="instead of being asked for it")
    parser.add_argument("--role", metavar="TEXT", help="instead of being asked for it")
    command_line.add_macros(parser, GENERATION)


VERB = Verb(
    help="talk to a checkpoint in the terminal",
    description="Talk to a checkpoint. It asks for a situation and a role, then answers line "
    "by line; [RESET] forgets and asks anew, [END] leaves.",
    examples="""\
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run --role="Imagine you are Maya and speak to Ivan"
""",
    run=run,
    add_arguments=add_arguments,
    gin_file="gin/runs/infer.gin",
    saved_settings=True,
    # A chat reads no task, so a run's module of tasks need not be trusted.
    reads_tasks=lambda args: False,
)
