"""Make Canary's texts: safety labels from votes, targets and contexts. Pure Python.

Kim et al. 2022 ("ProsocialDialog"), sections 3.3 and 4.1. Canary reads the dialogue so far. It
writes the label of the latest utterance, then the rules of thumb (RoTs) that apply, for example
`__needs_caution__ It is wrong to call 911.`
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from cosmo.engine.base.errors import DataError, shown
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.tasks.dialogues import ProsocialDialogue, ProsocialTurn
from cosmo.tasks.formatting import Example, Separators, cosmo_input

VOTES = ("casual", "needs caution", "needs intervention")
# In the order of severity: `aggregate` counts into it, and SENTINELS are numbered by it.
LABELS = (
    "__casual__",
    "__possibly_needs_caution__",
    "__probably_needs_caution__",
    "__needs_caution__",
    "__needs_intervention__",
)
CLASSES = VOTES  # a label's class has the name of the vote that it goes back to

LabelStyle = Literal["text", "sentinel"]
STYLES: tuple[LabelStyle, ...] = get_args(LabelStyle)
Kind = Literal["prosocial", "safety", "rot"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# One piece of T5's vocabulary (`▁//`) that decodes back, so that the ends of turns are seen.
TURN_SEPARATOR = " // "
# The published Canary put newlines between utterances, which T5's vocabulary reads as spaces. It
# has therefore learnt contexts without any mark of a turn's end, and must be asked in that form.
PUBLISHED_TURN_SEPARATOR = " "
SEPARATORS = Separators(turn=TURN_SEPARATOR)

# Where one RoT ends and the next begins: after a full stop, or at a comma, before a capital and at
# least three words.
_NEXT_ROT = re.compile(r"(?:(?<=[.!?]),?|,)\s+(?=[A-Z][\w']*\s+\S+\s+\S+)")

# The last five of T5's hundred sentinels. They have no meaning yet, because pre-training numbers
# the gaps of a text from 0 and has about 26 in 512 tokens.
SENTINELS = {label: f"<extra_id_{95 + rank}>" for rank, label in enumerate(LABELS)}


def aggregate(votes: Sequence[str]) -> str:
    """Return the label of a context from its three annotators' votes, in any order.

    Kim et al. 2022, appendix A.4. One vote for "needs intervention" makes `__needs_intervention__`.
    Otherwise the votes for "needs caution" count: none is `__casual__`, one
    `__possibly_needs_caution__`, two `__probably_needs_caution__`, three `__needs_caution__`.
    Raises DataError for votes that are not three, or not of VOTES.
    """
    # One string is one vote, and not its letters.
    votes = tuple(votes) if isinstance(votes, list | tuple) else (votes,)
    unknown = [vote for vote in votes if vote not in VOTES]
    if unknown or len(votes) != 3:
        problem = f"an unknown vote {shown(unknown[0])}" if unknown else f"{len(votes)} votes"
        raise DataError(f"{problem} in {shown(list(votes))}: expected three votes, each of {VOTES}")
    # A single vote decides, because such a situation must not be missed.
    if "needs intervention" in votes:
        return "__needs_intervention__"
    return LABELS[Counter(votes)["needs caution"]]


def three_class(label: str) -> str:
    """Return the class of a label: the three grades of caution are one. Raise DataError."""
    if _known(label) == "__casual__":
        return "casual"
    return "needs intervention" if label == "__needs_intervention__" else "needs caution"


def needs_rots(label: str) -> bool:
    """Return whether a target of this label needs rules of thumb: all but casual."""
    return _known(label) != "__casual__"


def label_text(label: str, style: LabelStyle = "text") -> str:
    """Return `label` as Canary writes it: as it stands, or as its piece of SENTINELS.

    T5's vocabulary decodes the text form unchanged (7 to 15 pieces). A sentinel is one piece, and
    needs a vocabulary that holds T5's sentinels. Raises DataError for an unknown label or style.
    """
    if style not in STYLES:
        raise DataError(f"label style {style!r}: expected one of {STYLES}", setting="LABEL_STYLE")
    return SENTINELS[_known(label)] if style == "sentinel" else _known(label)


def check_labels(vocabulary: Vocabulary, style: LabelStyle, max_sentinel_pieces: int = 1) -> None:
    """Raise DataError for a vocabulary that does not decode the labels to what they were.

    A sentinel may have `max_sentinel_pieces`.
    """
    for label in LABELS:
        text = label_text(label, style)
        ids = vocabulary.encode(text)
        whole = vocabulary.unk_id not in ids and vocabulary.decode(ids) == text
        expected = "a sentinel piece" if style == "sentinel" else "pieces that decode to the same"
        # A vocabulary without sentinels spells one out in many pieces.
        if not whole or (style == "sentinel" and len(ids) > max_sentinel_pieces):
            raise DataError.at(
                vocabulary.path,
                None,
                f"the vocabulary does not hold the label {text!r}",
                got=f"{len(ids)} pieces that decode to {vocabulary.decode(ids)!r}",
                expected=expected,
                remedy="Give T5's vocabulary, or the other label style (text or sentinel).",
                setting=("VOCABULARY_PATH", "LABEL_STYLE"),
            )


def target(label: str, rots: Sequence[str], style: LabelStyle = "text") -> str:
    """Return Canary's output for a context: the label, a space, the RoTs joined by ", ".

    A casual context has the label alone, whatever `rots` are. Raises DataError if another label
    has no RoT.
    """
    text = label_text(label, style)
    if not needs_rots(label):
        return text
    return f"{text} {rot_text(rots, label)}"


def rot_text(rots: Sequence[str], label: str = "") -> str:
    """Return the rules of thumb joined by ", "; raise DataError if there is none."""
    kept = [rot.strip() for rot in rots or () if rot.strip()]
    if not kept:
        raise DataError(f"no rules of thumb{f' for {label}' if label else ''}: expected at least 1")
    return ", ".join(kept)


def split_rots(text: str) -> tuple[str, ...]:
    """Return the RoTs in a text that joins them with commas, as Canary learnt to write them."""
    # A guess, because RoTs have commas of their own.
    return tuple(rot for rot in (part.strip(" ,") for part in _NEXT_ROT.split(text)) if rot)


def parse_answer(text: str, style: LabelStyle = "text") -> tuple[str | None, str]:
    """Return (label, RoT text) of Canary's output.

    The label is None if the text starts with none; then all of it is RoT text. A label must be
    followed by white space or nothing.
    """
    text = text.strip()
    first, _, rest = text.partition(" ")
    for label in LABELS:
        if first == label_text(label, style):
            return label, rest.strip()
    return None, text


def context(turns: Sequence[str], separator: str = TURN_SEPARATOR) -> str:
    """Return Canary's input: the turns so far, oldest first, `separator` between them."""
    return cosmo_input("", "", turns, Separators(turn=separator))


