"""Run the command line `python -m cosmo VERB --gin_file=FILE --gin.NAME=VALUE`."""

import sys

from cosmo.cli.program import PROGRAM
from cosmo.engine.base import command_line


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return command_line.main(PROGRAM, argv)


def command() -> None:
    """Run the command `cosmo` as a process of its own, with the allocator tuned."""
    # A conversion must give memory back to the system; all else runs faster with huge pages.
    converts = sys.argv[1:2] in (["import"], ["export"])
    command_line.tune_memory(command_line.SMALL_HEAP if converts else command_line.HUGE_PAGES)
    sys.exit(main())


if __name__ == "__main__":
    command()
