"""Canary's words: safety labels from votes, its target and context texts. Pure Python.

Kim et al. 2022 ("ProsocialDialog"), sections 3.3 and 4.1: Canary reads the dialogue so far and
writes the label of its latest utterance, then the rules of thumb (RoTs) that apply:
`__needs_caution__ It is wrong to call 911 just for fun.`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from cosmo.engine.base.errors import DataError, shown
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.tasks.dialogues import ProsocialDialogue, ProsocialTurn
from cosmo.tasks.formatting import Example, Separators, cosmo_input

VOTES = ("casual", "needs caution", "needs intervention")
LABELS = (
    "__casual__",
    "__possibly_needs_caution__",
    "__probably_needs_caution__",
    "__needs_caution__",
    "__needs_intervention__",
)
CLASSES = ("casual", "needs caution", "needs intervention")

LabelStyle = Literal["text", "sentinel"]
STYLES: tuple[LabelStyle, ...] = ("text", "sentinel")
Kind = Literal["prosocial", "safety", "rot"]
KINDS: tuple[Kind, ...] = ("prosocial", "safety", "rot")

# One piece of T5's vocabulary (`▁//`) that decodes back. The published Canary put newlines between
# utterances, which T5's vocabulary does not have: they would all read as unknown.
TURN_SEPARATOR = " // "
SEPARATORS = Separators(turn=TURN_SEPARATOR)

# The last five of T5's hundred sentinels. Its pre-training numbers the gaps of a text from 0 and
# has about 26 in 512 tokens, so these pieces are still without a meaning.
SENTINELS = {label: f"<extra_id_{95 + rank}>" for rank, label in enumerate(LABELS)}


def aggregate(votes: Sequence[str]) -> str:
    """The label of a context from its three annotators' votes. Kim et al. 2022, appendix A.4.

    One vote for "needs intervention" decides for `__needs_intervention__`: such a situation must
    not be missed. Otherwise the votes for "needs caution" are counted: none is `__casual__`, one
    `__possibly_needs_caution__`, two `__probably_needs_caution__`, three `__needs_caution__`.
    Their order does not matter. Raises DataError for votes that are not three, or not of VOTES.
    """
    votes = tuple(votes) if isinstance(votes, list | tuple) else (votes,)
    unknown = [vote for vote in votes if vote not in VOTES]
    if unknown or len(votes) != 3:
        what = f"an unknown vote {shown(unknown[0])}" if unknown else f"{len(votes)} votes"
        raise DataError(f"{what} in {shown(list(votes))}: expected three votes, each of {VOTES}")
    if "needs intervention" in votes:
        return "__needs_intervention__"
    return LABELS[Counter(votes)["needs caution"]]


def three_class(label: str) -> str:
    """The class of a label, of CLASSES: the three grades of caution are one. Raises DataError."""
    if _known(label) == "__casual__":
        return "casual"
    return "needs intervention" if label == "__needs_intervention__" else "needs caution"


def needs_rots(label: str) -> bool:
    """Whether a target of this label is incomplete without rules of thumb: all but casual."""
    return _known(label) != "__casual__"


def label_text(label: str, style: LabelStyle = "text") -> str:
    """How Canary writes `label`: as it stands, or as its piece of SENTINELS. Raises DataError.

    T5's vocabulary has all the characters of the text form and decodes it unchanged (7 to 15
    pieces); a sentinel is one piece. It needs a vocabulary that holds T5's sentinels.
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
    """Canary's output for a context: the label, a space, the RoTs joined by ", ".

    A casual context has the label alone, whatever `rots` are. Raises DataError where another label
    has no RoT that is not empty.
    """
    text = label_text(label, style)
    if not needs_rots(label):
        return text
    return f"{text} {rot_text(rots, label)}"


def rot_text(rots: Sequence[str], label: str = "") -> str:
    """The rules of thumb joined by ", ". Raises DataError where there is none."""
    kept = [rot.strip() for rot in rots or () if rot.strip()]
    if not kept:
        raise DataError(f"no rules of thumb{f' for {label}' if label else ''}: expected at least 1")
    return ", ".join(kept)


def parse(text: str, style: LabelStyle = "text") -> tuple[str | None, str]:
    """(label, RoT text) of what Canary wrote; the label is None if the text starts with none.

    Then all of the text is RoT text. A label must be followed by white space or nothing.
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
    """An example per exchange: all utterances so far, the exchange's own context last, to a target.

    The target of `kind` "prosocial" is the label, then the RoTs; of "safety" the label alone; of
    "rot" the RoTs alone, and an exchange without them gives no example. Narrative and instruction
    are empty. Ids are the dialogue's and the exchange's number.

    Raises DataError, naming file, line and field, where an exchange's votes are not three or
    contradict its label, and for "prosocial" where a label that needs RoTs has none; `strict=False`
    leaves the latter out instead.
    """
    if kind not in KINDS:
        raise DataError(f"kind {kind!r}: expected one of {KINDS}")
    turns: tuple[str, ...] = ()
    for index, turn in enumerate(dialogue.turns):
        turns += (turn.context,)
        check_votes(turn)
        response = _response(turn, kind, style, strict)
        if response:
            yield Example(f"{dialogue.id}-{index}", "", "", turns, response)
        turns += (turn.response,)


def lacks_rots(turn: ProsocialTurn) -> bool:
    """Whether the exchange has no RoT although its label needs one."""
    return needs_rots(turn.safety_label) and not turn.rots


def check_votes(turn: ProsocialTurn) -> None:
    """Raises DataError unless the votes of `turn` make its label; without votes nothing is known.

    Reading ProsocialDialog for another purpose does not ask this: it uses no label.
    """
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
    """The target text of an exchange; empty where it gives no example."""
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
