"""Extend the sentence to a narrative of two or three (Kim et al. 2023, 2.3, appendix A.1).

The model is asked again where the published code does so: four or more sentences, the literal
sentence unchanged, or a sentence twice. After `retries` more answers the shortest is kept, and
marked. Differences from the published code:

- `retries` is 2 by default. The published code allows one for a long narrative, and any number for
  an unchanged or repeated sentence; here `retries` limits all three.
- An answer that the token limit cut off is asked for again; not with `as_published`.
- Sentences are compared without case and punctuation.
- Announcements and quotation marks around the story are removed, and refusals are no story.
"""

from __future__ import annotations

import dataclasses

from data_pipeline.calls.requests import Rejected, Stage
from data_pipeline.co3 import texts
from data_pipeline.co3.prompts import Prompts

# Long narratives drift away from the triple, so the prompt asks for two or three (appendix A.1).
TOO_MANY_SENTENCES = 4


@dataclasses.dataclass(frozen=True)
class Narrative:
    """A story, the number of attempts, and its `fault` if it was kept with one."""

    text: str
    attempts: int
    fault: str = ""


def narrate(
    record_id: str,
    literal: str,
    prompts: Prompts,
    retries: int = 2,
    as_published: bool = False,
) -> Stage[Narrative | Rejected]:
    """Ask for the narrative, up to `retries` times more. Return Rejected without a story."""
    candidates: list[tuple[int, int, str, str]] = []
    last = fault_of_answer = ""
    for attempt in range(retries + 1):
        response = yield prompts.request("narrative", record_id, attempt, literal=literal)
        last, fault_of_answer = response.text, response.fault
        if fault_of_answer or texts.is_refusal(last):
            continue
        text = texts.paragraph(last)
        # Dots or digits alone are no story.
        if not any(c.isalpha() for c in text):
            continue
        found = fault(text, literal)
        # The token limit may end the story in the middle of a sentence.
        if not found and response.finish_reason == "length" and not as_published:
            found = "cut short"
        if not found:
            return Narrative(text=text, attempts=attempt + 1)
        # The shortest comes first: it is kept if no attempt is good.
        candidates.append((len(text), attempt, text, found))
    if not candidates:
        reason = "refusal" if texts.is_refusal(last) else "empty narrative"
        reason = fault_of_answer or reason
        return Rejected(record_id, "narrative", reason, {"literal": literal, "answer": last[:500]})
    # The attempt is compared next, so the earliest of equally short ones wins.
    _, _, text, found = min(candidates)
    return Narrative(text=text, attempts=retries + 1, fault=found)


def fault(text: str, literal: str) -> str:
    """Return why the published code would ask again, or ""."""
    # At each ". ", as the published code: the stop of "Mr. Lee" counts as an end too.
    sentences = [texts.same(sentence) for sentence in text.split(". ")]
    if len(sentences) >= TOO_MANY_SENTENCES:
        return "four or more sentences"
    # Without case and punctuation, because a model that changes these alone adds nothing.
    if texts.same(text) == texts.same(literal):
        return "unchanged"
    if len(set(sentences)) < len(sentences):
        return "repeated sentence"
    return ""
