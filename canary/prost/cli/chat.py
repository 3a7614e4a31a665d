"""`python -m canary.prost chat`: talk to a Prost in the terminal."""

import argparse
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from canary.cli.flags import decoding_fields
from canary.prost.cli import flags
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

if TYPE_CHECKING:
    from canary.prost.agent import Prost

log = logging.getLogger(__name__)

HELP = "[RESET] forgets the conversation, [END] leaves."


def run(args: argparse.Namespace) -> None:
    """Answer line by line until [END] or the end of the input."""
    # In one shape, compiled before the first question: a user should not wait for XLA.
    prost = flags.open_prost(args, bucketed=False)
    began = time.monotonic()
    prost.reply(["Hello."], seed=args.seed, **decoding_fields(args))
    log.info("ready after %.1f s", time.monotonic() - began)
    talk(prost, decoding_fields(args), args.seed)


def talk(
    prost: "Prost",
    decoding: dict[str, Any],
    seed: int = 0,
    # Parameters, so that a test can talk without a terminal.
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> list[str]:
    """Answer line by line; return the last history. End of file leaves, as [END] does."""
    from canary.prost import bulk_replies

    turns: list[str] = []
    write(HELP)
    try:
        while (line := read("You: ").strip()).upper() != "[END]":
            if line == "[RESET]":
                turns = []
                write("(conversation forgotten)\n")
            elif line:
                try:
                    reply = prost.reply([*turns, line], seed=seed, **decoding)
                except UserError as error:
                    # A line that cannot be used costs itself, not the conversation.
                    write(f"({error})\n")
                    continue
                # Never empty, because the next turn's history may hold no empty turn.
                turns += [line, reply.text or "..."]
                write(bulk_replies.of(prost, reply) + "\n")
    except EOFError:
        pass
    return turns


VERB = Verb(
    help="talk to a checkpoint in the terminal",
    description="Talk to a checkpoint. It answers line by line and shows the rules of thumb that "
    "it follows; [RESET] forgets the conversation, [END] leaves.",
    examples="""\
  python -m canary.prost chat --checkpoint=/tmp/prost
  python -m canary.prost chat --checkpoint=/tmp/prost --canary=/tmp/canary --temperature=0.8
""",
    run=run,
    flags=f"{flags.MODEL}{flags.CANARY}\n{flags.GENERATION}",
)
