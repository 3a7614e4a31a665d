"""The command line: `python -m canary VERB --flag=VALUE`."""

import sys

from cosmo.engine import terminal
from cosmo.engine.errors import UserError
from tasks.errors import DataError


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    return terminal.guarded(lambda: _run(arguments), (UserError, DataError))


def _run(argv: list[str]) -> int | None:
    from canary import verbs

    args = verbs.parse(argv)
    terminal.set_up_logging(args.quiet, ("canary", "cosmo", "tasks"))
    terminal.set_up_jax()
    return terminal.function(verbs.VERBS[args.verb].run)(args)


if __name__ == "__main__":
    terminal.tune_memory()
    sys.exit(main())
