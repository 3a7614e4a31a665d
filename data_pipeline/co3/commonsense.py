"""Check that a record holds its triple (Kim et al. 2023, section 3.1, appendix B.1, table 9).

The model answers Yes, No or Unknown: on the head from the narrative, on relation and tail from the
conversation. The answers are ranked by log-probability, and by pointwise mutual information: the
log-probability less that without the text (Holtzman et al. 2021), which removes the model's bias
for a word. Without log-probabilities the answer's text counts, and the pmi answers are empty.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

from data_pipeline.calls.requests import Response, Stage
from data_pipeline.co3 import texts
from data_pipeline.co3.prompts import Prompts
from data_pipeline.co3.schema import Record

if TYPE_CHECKING:  # post-processing needs no English inflection
    from data_pipeline.co3.sentences import Sentence

ANSWERS = ("Yes", "No", "Unknown")
_YES = re.compile(
    r"^(?:(?:the )?a(?:nswer)?(?:\s*:|\s+is:?)\s*)?(?:yes|yeah|true|correct)\b", re.IGNORECASE
)
_UNKNOWN = re.compile(
    r"unknown|unclear|not (?:clear|known|mentioned|stated|specified|sure)|cannot|can't|don't know"
    r"|maybe|possibly|it depends|no (?:information|mention|way to)",
    re.IGNORECASE,
)
_NO = re.compile(
    r"^(?:(?:the )?a(?:nswer)?(?:\s*:|\s+is:?)\s*)?(?:no|not|false|incorrect)\b", re.IGNORECASE
)


def judge(record: Record, sentence: Sentence, prompts: Prompts) -> Stage[Record]:
    """Return the record with its four answers, of two requests, or four with log-probabilities."""
    conversation = "\n".join(
        f"{name}: {said}" for name, said in zip(record.speakers, record.dialogue, strict=True)
    )
    relation = prompts.question(record.relation, **sentence.fields())
    head = prompts.head_question(sentence.head)
    head_answers = yield from _ask(record.id, "head", head, record.narrative, prompts)
    tail_answers = yield from _ask(record.id, "relation_tail", relation, conversation, prompts)
    return dataclasses.replace(
        record,
        head_answer=head_answers[0],
        pmi_head_answer=head_answers[1],
        relation_tail_answer=tail_answers[0],
        pmi_relation_tail_answer=tail_answers[1],
    )


def _ask(
    record_id: str, stage: str, question: str, context: str, prompts: Prompts
) -> Stage[tuple[str, str]]:
    """Return the answer by log-probability, and that by pointwise mutual information."""
    response = yield prompts.request(stage, record_id, question=question, context=context)
    given = log_probabilities(response)
    if given is None:
        return in_words(response.text), ""
    # The bias does not depend on the text, but it does on the question: one request each.
    response = yield prompts.request(f"{stage}_alone", record_id, question=question)
    alone = log_probabilities(response)
    return _best(given), _best({a: given[a] - alone[a] for a in ANSWERS}) if alone else ""


def _best(scores: dict[str, float]) -> str:
    # Of equal scores the first of ANSWERS, so that the answer is the same everywhere.
    return max(ANSWERS, key=lambda answer: scores[answer])


def log_probabilities(response: Response) -> dict[str, float] | None:
    """Return each answer's log-probability in nats, from the alternatives of the first word.

    An answer that is not among them gets the least of them, an upper bound. None if the server gave
    none, or if no answer is among them.
    """
    for alternatives in response.logprobs or ():
        words = {token: token.strip(" \n\t\"'*.,:!\u2581\u0120").lower() for token in alternatives}
        if not alternatives or not words[max(alternatives, key=alternatives.__getitem__)]:
            continue  # the likeliest token is a space or a line's end: the answer follows
        found: dict[str, float] = {}
        for token, word in words.items():
            for answer in ANSWERS:
                if word and answer.lower().startswith(word):
                    before = found.get(answer, -math.inf)
                    found[answer] = _log_sum(before, alternatives[token])
        if not found:
            return None
        least = min(alternatives.values()) - 1e-6  # below one that is the least itself
        return {answer: found.get(answer, least) for answer in ANSWERS}
    return None


def _log_sum(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def in_words(text: str) -> str:
    """Return the answer in a text: "Yes, because ..." is Yes; anything unclear is Unknown."""
    text = texts.plain(text).strip(" \"'*.,")
    if _YES.match(text):
        return "Yes"
    # Before No, because "not mentioned" begins like one.
    if _UNKNOWN.search(text):
        return "Unknown"
    return "No" if _NO.match(text) else "Unknown"
