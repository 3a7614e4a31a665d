"""Filter conversations (Kim et al. 2023, section 3.1, appendix B.1).

Each filter is a function of a record that returns a reason to drop it, or None, in the paper's
order. Two filters need a model's answers: is this speaker a person, and moderation. The generators
at the end ask for them and store them in the record, so that filtering again asks nobody.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from cosmo.tasks.namebook import Namebook
from data_pipeline.calls import answer_text
from data_pipeline.calls.requests import Request, Stage
from data_pipeline.co3 import commonsense, prompts
from data_pipeline.co3 import texts as texts_of
from data_pipeline.co3.dialogue import repetitions
from data_pipeline.co3.schema import Record

_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_HUMAN, _NOT_HUMAN, _GROUP = (
    frozenset(_LISTS["speakers"][name].split()) for name in ("human", "not_human", "group")
)
_UNREAL = frozenset(("imaginary", "robot", "stuffed", "toy", "ghost", "talking", "narrator"))
_VARIABLE = re.compile(r"\bPerson ?[XYZ]\b(?!-)|\[(?:name|your name|person)\b", re.IGNORECASE)
_INTERVENTION = "__needs_intervention__"
# The paper's criteria, which drop about 1%. A service's names may be longer: "sexual/minors".
MODERATED = ("violence", "hate", "sexual")


def lexical(record: Record) -> str | None:
    """Find erroneous patterns (1): repetition, missing prefixes, prefixes in a turn, variables.

    Marks of reasoning, templates and fences are patterns too.
    """
    # Every attempt had this fault, and the longest was kept.
    if "dialogue: missing prefix" in record.marks:
        return "missing prefix"
    # One is allowed, as when the conversation was made.
    if repetitions(record.dialogue) > 1:
        return "repetition"
    # Emoji and punctuation alone are no utterance.
    if not all(any(c.isalnum() for c in said) for said in record.dialogue):
        return "empty utterance"
    # With a space before it below, so that "Joann:" is no "Ann:".
    prefixes = tuple(f"{name}:" for name in dict.fromkeys(record.speakers))
    for said in record.dialogue:
        if ":" in said and any(f" {prefix}" in f" {said}" for prefix in prefixes):
            return "prefix within a turn"
    text = "\n".join((record.narrative, *record.dialogue))
    if answer_text.mark_in("\n".join((text, record.interlocutor, *set(record.speakers)))):
        return "mark of a model's format"
    # Few texts have either, and a search for them is faster than the expression.
    if ("[" in text or "PERSON" in text.upper()) and _VARIABLE.search(text):
        return "open variable"
    return None


def turn_count(record: Record, least: int = 4, most: int = 20) -> str | None:
    """Require four to twenty turns (2)."""
    if len(record.dialogue) < least:
        return f"fewer than {least} turns"
    return f"more than {most} turns" if len(record.dialogue) > most else None


def speaker_count(record: Record) -> str | None:
    """Require exactly two speakers, neither of them a group such as "Friends" (3)."""
    speakers = set(record.speakers)
    if len(speakers) != 2:
        return "more than two speakers" if len(speakers) > 2 else "one speaker"
    people = {record.x, record.y, record.z}
    # Not those of the triple, because their names were drawn from given names.
    if any(_words(name)[-1:] and _words(name)[-1] in _GROUP for name in speakers - people):
        return "more than two speakers"
    return None


def human(speaker: str, record: Record, names: Namebook) -> bool | None:
    """Return whether a speaker is human by the words of the label; None if only a model decides.

    The last word decides ("dog walker" is a human, "Ann's dog" is none), then names, then any word.
    The paper checks names first, then words for humans, and asks about all others. The two lists of
    non-human words (here and words.toml) are ours: they reject without a question.
    """
    if speaker in (record.x, record.y, record.z):
        return True
    words = _words(speaker)
    # Before the last word, because an "imaginary friend" ends like a human.
    if not words or _UNREAL & set(words):
        return False
    if words[-1] in _HUMAN:
        return True
    if words[-1] in _NOT_HUMAN:
        return False
    # A name that is a word too ("Hope") decides nothing.
    named = [word for word in speaker.split() if word in names and word not in names.words]
    if named or _HUMAN & set(words):
        return True
    return record.human.get(speaker)


def human_speakers(record: Record, names: Namebook) -> str | None:
    """Require human speakers (4). One that is not known to be human passes until asked."""
    verdicts = [human(name, record, names) for name in dict.fromkeys(record.speakers)]
    return "speaker is not human" if False in verdicts else None


def canary(record: Record, labels: Mapping[str, str] | None) -> str | None:
    """Drop dialogues that need intervention by Canary's labels (5); None: there are no labels."""
    if labels is None:
        return None
    # Nobody has judged it, so it must not pass as safe.
    if record.id not in labels:
        return "no label of Canary"
    return "Canary: needs intervention" if labels[record.id] == _INTERVENTION else None


def moderation(record: Record, threshold: float = 0.5) -> str | None:
    """Drop moderation scores above the threshold (6); "hate/threatening" counts as hate."""
    for criterion in MODERATED:
        scores = (score for name, score in record.scores.items() if name.startswith(criterion))
        if max(scores, default=threshold) > threshold:
            return f"moderation: {criterion}"
    return None


def head_event(record: Record) -> str | None:
    """Drop narratives without the head (7). Unknown passes, as in the published rows."""
    # In the paper 95% get Yes, with a precision of 97%, and No drops 1.7%.
    return "head is not in the narrative" if record.head_answer == "No" else None


def ask_human(record: Record, names: Namebook, texts: prompts.Prompts) -> Stage[Record]:
    """Ask whether a speaker is a person, where names and words do not decide.

    A reply without an answer is a mark, and decides nothing.
    """
    answers, marks = dict(record.human), record.marks
    # Each once, in the order of turns, so that a second run makes the same requests.
    for speaker in dict.fromkeys(record.speakers):
        if human(speaker, record, names) is None:
            response = yield texts.request("human", record.id, speaker=speaker)
            answer = commonsense.plain_answer(response, ("Yes", "No"))
            if answer:
                answers[speaker] = answer == "Yes"
            else:
                marks = (*marks, f"human: {response.fault}")
    return dataclasses.replace(record, human=answers, marks=marks)


def ask_moderation(record: Record) -> Stage[Record]:
    """Ask a moderation service for scores of narrative and conversation."""
    text = "\n".join((record.narrative, *record.dialogue))
    response = yield Request(record.id, "moderation", 0, text)
    return dataclasses.replace(record, scores=dict(response.scores or {}))


def _words(name: str) -> list[str]:
    """Return lower-case words without numbers ("Friend 1") and possessive endings."""
    # Possessives go first, so that "Ann's dog" ends in the word that decides.
    name = texts_of.composed(name.lower().replace("'s", ""))
    # Marks count as letters, so that no word is cut at an accent.
    spans = re.finditer(r"[^\W\d_][\w-]*", texts_of.with_letters(name))
    return [name[slice(*match.span())] for match in spans]
