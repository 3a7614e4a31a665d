"""The command line: `python -m canary VERB --flag=VALUE`."""

import re
import sys

from cosmo.engine.base import terminal
from cosmo.engine.base.errors import UserError
from cosmo.tasks.errors import DataError

# Errors of what Canary stands on name gin settings, which no verb here takes: setting -> flag.
FLAGS = {
    "CHECKPOINT_PATH": "--checkpoint",
    "PROSOCIAL_PATH": "--input",
    "VOCABULARY_PATH": "--vocabulary",
    "TURN_SEPARATOR": "--turn_separator",
    "LABEL_STYLE": "--label_style",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    return terminal.guarded(lambda: _run(arguments), (UserError, DataError))


def _run(argv: list[str]) -> int | None:
    from canary import verbs

    args = verbs.parse(argv)
    terminal.set_up_logging(args.quiet, ("canary", "cosmo", "tasks"))
    terminal.set_up_jax()
    try:
        return terminal.function(verbs.VERBS[args.verb].run)(args)
    except (UserError, DataError) as error:
        raise type(error)(re.sub(r"\(gin: ([^)]*)\)", _flags, str(error))) from error


def _flags(settings: re.Match[str]) -> str:
    """`(--checkpoint)` for `(gin: MODEL_DIR, CHECKPOINT_PATH)`; without a flag as it was."""
    flags = [flag for name, flag in FLAGS.items() if re.search(rf"\b{name}\b", settings[1])]
    return f"({', '.join(flags)})" if flags else settings[0]


if __name__ == "__main__":
    terminal.tune_memory()
    sys.exit(main())