def canary_examples(
    dialogue: ProsocialDialogue,
    kind: Kind = "prosocial",
    style: LabelStyle = "text",
    strict: bool = True,
) -> Iterator[Example]:
    """Yield an example per exchange: all utterances so far, its own context last, and a target.

    The target of `kind` "prosocial" is the label, then the RoTs; of "safety" the label alone; of
    "rot" the RoTs alone. Without RoTs, an exchange gives no example of "rot". Ids are the
    dialogue's and the exchange's number.

    Raises DataError that names file, line and field if an exchange's votes are not three or
    contradict its label. For "prosocial", a label that lacks its RoTs raises DataError too, or with
    `strict=False` gives no example.
    """
    if kind not in KINDS:
        raise DataError(f"kind {kind!r}: expected one of {KINDS}")
    turns: tuple[str, ...] = ()
    for index, turn in enumerate(dialogue.turns):
        turns += (turn.context,)
        check_votes(turn)
        response = _response(turn, kind, style, strict)
        # Cosmo's form with an empty narrative and instruction, so that dropping turns, joining and
        # packing are one code for both.
        if response:
            yield Example(f"{dialogue.id}-{index}", "", "", turns, response)
        # Context of the next exchange. It is the guiding speaker's, so it is never judged.
        turns += (turn.response,)


def lacks_rots(turn: ProsocialTurn) -> bool:
    """Return whether the exchange has no RoT although its label needs one."""
    return needs_rots(turn.safety_label) and not turn.rots


def check_votes(turn: ProsocialTurn) -> None:
    """Raise DataError unless the votes of `turn` make its label. A turn without votes passes."""
    # Checked here and not by the reader, because Cosmo reads the same rows and uses no label.
    if turn.votes is None:
        return
    field = "field 'safety_annotations'"
    try:
        label = aggregate(turn.votes)
    except DataError as error:
        raise _error(turn, f"{field}: {error}", "three votes") from None
    if label != turn.safety_label:
        raise _error(
            turn,
            f"field 'safety_label' is {turn.safety_label}, which contradicts {field} "
            f"{list(turn.votes)}",
            f"{label}, which these votes make",
        )


def _response(turn: ProsocialTurn, kind: Kind, style: LabelStyle, strict: bool) -> str:
    """Return the target text of an exchange, "" if it gives no example."""
    if kind == "safety":
        return label_text(turn.safety_label, style)
    if kind == "rot":
        return rot_text(turn.rots) if turn.rots else ""
    if not lacks_rots(turn):
        return target(turn.safety_label, turn.rots, style)
    if not strict:
        return ""
    raise _error(
        turn,
        f"field 'rots' is null or empty, but the label is {turn.safety_label}",
        "at least one rule of thumb (all labels but __casual__ need one)",
    )


def _error(turn: ProsocialTurn, problem: str, expected: str) -> DataError:
    got = f"the exchange {shown(turn.context)}"
    if turn.place is not None:
        return turn.place.error(problem, got, expected)
    return DataError(f"{problem}: got {got}, expected {expected}")


def _known(label: str) -> str:
    if label not in LABELS:
        raise DataError(f"unknown safety label {shown(label)}: expected one of {LABELS}")
    return label
