"""Make the conversation of a narrative (Kim et al. 2023, section 2.4, appendix A.2).

As in the published code, a conversation has six turns or more, and one that broke off is continued
once. One with too few turns is asked for again, up to `retries` times. Then the longest is kept,
and marked. With `as_published`, and the prompts of prompts_published.toml, it differs so:

- It makes two attempts, where `retries` makes three by default.
- A repeated utterance, or a turn without its name, is kept and marked. Else two repetitions, or one
  such turn, are asked for again.
- The longest has the most characters, the last of equals. Else it has the most turns, the first of
  equals.
- A blank line or few turns lead to a continuation. Else the token limit or few turns do.
- A continuation counts from two turns on, repeated ones included. Its prompt names no next speaker.
- A turn that the token limit cut off is kept. Else it is left out.
- The prompt names PersonZ: "between X and Y and Z".

Both read answers by `turns` and ask for the interlocutor by `speakers`. The published code finds
names by colons alone, and makes the interlocutor's whole answer the dialogue's prompt. It means to
ask again for fewer than two speakers, but counts turns: that never happens. `filters` drops them.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from data_pipeline.calls.requests import Rejected, Response, Stage
from data_pipeline.co3 import texts, turns
from data_pipeline.co3.prompts import Prompts
from data_pipeline.co3.speakers import label
from data_pipeline.co3.turns import Turns

# The last characters of a whole utterance. Brackets and stars close a stage direction.
_CLOSED = (".", "!", "?", '"', "'", ")", "\u2026", "*")
_STOP = re.compile(r"[.!?]")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, the number of attempts and continuations, and the fault they were kept with."""

    turns: Turns
    attempts: int
    continuations: int
    fault: str = ""


def converse(
    record_id: str,
    narrative: str,
    x: str,
    y: str,
    prompts: Prompts,
    retries: int = 2,
    wanted_turns: int = 6,
    as_published: bool = False,
    z: str = "",
) -> Stage[Conversation | Rejected]:
    """Ask for the conversation of x and y ("Ann", "her coach") in the scene of the narrative.

    `z` is the triple's third person, whom `as_published` alone names. Return Rejected if no answer
    has a turn.
    """
    three = as_published and z
    fields = {"narrative": narrative, "x": x, "y": f"{y} and {z}" if three else y}
    others = (label(y), label(z)) if three else (label(y),)
    candidates: list[tuple[int, int, Turns, str]] = []
    continuations = 0
    last = fault_of_answer = ""
    for attempt in range(retries + 1):
        # The attempt is part of the journal's key, so each gets an answer of its own.
        response = yield prompts.request("dialogue", record_id, attempt, **fields)
        last, fault_of_answer = response.text, response.fault
        parsed = turns.parse(last, x, others)
        if fault_of_answer or _declined(last, parsed):
            continue
        # The cut turn goes first, else the continuation would follow half a sentence.
        found = parsed if as_published else _complete(parsed, response)
        broken = "\n\n" in last.strip() if as_published else response.finish_reason == "length"
        if len(found) and (broken or len(found) < wanted_turns):
            # The prompt ends with the next speaker's name, as the first one does with X's.
            following = _next_speaker(found, x, others[0])
            response = yield prompts.request(
                "continuation", record_id, attempt, so_far=found.text(), next=following, **fields
            )
            continuations += 1
            more = turns.parse(response.text, following, (x, *others))
            if not response.fault and not _declined(response.text, more):
                if not as_published:
                    found = _joined(found, _complete(more, response))
                # The published code takes a single turn for the end of the conversation.
                elif len(more) > 1:
                    found = _joined(found, more, repeated=True)
        if not len(found):
            continue
        fault = fault_of(found, wanted_turns)
        if as_published and len(found) >= wanted_turns:
            if not fault and len(set(found.dialogue)) < len(found):
                fault = "repetition"
            return Conversation(found, attempt + 1, continuations, fault)
        if not fault:
            return Conversation(found, attempt + 1, continuations)
        # The longest comes first, of equally long ones the earliest attempt.
        order = (-len(found.text()), -attempt) if as_published else (-len(found), attempt)
        candidates.append((*order, found, fault))
    if not candidates:
        reason = "refusal" if texts.is_refusal(last) else "empty dialogue"
        reason = fault_of_answer or reason
        # The beginning is enough here: the journal has the whole answer.
        record = {"narrative": narrative, "speakers": [x, y], "answer": last[:500]}
        return Rejected(record_id, "dialogue", reason, record)
    _, _, found, fault = min(candidates, key=lambda candidate: candidate[:2])
    return Conversation(found, retries + 1, continuations, fault)


