"""Print dialogues of SODA or ProsocialDialog, drawn by seed: `python -m tools.show_dialogues PATH`.

SODA's come with narrative and speakers, as in table 1 of Kim et al. 2023. ProsocialDialog's come
with the label and rules of thumb of each context, as in tables 6 and 7 of Kim et al. 2022.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks import readers
from cosmo.tasks.dialogues import ProsocialDialogue, SodaDialogue
from cosmo.tasks.files import files_for_split
from cosmo.tasks.recognize import PROSOCIAL, looks_like


def drawn(dialogues: Iterable[Any], count: int, seed: int) -> list[Any]:
    """Return `count` dialogues by a seeded hash of their ids; all if there are fewer."""
    return heapq.nsmallest(
        count, dialogues, key=lambda one: (fraction_bits(seed, "sample", one.id), one.id)
    )


def soda_lines(one: SodaDialogue) -> Iterator[str]:
    """Yield the lines of a dialogue of SODA."""
    yield f"{one.id}: {one.narrative}"
    for speaker, text in zip(one.speakers, one.dialogue, strict=True):
        yield f"  {speaker}: {text}"


def prosocial_lines(one: ProsocialDialogue) -> Iterator[str]:
    """Yield the lines of a dialogue of ProsocialDialog."""
    yield one.id
    for turn in one.turns:
        yield f"  A: {turn.context}"
        yield f"     {turn.safety_label}"
        for rot in turn.rots:
            yield f"     RoT: {rot}"
        yield f"  B: {turn.response}"


def main(argv: list[str] | None = None) -> int:
    """Print the dialogues; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.show_dialogues",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a file, or a folder of splits")
    parser.add_argument("--split", default="test", help="of a folder (%(default)s)")
    parser.add_argument("--items", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--width", type=int, default=100, help="of a line (%(default)s)")
    args = parser.parse_args(argv)
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Print the dialogues; return the exit code."""
    if args.items < 1 or args.width < 20:
        raise UserError(f"--items={args.items} --width={args.width}: give 1 and 20 or more")
    corpus = looks_like(files_for_split(args.path, args.split)[0])
    if corpus == "SODA":
        found, lines = readers.read_soda(args.path, args.split), soda_lines
    elif corpus in PROSOCIAL:
        found, lines = readers.read_prosocial(args.path, args.split), prosocial_lines
    else:
        raise DataError.at(
            args.path, None, "neither SODA nor ProsocialDialog", got=corpus or "nothing known",
            expected="one of the two", remedy="Correct the path.",
        )  # fmt: skip
    for number, one in enumerate(drawn(found, args.items, args.seed)):
        if number:
            print()
        for line in lines(one):
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            print(textwrap.fill(line, args.width, subsequent_indent=indent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
