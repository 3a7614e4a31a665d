"""`python -m cosmo chat`: talk to a checkpoint in the terminal."""

import argparse

from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb


def run(args: argparse.Namespace) -> None:
    """Chat with a checkpoint in the terminal."""
    from cosmo import chat
    from cosmo.engine.base import config

    chat.talk(config.call(chat.ChatConfig), args.situation, args.role)


VERB = Verb(
    help="talk to a checkpoint in the terminal",
    description="Talk to a checkpoint. It asks for a situation and a role, then answers line "
    "by line; [RESET] clears the history, [END] leaves, in small letters too.",
    examples="""\
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run --role="Imagine you are Maya and speak to Ivan"
""",
    run=run,
    flags=f"""
--situation TEXT  instead of being asked for it
--role TEXT  instead of being asked for it
--temperature T:float -> CHAT_TEMPERATURE  0 takes the likeliest token (the run's, or 1.0)
--top_p P:float -> CHAT_TOP_P  sample from the likeliest tokens of mass P (the run's, or
  0.95)
--max_new_tokens N:int -> MAX_NEW_TOKENS  longest answer in tokens (128)
--seed N:int -> RANDOM_SEED  same seed and same lines, same talk (0)
{command_line.BACKEND_FLAG.format(macro=" -> BACKEND")}""",
    gin_file="gin/runs/infer.gin",
    saved_settings=True,
    # A chat reads no task, so a run's module of tasks need not be trusted.
    reads_tasks=lambda args: False,
)
