"""Print what a study of so many votes can find, or how many an effect needs.

Standardised effects are the paper's (two samples, power and level 95%): 900 votes find 0.170.
Beside them are the items that an exact sign test needs, which counts each item once.
"""

from __future__ import annotations

import argparse
import math

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import statistics

FLAGS = """
--votes N:int  votes of the study: items times judges
--effect D:float  a standardised effect to find
--share P:float  the share of decided items that the better system wins
--power P=0.95  the chance to find it
--level P=0.05  the chance to find what is not there
"""
MIN_SHARE_GAP = 0.005  # a smaller one needs more than 100,000 items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate power`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_power(args: argparse.Namespace) -> int:
    """Print the numbers; return the exit code."""
    for name in ("power", "level"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: give a number between 0 and 1")
    rules = {"power": args.power, "level": args.level}
    votes, effect, share = args.votes, args.effect, args.share
    if votes is effect is share is None:
        votes = 900  # the paper's
    if votes is not None:
        if votes < 1:
            raise UserError(f"--votes={votes}: give 1 or more")
        found = statistics.smallest_effect(votes, **rules)
        _print_effect(f"{votes:,} votes find an effect of {found:.3f} or more", found, rules)
    if effect is not None:
        if not (math.isfinite(effect) and effect > 0):
            raise UserError(f"--effect={effect}: give more than 0")
        needed = statistics.votes_for_effect(effect, **rules)
        _print_effect(f"an effect of {effect:g} needs {needed:,} votes", effect, rules)
    if share is not None:
        # Either side may be the better one.
        share = max(share, 1 - share)
        if not 0.5 + MIN_SHARE_GAP <= share < 1:
            raise UserError(f"--share={share}: give {0.5 + MIN_SHARE_GAP} or more, below 1")
        _print_items(share, rules)
    return 0


def _print_effect(line: str, effect: float, rules: dict[str, float]) -> None:
    print(f"{line} (two samples, power {rules['power']:g}, level {rules['level']:g})")
    share = statistics.share_of_effect(effect) if effect < math.pi else 1.0
    if 0.5 + MIN_SHARE_GAP <= share < 1:
        print(f"as Cohen's h that is {100 * share:.1f} : {100 * (1 - share):.1f}")
        _print_items(share, rules)


def _print_items(share: float, rules: dict[str, float]) -> None:
    items = statistics.items_for_share(share, **rules)
    print(f"an exact sign test of items finds {100 * share:.1f} : {100 * (1 - share):.1f} with "
          f"{items:,} decided items")  # fmt: skip
