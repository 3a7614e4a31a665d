"""The command line: `python -m data_pipeline VERB --help`."""

import sys

from cosmo.engine.base import command_line
from data_pipeline import verbs


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return command_line.main(verbs.PROGRAM, argv)


def command() -> None:
    """Run the command `co3` as a process of its own."""
    sys.exit(main())


if __name__ == "__main__":
    command()
