"""Run the command line `python -m canary VERB --flag=VALUE`."""

import sys

from canary.cli.program import PROGRAM
from cosmo.engine.base import command_line


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return command_line.main(PROGRAM, argv)


def command() -> None:
    """Run the command `canary` as a process of its own, with the allocator tuned."""
    # Huge pages: see `tune_memory` for what they bring.
    command_line.tune_memory()
    sys.exit(main())


if __name__ == "__main__":
    command()
