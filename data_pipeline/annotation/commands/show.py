"""Print contexts with the responses of several systems below each other.

Table 12 of the SODA paper is such a print. Contexts come from --contexts, or else from the inputs
of the predictions.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import pairs
from data_pipeline.annotation.model_judge import conversation

FLAGS = """
--contexts FILE  lines {id, turns, narrative} (default: the inputs of the predictions)
--turn_mark TEXT  stands between turns in the predictions' inputs (default: <turn>, // or a newline)
--items N=3  how many contexts
--seed N=0  of the sample
--width N=100  characters a line
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate show`."""
    parser.description = __doc__
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE")
    add_flags(parser, FLAGS)


def run_show(args: argparse.Namespace) -> int:
    """Print the contexts; return the exit code."""
    if args.items < 1 or args.width < 20:
        raise UserError(f"--items={args.items} --width={args.width}: give 1 and 20 or more")
    files = {path: pairs.read_predictions(path) for path in args.predictions}
    contexts = pairs.contexts_of(files, args.contexts, args.turn_mark)
    by_id = {one.id: one for one in contexts}
    for number, name in enumerate(pairs.sample(by_id, args.items, args.seed)):
        one = by_id[name]
        lines = [f"{name}: {one.narrative}"] if one.narrative else [name]
        lines += conversation(one.turns, ("A", "B"), one.speakers).splitlines()
        first = next(iter(files.values()))[name]
        if first.target:
            lines.append(f"  reference: {first.target}")
        lines += [f"  {Path(path).stem}: {found[name].prediction}" for path, found in files.items()]
        if number:
            print()
        for line in lines:
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            print(textwrap.fill(line, args.width, subsequent_indent=indent))
    return 0