def _declined(text: str, found: Turns) -> bool:
    """Return whether the model refuses. A speaker may refuse: "I'm sorry, I can't. Bob: Oh"."""
    return len(set(found.speakers)) < 2 and texts.is_refusal(text)


def fault_of(found: Turns, wanted_turns: int) -> str:
    """Return why the conversation is asked for again, or ""."""
    # First, because `filters.lexical` drops a conversation that was kept with this mark.
    if found.unprefixed:
        return "missing prefix"
    if repetitions(found.dialogue) > 1:
        return "repetition"
    if len(found) < wanted_turns:
        return "too few turns"
    return ""


def repetitions(dialogue: tuple[str, ...]) -> int:
    """Count the utterances that repeat an earlier one, and the sentences repeated within one.

    An utterance of one or two words ("Yes.") counts from the third time on: any conversation has
    some.
    """
    # By letters and digits alone, so that other punctuation hides no repetition.
    counts = collections.Counter(texts.same(utterance) for utterance in dialogue)
    repeated = 0
    if len(counts) < len(dialogue):
        short = {texts.same(said) for said in dialogue if said.count(" ") < 2}
        allowed = {said: 2 if said in short else 1 for said in counts}
        repeated = sum(max(0, count - allowed[said]) for said, count in counts.items())
    return repeated + sum(map(_loops, dialogue))


def _loops(utterance: str) -> int:
    """Count the sentences of three words or more that come a third time or later."""
    # Short sentences repeat in any talk ("Come on. Come on.").
    sentences = [part.strip() for part in _STOP.split(utterance) if part.count(" ") >= 3]
    # Only the third of a sentence counts.
    if len(sentences) < 3:
        return 0
    return sum(max(0, count - 2) for count in collections.Counter(sentences).values())


def _complete(found: Turns, response: Response) -> Turns:
    """Leave out the last turn if the token limit cut it off."""
    # The only turn stays, because a continuation needs one to follow.
    if response.finish_reason != "length" or len(found) < 2:
        return found
    if found.dialogue[-1].endswith(_CLOSED):
        return found
    return dataclasses.replace(
        found, speakers=found.speakers[:-1], dialogue=found.dialogue[:-1], dropped=found.dropped + 1
    )


def _joined(found: Turns, more: Turns, repeated: bool = False) -> Turns:
    """Join both, unless `repeated` without the first turns of `more` that repeat earlier ones."""
    start = 0
    # With the speaker, because two people may use the same words.
    known = {
        (name, texts.same(said)) for name, said in zip(found.speakers, found.dialogue, strict=True)
    }
    pairs = list(zip(more.speakers, more.dialogue, strict=True))
    # Models may repeat the last turns before they continue.
    while start < len(pairs) and (pairs[start][0], texts.same(pairs[start][1])) in known:
        start += 1
    start = 0 if repeated else start
    return Turns(
        speakers=found.speakers + more.speakers[start:],
        dialogue=found.dialogue + more.dialogue[start:],
        dropped=found.dropped + more.dropped + start,
        unprefixed=found.unprefixed + more.unprefixed,
    )


def _next_speaker(found: Turns, x: str, other: str) -> str:
    """Return the speaker who did not speak last."""
    rest = [name for name in found.speakers if name != found.speakers[-1]]
    if rest:
        return rest[-1]
    return other if found.speakers[-1].casefold() == x.casefold() else x
