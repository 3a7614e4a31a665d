"""Make Prost's texts and tokens: the dialogue history, the target, and the answer read back.

Kim et al. 2022 ("ProsocialDialog"), section 4.2. Prost writes rules of thumb (RoTs), then its
response. The history is ParlAI's for BlenderBot. The paper does not print the form of a target with
RoTs, so `__rot__ RoT1, RoT2 __response__ RESPONSE` is ours. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from cosmo.engine.base.errors import DataError
from cosmo.engine.base.vocabulary import BLENDERBOT_DELIMITER
from cosmo.tasks.safety import rot_text, split_rots
from cosmo.tasks.vocabularies import RESPONSE_MARK, ROT_MARK, AnyVocabulary

# The third is for evaluation: targets as of the first, but the RoTs are given and not generated.
Variant = Literal["rot_and_response", "response_only", "gold_rot_and_response"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class ProstExample:
    """One response to learn after `turns`, and the rules of thumb (RoTs) that it was written from.

    `turns` is the dialogue history as ParlAI's History has it, oldest first. Context lines
    (personas, a topic) stand before the first utterance inside its text, joined by newlines. `id`
    is unique and stable: the dialogue's id and the position of the response in the dialogue.
    """

    turns: tuple[str, ...]
    response: str
    rots: tuple[str, ...] = ()
    id: str = ""


class History(NamedTuple):
    """The ids of a history with the end token, and how many of the oldest were cut."""

    ids: list[int]
    dropped: int

    @property
    def cut(self) -> bool:
        """Whether something was cut."""
        return self.dropped > 0


class Answer(NamedTuple):
    """The parts of an answer. `problem` is empty, or names what was wrong with its marks."""

    rots: tuple[str, ...]
    response: str
    problem: str = ""


def history_text(turns: Sequence[str]) -> str:
    """Return the whole history as ParlAI shows it."""
    return BLENDERBOT_DELIMITER.join(turns)


def history_ids(
    turns: Sequence[str], vocabulary: AnyVocabulary, length: int | None = None
) -> History:
    """Return the ids of the last `length` tokens of a history; None keeps all.

    Each utterance is tokenized on its own, with the delimiter's tokens between, and the end token
    stands at the very end.
    """
    delimiter = vocabulary.encode(BLENDERBOT_DELIMITER)
    ids: list[int] = []
    for index, turn in enumerate(turns):
        ids += [*(delimiter if index else ()), *vocabulary.encode(turn)]
    ids.append(vocabulary.eos_id)
    dropped = 0 if length is None else max(len(ids) - length, 0)
    return History(ids[dropped:], dropped)


def check_variant(variant: str, vocabulary: AnyVocabulary) -> None:
    """Raise DataError for an unknown variant, or one whose marks the vocabulary lacks."""
    if variant not in VARIANTS:
        raise DataError(f"variant={variant!r}: expected one of {VARIANTS}", setting="PROST_VARIANT")
    if writes_rots(variant):
        _marks(vocabulary)


def writes_rots(variant: Variant) -> bool:
    """Return whether the targets of a variant have rules of thumb."""
    return variant != "response_only"


def target_text(example: ProstExample, variant: Variant = "rot_and_response") -> str:
    """Return the target of an example: the response, after its RoTs if the variant has them.

    An example without RoTs has the bare response in every variant.
    """
    rots = _rots(example.rots) if writes_rots(variant) else ""
    return f"{ROT_MARK} {rots} {RESPONSE_MARK} {example.response}" if rots else example.response


def target_ids(
    example: ProstExample, vocabulary: AnyVocabulary, variant: Variant = "rot_and_response"
) -> list[int]:
    """Return the ids of the target and the end token."""
    prefix = gold_prefix_ids(example.rots, vocabulary) if writes_rots(variant) else []
    return [*prefix, *vocabulary.encode(example.response), vocabulary.eos_id]


def gold_prefix_ids(rots: Sequence[str], vocabulary: AnyVocabulary) -> list[int]:
    """Return the ids of a target up to its response; none where there is no RoT.

    A decoder that is given them writes a response that follows these RoTs.
    """
    text = _rots(rots)
    if not text:
        return []
    rot, response = _marks(vocabulary)
    return [rot, *vocabulary.encode(text), response]


def split_answer(answer: str) -> Answer:
    """Return the RoTs and the response of an answer.

    An answer without marks is all response. No answer raises an error: `problem` names a mark that
    is missing or there twice, and a response that is empty.
    """
    before, mark, after = answer.partition(RESPONSE_MARK)
    problems = []
    if ROT_MARK in before:
        rots = before
        if not mark:
            # Cut at the longest answer, or the network lost its form. No part is a response.
            problems.append(f"no {RESPONSE_MARK} after the rules of thumb")
        extra, _, _ = before.partition(ROT_MARK)
        if extra.strip():
            problems.append(f"text before {ROT_MARK}")
    elif mark and before.strip():
        rots = before
        problems.append(f"no {ROT_MARK} before the rules of thumb")
    else:
        rots, after = "", after if mark else before
    response = _without_marks(after)
    if before.count(ROT_MARK) > 1 or ROT_MARK in after:
        problems.append(f"{ROT_MARK} more than once")
    if RESPONSE_MARK in after:
        problems.append(f"{RESPONSE_MARK} more than once")
    if not response:
        problems.append("no response")
    return Answer(split_rots(_without_marks(rots)), response, "; ".join(problems))


def _without_marks(text: str) -> str:
    """Return a text without marks, and with one space where one stood between words."""
    parts = text.replace(RESPONSE_MARK, ROT_MARK).split(ROT_MARK)
    return " ".join(part.strip() for part in parts if part.strip())


def _rots(rots: Sequence[str]) -> str:
    return rot_text(rots) if any(rot.strip() for rot in rots) else ""


def _marks(vocabulary: AnyVocabulary) -> tuple[int, int]:
    """Return the ids of the two marks; raise DataError for a vocabulary without them."""
    if not vocabulary.marks:
        raise DataError.at(
            vocabulary.path,
            None,
            "the vocabulary has no rows for Prost's marks",
            got=f"{vocabulary.size} pieces, none of them spare",
            expected="two spare rows at its end, such as BlenderBot's __FP16_PAD_0__",
            remedy="Give BlenderBot's vocabulary, or PROST_VARIANT='response_only'.",
            setting=("VOCABULARY_PATH", "PROST_VARIANT"),
        )
    return vocabulary.marks[ROT_MARK], vocabulary.marks[RESPONSE_MARK]
