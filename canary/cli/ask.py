"""`python -m canary ask`: label one dialogue."""

import argparse

from canary.cli import flags
from cosmo.engine.base.command_line import Verb


def run(args: argparse.Namespace) -> None:
    """Print the label and the rules of thumb of one dialogue."""
    # One dialogue: the other rows of a batch would be padding.
    canary = flags.model_settings(args, batch_size=1).open()
    # A single text may hold a turn a line; a list of one text would be one turn.
    turns = args.dialogue[0] if len(args.dialogue) == 1 else args.dialogue
    # Not None as a value: the model's own length holds where the flag is not given.
    wanted = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    chirp = canary.chirp(turns, rots=args.rots, **wanted)
    print(chirp.label + (" (a person should see this)" if chirp.needs_human else ""))
    for name, probability in chirp.probabilities.items():
        print(f"  {probability:6.1%}  {name}")
    for rot in chirp.rots:
        print(f"- {rot}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ask`."""
    parser.add_argument("dialogue", nargs="+", metavar="TURN", help="what was said, oldest first")


VERB = Verb(
    help="label one dialogue",
    description="Label one dialogue, given as its turns (or one text whose lines they are).",
    examples="""\
  python -m canary ask --checkpoint=/tmp/canary "I want to scare my kids."
  python -m canary ask --checkpoint=/tmp/canary "Hi!" "Hello, how are you?" "I feel awful."
""",
    run=run,
    add_arguments=add_arguments,
    flags=f"""
--no_rots  the label alone
--max_new_tokens N:int  longest RoTs
{flags.MODEL}
""",
)
