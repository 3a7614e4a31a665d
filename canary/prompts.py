r"""Write prompts for a language model that answers a dialogue, steered by rules of thumb (RoTs).

Kim et al. 2022 ("ProsocialDialog"), appendix D.2, to the character: `\n` of the paper is a line
break, and the spaces beside it are kept. The paper shows a context of one turn, and leaves open:

- Several turns: a line each, the speakers in turn, so that the last one, which is to be answered,
  is Speaker 1's.
- Several RoTs: joined with commas, as Canary writes them.
- A RoT's own full stop: left out, for the sentence it stands in has one. Its capital stays.
"""

from collections.abc import Sequence

from cosmo.engine.base.errors import UserError

OPENING = "The following is a conversation between Speaker 1 and Speaker 2."
GUIDANCE = " Speaker 2 is trying to gently explain {rots}."


def basic(turns: Sequence[str]) -> str:
    """Return the paper's P_0: the model answers as Speaker 2. UserError for an empty turn."""
    return f"{OPENING} \n\n {spoken(turns)} \n Speaker 2:"


def dialogue_agent(context: str) -> str:
    """Return appendix C.3's prompt of a dialogue agent; `context` is inserted as it is.

    The paper does not show how its context marks the speakers. `basic` is appendix D.2's prompt.
    Raises UserError for an empty context.
    """
    if not context.strip():
        raise UserError("got an empty context: expected the dialogue so far as one text")
    return f"{OPENING}\n\n {context}\n Speaker 2:"


def guided(turns: Sequence[str], rots: Sequence[str]) -> str:
    """Return the paper's P_r: `basic` with RoTs. Without any, as for a casual context, `basic`."""
    kept = [rot.strip().rstrip(".").rstrip() for rot in rots]
    joined = ", ".join(rot for rot in kept if rot)
    guidance = GUIDANCE.format(rots=joined) if joined else ""
    return f"{OPENING}{guidance} \n\n {spoken(turns)} \n Speaker 2:"


def spoken(turns: Sequence[str], between: str = " \n ") -> str:
    """Return a line for each turn, with its speaker; Speaker 1 has the last word.

    Raises UserError for an empty turn.
    """
    if isinstance(turns, str):
        raise UserError("got one text: give a list of turns, oldest first")
    if not turns or not all(turn.strip() for turn in turns):
        raise UserError(f"got the turns {list(turns)!r}: expected at least one, none of them empty")
    first = (len(turns) + 1) % 2  # 0: Speaker 1 begins, and has the last word
    return between.join(
        f"Speaker {(first + place) % 2 + 1}: {turn.strip()}" for place, turn in enumerate(turns)
    )
