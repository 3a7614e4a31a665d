"""`python -m canary.prost reply`: answer one dialogue."""

import argparse

from canary.cli.flags import decoding_fields
from canary.prost.cli import flags
from cosmo.engine.base.command_line import Verb


def run(args: argparse.Namespace) -> None:
    """Print the reply to one dialogue, and the rules of thumb that it follows."""
    from canary.prost import bulk_replies

    prost = flags.open_prost(args)
    # A single text may hold a turn a line; a list of one text would be one turn.
    turns = args.dialogue[0] if len(args.dialogue) == 1 else args.dialogue
    reply = prost.reply(turns, rots=args.rot, seed=args.seed, **decoding_fields(args))
    print(bulk_replies.of(prost, reply, None if args.rot is None else "your"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of the dialogue, and the rules of thumb: the table has no repeated flag."""
    parser.add_argument("dialogue", nargs="+", metavar="TURN", help="what was said, oldest first")
    parser.add_argument(
        "--rot",
        action="append",
        metavar="TEXT",
        help="a rule of thumb to follow, instead of Canary's or the model's own; may be repeated",
    )


VERB = Verb(
    help="answer one dialogue",
    description="Answer one dialogue, given as its turns (or one text whose lines they are).",
    examples="""\
  python -m canary.prost reply --checkpoint=/tmp/prost "I want to scare my kids."
  python -m canary.prost reply --checkpoint=/tmp/prost --canary=/tmp/canary "I feel awful."
  python -m canary.prost reply --checkpoint=/tmp/prost --rot="It's kind to ask why." "I'm angry."
""",
    run=run,
    add_arguments=add_arguments,
    flags=f"{flags.MODEL}{flags.CANARY}\n{flags.GENERATION}",
)
