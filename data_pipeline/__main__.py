"""The command line: `python -m data_pipeline VERB --help`."""

import sys

from cosmo.engine.base import command_line
from data_pipeline import verbs


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return command_line.main(verbs.PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
