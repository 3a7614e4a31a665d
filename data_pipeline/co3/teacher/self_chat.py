"""Play the two speakers of a ProsocialDialog's draft, and write its rules of thumb, by a script.

A prompt is recognised by its end, so that prompts of other words are recognised too. "Q:" and "A:"
follow a dialogue of lines A and Q. "Utterance:" and "Rule of thumb:" follow "Situation: ...".
"""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

_PHRASES = tomllib.loads(Path(__file__).with_name("self_chat.toml").read_text(encoding="utf-8"))
_SITUATION = re.compile(r"(?:^|\n)Situation: ([^\n]+)\n(Utterance|Rule of thumb):$")
_DIALOGUE = re.compile(r"(?:^|\n\n)(A: [^\n]*\n(?:[AQ]: [^\n]*\n)*)([AQ]):$")
_SECOND = {
    "i": "you", "i'm": "you are", "i've": "you have", "i'll": "you will", "me": "you",
    "my": "your", "mine": "yours", "myself": "yourself", "am": "are", "was": "were",
}  # fmt: skip
# How often A accepts criticism, and Q asks too short a question, for the filter to find.
ACCEPTS_SHARE, SHORT_SHARE = 0.35, 0.08


def answer(asked: str | list[dict], chance: random.Random) -> str | None:
    """Return the next line that a prompt asks for, None if it is no prompt of a draft."""
    text = asked if isinstance(asked, str) else str(asked[-1].get("content") if asked else "")
    if found := _SITUATION.search(text):
        situation, wanted = found.groups()
        return _pick(chance, "rules") if wanted == "Rule of thumb" else utterance(situation)
    found = _DIALOGUE.search(text)
    if not found:
        return None
    turns = [line[3:] for line in found[1].splitlines()]
    if found[2] == "Q":
        if chance.random() < SHORT_SHARE:
            return _pick(chance, "short_questions")
        return _pick(chance, "questions").format(told=second_person(turns[0]))
    if len(turns) < 3:
        return _pick(chance, "reasons")
    return _pick(chance, "accepting" if chance.random() < ACCEPTS_SHARE else "rejecting")


def utterance(situation: str) -> str:
    """Return a situation in the first person: "not going home" is "I'm not going home."."""
    text = situation.strip().rstrip(".")
    words = text.split()
    if words[0].lower().strip(",") in ("i", "i'm", "my", "i've"):
        return f"{text}."
    text = text[0].lower() + text[1:]
    if words[0].lower().endswith("ing") or (words[0].lower() == "not" and len(words) > 1):
        return f"I'm {text}."
    return f"I have to tell you about this: {text}."


def second_person(text: str) -> str:
    """Return an utterance about the other one: "I took my car." is "you took your car"."""
    first = re.split(r"(?<=[.!?])\s", text.strip())[0].rstrip(".!?")
    if first[1:2].islower():
        first = first[0].lower() + first[1:]
    words = [_SECOND.get(word.lower(), word) for word in first.split()]
    return " ".join(words) or "that"


def _pick(chance: random.Random, name: str) -> str:
    choices = _PHRASES[name]
    # Not chance.choice: only random() keeps its sequence in all versions of Python.
    return choices[int(chance.random() * len(choices))]
