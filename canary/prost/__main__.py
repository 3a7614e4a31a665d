"""Run the command line `python -m canary.prost VERB --flag=VALUE`."""

import sys

from canary.prost.cli.program import PROGRAM
from cosmo.engine.base import command_line


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return command_line.main(PROGRAM, argv)


if __name__ == "__main__":
    # Huge pages: see `tune_memory` for what they bring.
    command_line.tune_memory()
    sys.exit(main())
