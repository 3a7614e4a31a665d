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
from data_pipeline.co3.turns import Turns

if TYPE_CHECKING:  # post-processing needs no English inflection
    from data_pipeline.co3.sentences import Sentence

ANSWERS = ("Yes", "No", "Unknown")
# First words of an answer that mean one of ANSWERS. "Not" may begin "Not mentioned", so it is none.
_MEANINGS = {
    **dict.fromkeys(("yes", "yeah", "yep", "yup", "yea", "true", "correct"), "Yes"),
    **dict.fromkeys(("no", "nope", "nah", "false", "incorrect"), "No"),
    **dict.fromkeys(("unknown", "unclear", "unsure", "uncertain"), "Unknown"),
}
_UNDECIDED = frozenset(("not", "cannot", "can't", "maybe", "n/a"))
# Servers write such numbers, or -inf, for an alternative that they left out. It has none.
LEFT_OUT = -99.0
_FIRST_WORD = re.compile(
    r"(?:(?:the )?a(?:nswer)?(?:\s*:|\s+is:?)\s*)?(?P<word>[a-z]+)\b", re.IGNORECASE
)
_UNKNOWN = re.compile(
    r"unknown|unclear|not (?:clear|known|mentioned|stated|specified|sure)|cannot|can't|don't know"
    r"|maybe|possibly|it depends|no (?:information|mention|way to)|unsure|uncertain|n/a",
    re.IGNORECASE,
)


def judge(record: Record, sentence: Sentence, prompts: Prompts) -> Stage[Record]:
    """Return the record with its four answers, of two requests, or four with log-probabilities.

    A reply without an answer leaves it empty, and is a mark.
    """
    conversation = Turns(record.speakers, record.dialogue).text()
    relation = prompts.question(record.relation, **sentence.fields())
    head = prompts.head_question(sentence.head)
    marks = list(record.marks)
    head_answers = yield from _ask(record.id, "head", head, record.narrative, prompts, marks)
    tail_answers = yield from _ask(
        record.id, "relation_tail", relation, conversation, prompts, marks
    )
    return dataclasses.replace(
        record,
        head_answer=head_answers[0],
        pmi_head_answer=head_answers[1],
        relation_tail_answer=tail_answers[0],
        pmi_relation_tail_answer=tail_answers[1],
        marks=tuple(marks),
    )


def _ask(
    record_id: str,
    stage: str,
    question: str,
    context: str,
    prompts: Prompts,
    marks: list[str],
) -> Stage[tuple[str, str]]:
    """Return the answer by log-probability, and that by pointwise mutual information.

    A reply without an answer is added to `marks`.
    """
    response = yield prompts.request(stage, record_id, question=question, context=context)
    if response.fault:
        marks.append(f"{stage}: {response.fault}")
    answer, given = plain_answer(response), log_probabilities(response)
    if given is None:
        return answer, ""
    # The bias does not depend on the text, but it does on the question: one request each.
    response = yield prompts.request(f"{stage}_alone", record_id, question=question)
    alone = log_probabilities(response)
    # Mutual information compares log-probabilities, and this answer has none.
    if alone is None or answer not in given.known:
        return answer, ""
    return answer, by_information(given, alone)


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """The log-probabilities of the answers that a server names, in nats.

    `least` is an upper bound of those that it does not name.
    """

    known: dict[str, float]
    least: float


def plain_answer(response: Response, answers: tuple[str, ...] = ANSWERS) -> str:
    """Return the likeliest of the answers, by log-probability or else by words; "" for none."""
    if response.fault:
        return ""
    found = log_probabilities(response)
    known = {answer: p for answer, p in found.known.items() if answer in answers} if found else {}
    # The server may leave out the log-probability of the very word that the model chose.
    chosen = _MEANINGS.get(_word((response.text.split() or [""])[0]))
    if known and (chosen is None or chosen in known):
        return max(known, key=known.__getitem__)
    # By words: the server gave no log-probabilities, or none of the chosen word.
    answer = in_words(response.text)
    # Where only Yes and No were asked, an unclear answer counts as No.
    return answer if answer in answers else answers[-1]


def by_information(given: Likelihoods, alone: Likelihoods) -> str:
    """Return the answer with the highest pointwise mutual information, or "" if none is sure.

    An answer that both name has one. An answer that only one names has a bound. One that neither
    names is left out.
    """
    both = [answer for answer in ANSWERS if answer in given.known and answer in alone.known]
    sure = {answer: given.known[answer] - alone.known[answer] for answer in both}
    if len(sure) < 2:
        return ""  # nothing to compare
    best = max(sure, key=sure.__getitem__)
    if given.known.keys() - alone.known.keys():
        return ""  # the less likely it is alone, the higher it is: no bound
    below = (given.least - alone.known[a] for a in alone.known.keys() - given.known.keys())
    return best if all(bound <= sure[best] for bound in below) else ""


def log_probabilities(response: Response) -> Likelihoods | None:
    """Return the log-probabilities of the answers, from the alternatives of the first word.

    None if the server gave none, if no answer is among them, or if the likeliest word decides
    nothing ("Not").
    """
    for alternatives in response.logprobs or ():
        told = {token: p for token, p in alternatives.items() if p > LEFT_OUT}
        words = {token: _word(token) for token in told}
        if not told or not words[likeliest := max(told, key=told.__getitem__)]:
            continue  # the likeliest token is a space or a line's end: the answer follows
        found: dict[str, float] = {}
        for token, word in words.items():
            if answer := _meant(word):
                # Several tokens mean one answer ("Yes", "yes", "Y"), so their probabilities add up.
                found[answer] = _log_sum(found.get(answer, -math.inf), told[token])
        if not found or words[likeliest] in _UNDECIDED:
            return None
        return Likelihoods(found, min(told.values()))
    return None


def _word(token: str) -> str:
    return token.strip(" \n\t\"'*.,:!\u2581\u0120").lower()


def _meant(word: str) -> str:
    """Return the answer that a token means or begins ("Y", "Unk"), or "" for any other."""
    if word in _MEANINGS:
        return _MEANINGS[word]
    return next((a for a in ANSWERS if word and a.lower().startswith(word)), "")


def _log_sum(a: float, b: float) -> float:
    # The larger is factored out, because exp of a very small log-probability is 0.
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def in_words(text: str) -> str:
    """Return the answer in a text: "Yes, because ..." is Yes; anything unclear is Unknown."""
    text = texts.plain(text).strip(" \"'*.,")
    found = _FIRST_WORD.match(text)
    first = found["word"].lower() if found else ""
    if _MEANINGS.get(first) == "Yes":
        return "Yes"
    # Before No, because "not mentioned" begins like one.
    if _UNKNOWN.search(text):
        return "Unknown"
    return "No" if first == "not" or _MEANINGS.get(first) == "No" else "Unknown"
