"""Make Cosmo's input text of a dialogue, in pure Python.

The format is that of the published Cosmo models (Kim et al. 2023, "SODA", section 4):
`SITUATION <sep> ROLE <sep> TURN1 <turn> TURN2`. `seqio_tasks` repeats it on token ids inside
tf.data; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cosmo.engine.base.errors import DataError
from cosmo.tasks.dialogues import SodaDialogue


@dataclass(frozen=True)
class Separators:
    """The texts between the parts of an input (`sep`) and between turns (`turn`).

    Both must begin and end with white space. Raises DataError otherwise.
    """

    # Lower case, as the published models were trained, although the paper prints capitals. T5's
    # vocabulary has no "<", so `<sep>` costs six pieces and `<turn>` four, some of them unknown.
    sep: str = " <sep> "
    turn: str = " <turn> "

    def __post_init__(self) -> None:
        # SentencePiece pieces never cross white space, so parts tokenized one by one then join to
        # the same ids as the joined text.
        for name, text in (("sep", self.sep), ("turn", self.turn)):
            if not text or not (text[0].isspace() and text[-1].isspace()):
                raise DataError(
                    f"Separators.{name}={text!r} must begin and end with white space, or words of "
                    "two parts could become one token",
                    setting=("SEPARATOR", "TURN_SEPARATOR"),
                )


@dataclass(frozen=True)
class Example:
    """One response to learn, after `turns` (oldest first, at least one).

    `narrative` and `instruction` may be empty. `id` is unique and stable: the dialogue's id and
    the position of the response in the dialogue.
    """

    id: str
    narrative: str
    instruction: str
    turns: tuple[str, ...]
    response: str


def instruction(speaker: str, listener: str) -> str:
    """Return the role instruction for `speaker`'s next utterance. Kim et al. 2023, section 4."""
    return f"Imagine you are {speaker} and speak to {listener}"


def cosmo_input(
    narrative: str,
    instruction: str,
    turns: Sequence[str],
    separators: Separators = Separators(),
) -> str:
    """Return Cosmo's input text. An empty part is left out together with its separator."""
    parts = (narrative, instruction, separators.turn.join(turns))
    return separators.sep.join(part for part in parts if part)


def drop_oldest_turns(
    narrative: str,
    instruction: str,
    turns: Sequence[str],
    budget: int,
    count_tokens: Callable[[str], int],
    separators: Separators = Separators(),
) -> tuple[str, ...]:
    """Return the longest suffix of `turns` whose input fits `budget` tokens, one EOS included.

    The narrative, the instruction and the latest turn always stay, even when they alone are over
    the budget. `count_tokens(text)` counts without EOS.
    """
    # Parts are counted one by one, because tokens of the joined text never cross a separator.
    fixed = sum(count_tokens(part + separators.sep) for part in (narrative, instruction) if part)
    lengths = [count_tokens(separators.turn + turn) for turn in turns]
    first = first_turn_kept(lengths, budget - 1 - fixed + count_tokens(separators.turn))
    return tuple(turns[first:])


def first_turn_kept(lengths: Sequence[int], budget: int) -> int:
    """Return the index of the oldest turn kept: whole turns are dropped, oldest first.

    `lengths[i]` counts the tokens of turn i and of the separator before it. `budget` has room for
    the separator before the first turn too, which is not written. The latest turn always stays.
    """
    # From the newest backwards, so that a long history costs no more than what fits.
    first = max(len(lengths) - 1, 0)
    total = sum(lengths[first:])
    while first > 0 and total + lengths[first - 1] <= budget:
        first -= 1
        total += lengths[first]
    return first


def soda_examples(dialogue: SodaDialogue) -> Iterator[Example]:
    """Yield the examples of a dialogue: every utterance after the first is once the target.

    The instruction names the target's speaker and the latest earlier speaker who is somebody else.
    A monologue has no listener, so its instruction is empty.
    """
    # From 1, because the first utterance answers nothing.
    for index in range(1, len(dialogue.dialogue)):
        speaker = dialogue.speakers[index]
        listener = _listener(dialogue.speakers, index)
        yield Example(
            id=f"{dialogue.id}-{index}",
            narrative=dialogue.narrative,
            instruction=instruction(speaker, listener) if listener else "",
            turns=dialogue.dialogue[:index],
            response=dialogue.dialogue[index],
        )


def _listener(speakers: Sequence[str], index: int) -> str:
    """Return the last other speaker before `index`, else the first after; "" if there is none."""
    # The last one before, because an utterance mostly answers the one before it. With two speakers
    # this is always the other one.
    for other in (*reversed(speakers[:index]), *speakers[index + 1 :]):
        if other != speakers[index]:
            return other
    return ""
