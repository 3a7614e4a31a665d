"""List all verbs of `python -m canary`."""

from canary.cli import ask, demo, evaluate, guard, label, toxichat
from cosmo.engine.base.command_line import Program

PROGRAM = Program(
    name="canary",
    description="Safety labels and rules of thumb for dialogues.",
    verbs={
        "label": label.VERB,
        "ask": ask.VERB,
        "eval": evaluate.VERB,
        "guard": guard.VERB,
        "toxichat": toxichat.VERB,
        "demo": demo.VERB,
    },
    loggers=("canary", "cosmo", "tasks"),
    # Settings that the engine and the tasks name, and that no verb here takes by these names.
    flags={
        "CHECKPOINT_PATH": "--checkpoint",
        "PROSOCIAL_PATH": "--input",
        "VOCABULARY_PATH": "--vocabulary",
    },
)
