"""Draft dialogues by self-chat: the model plays the problematic and the inquisitive speaker.

Kim et al. 2022, section 3.2 and appendix A.2. A dialogue is a dictionary of JSON values, so that
each stage can store it. `turns` are its utterances, `candidates` rules of thumb to choose from. The
functions are generators of requests, which open no socket.

Choices that the paper does not give: an answer that cannot be used is asked for twice more.
"""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.calls.requests import Rejected, Response, Stage
from data_pipeline.co3 import texts
from data_pipeline.co3.prompts import Prompts
from data_pipeline.prosocial.prompts import dialogue
from data_pipeline.prosocial.situations import MAX_CANDIDATES, Situation

MIN_QUESTION_WORDS = 4
MAX_UTTERANCE_CHARS = 1000
RETRIES = 2  # after the first answer that cannot be used
_SPEAKER = re.compile(r"^(?:[AQ]|Utterance|Rule of thumb)\s*:\s*")
_BARE_WORDS = (
    "why what how who when where which whose whom really so is are do does did and but that it "
    "then come not exactly"
)
_INTERROGATIVES = frozenset(_BARE_WORDS.split())


def draft(situation: Situation, prompts: Prompts, rules: int = 3) -> Stage[dict | Rejected]:
    """Draft u1 to u3 of a situation, and candidate rules where its source gives none.

    `rules` are asked for. Return the dialogue, or Rejected if an utterance cannot be had.
    """
    known: dict[str, Any] = {"situation": situation.text, "source": situation.source}
    attempts: dict[str, int] = {}
    if situation.source == "sbic":
        # The post itself, because a person wrote it as an utterance.
        first = situation.text
    else:
        first = yield from _line(
            situation.id, "utterance", prompts, known, attempts, situation=situation.text
        )
        if isinstance(first, Rejected):
            return first
    turns = [first]
    for stage in ("question", "reason"):
        said = yield from _line(
            situation.id, stage, prompts, {**known, "turns": turns}, attempts, earlier=turns,
            dialogue=dialogue(turns),
        )  # fmt: skip
        if isinstance(said, Rejected):
            return said
        turns.append(said)
    candidates = list(situation.rots)
    if not candidates:
        candidates = yield from _rules(situation, prompts, rules, attempts)
    return {
        "id": situation.id,
        "source": situation.source,
        "split": situation.split,
        "etc": situation.etc,
        "situation": situation.text,
        "candidates": candidates[:MAX_CANDIDATES],
        "candidates_by": _BY[situation.source] if situation.rots else "model",
        "draft": list(turns),
        "turns": turns,
        "attempts": attempts,
        "prompts": prompts.version,
        "rounds": [],
        "validations": [],
        "marks": [] if candidates else ["no candidate rule of thumb"],
    }


_BY = {
    "socialchemistry": "source",
    "sbic": "stereotypes",
    "ethics_amt": "given",
}


def continuation(record: dict[str, Any], prompts: Prompts) -> Stage[str | Rejected]:
    """Ask for the problematic speaker's next utterance after the worker's response."""
    turns = record["turns"]
    # The number of turns is part of the name, so that each round has answers of its own.
    name = f"{record['id']}#{len(turns) + 1}"
    return (
        yield from _line(
            name, "reason", prompts, {"turns": turns}, {}, earlier=turns, dialogue=dialogue(turns)
        )
    )


def _rules(
    situation: Situation, prompts: Prompts, rules: int, attempts: dict[str, int]
) -> Stage[list[str]]:
    """Ask for rules of thumb; return the different ones, maybe none."""
    found: dict[str, str] = {}
    for attempt in range(rules):
        response = yield prompts.request("rule", situation.id, attempt, situation=situation.text)
        text = cleaned(response.text)
        if not fault(text, response, "rule", ()):
            found.setdefault(texts.same(text), text)
    attempts["rule"] = rules
    return list(found.values())


def _line(
    name: str,
    stage: str,
    prompts: Prompts,
    known: dict[str, Any],
    attempts: dict[str, int],
    earlier: list[str] | tuple[str, ...] = (),
    **fields: str,
) -> Stage[str | Rejected]:
    """Ask for one line until it can be used; count the attempts under the stage's name."""
    last = problem = ""
    for attempt in range(RETRIES + 1):
        response = yield prompts.request(stage, name, attempt, **fields)
        last = response.text
        text = cleaned(last)
        problem = fault(text, response, stage, earlier)
        if not problem:
            attempts[stage] = attempt + 1
            return text
    return Rejected(name, f"draft: {stage}", problem, {**known, "answer": last[:500]})


def cleaned(answer: str) -> str:
    """Return the first line of an answer, without a speaker's mark and quotes around it."""
    for line in texts.plain(answer).split("\n"):
        line = _SPEAKER.sub("", line.strip()).strip()
        if line and not texts.is_preamble(line):
            return " ".join(texts.unquoted(line).split())
    return ""


def fault(text: str, response: Response, stage: str, earlier: list[str] | tuple[str, ...]) -> str:
    """Return why a line cannot be used, "" if it can."""
    if response.fault:
        return response.fault
    if texts.is_refusal(response.text):
        return "refusal"
    words = texts.words(text)
    if not words:
        return "empty answer"
    if response.finish_reason == "length" or len(text) > MAX_UTTERANCE_CHARS:
        return "cut short"
    if stage == "question":
        # The examples rephrase the utterance, so that "Why?" does not come (appendix A.2).
        if len(words) < MIN_QUESTION_WORDS:
            return "question of fewer than four words"
        if all(word.lower() in _INTERROGATIVES for word in words):
            return "an interrogative alone"
    if texts.same(text) in {texts.same(turn) for turn in earlier}:
        return "repeated utterance"
    return ""
