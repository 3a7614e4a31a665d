"""List all verbs of `python -m canary.prost`."""

from canary.prost.cli import chat, demo, evaluate, infer, reply
from cosmo.engine.base.command_line import Program
from cosmo.tasks.prost_corpora import SOURCES

PROGRAM = Program(
    name="canary.prost",
    description="Responses that follow rules of thumb.",
    verbs={
        "reply": reply.VERB,
        "chat": chat.VERB,
        "infer": infer.VERB,
        "eval": evaluate.VERB,
        "demo": demo.VERB,
    },
    loggers=("canary", "cosmo", "tasks"),
    flags={
        "CHECKPOINT_PATH": "--checkpoint",
        "VOCABULARY_PATH": "--vocabulary",
        "PROST_VARIANT": "--variant",
        **dict.fromkeys((source[2] for source in SOURCES.values()), "--data"),
    },
)
