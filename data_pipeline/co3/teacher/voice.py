"""Make the scripted teacher's answers: the prompt gives the stage, its hash the words."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import tomllib
from pathlib import Path
from typing import Any

from data_pipeline.co3 import prompts as prompt_files
from data_pipeline.co3.teacher import self_chat

_PHRASES = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
_JOIN = "\x00"  # between the messages of a conversation
# These get No where the prompt asks for a person, so that the filter drops some.
_STRANGE = re.compile(r"\b(dog|cat|tree|broom|refrigerator|reflection|dragon|imaginary|robot)\b")

# A line `KEY: question [id = text; id = text]`, and the ids in its brackets.
_QUESTION = re.compile(r"^([\w.]+): .+ \[(\w+ = .+)\]$", re.MULTILINE)
_CHOICE = re.compile(r"(?:^|; )(\w+) = ")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion; `likely` is {word: log-probability} of its first token, if it is an answer."""

    text: str
    finish_reason: str = "stop"
    likely: dict[str, float] | None = None


class Voice:
    """Answers to the prompts of a file, by recognising their templates."""

    def __init__(self, prompts: prompt_files.Prompts):
        table = prompts.table
        self._patterns = {"completion": [], "chat": []}
        # The longest templates first: a short one may match what is meant for a longer.
        for stage in sorted(prompt_files.STAGES, key=lambda s: -len(table[s]["completion"])):
            contents = [message["content"] for message in table[stage]["chat"]]
            self._patterns["completion"].append((stage, _pattern(table[stage]["completion"])))
            self._patterns["chat"].append((stage, _pattern(_JOIN.join(contents))))

    def recognise(self, form: str, asked: str | list[dict]) -> tuple[str, dict[str, str]]:
        """Return (stage, fields) of a prompt, or ("", {}) if it is not CO3's."""
        if form == "chat":
            asked = _JOIN.join(str(message.get("content")) for message in asked)
        for stage, pattern in self._patterns[form]:
            # The whole prompt, because a story may quote another one.
            found = pattern.fullmatch(asked)
            if found:
                return stage, found.groupdict()
        return "", {}

    def answer(self, form: str, asked: str | list[dict], seed: int) -> Answer:
        """Return the answer to a prompt; `seed` chooses among the possible ones."""
        chance = random.Random(seed)
        # First, because a question of CO3 ends in "A:" too, after any context.
        if (line := self_chat.answer(asked, chance)) is not None:
            return Answer(line if form == "chat" else f" {line}")
        stage, fields = self.recognise(form, asked)
        if stage == "narrative":
            text = _narrative(fields["literal"], chance)
            return Answer(text if form == "chat" else f"\n\n{text}")
        if stage == "speaker":
            lists = ("strange_partners", "partners")
            # 4% of the partners are no people, for the filters to find.
            return Answer(" " + _draw(chance, lists[chance.random() > 0.04]))
        if stage in ("dialogue", "continuation"):
            return _dialogue(fields, chance, chat=form == "chat", start=stage == "dialogue")
        if stage == "human":
            return _decision(chance, ("Yes", "No"), not _STRANGE.search(fields["speaker"].lower()))
        if stage:
            # As the paper's model answers Yes: 95% for heads, 68% for relations and tails.
            share = 0.95 if stage == "head" else 0.7
            return _decision(chance, ("Yes", "No", "Unknown"), chance.random() < share)
        if form == "chat":
            asked = _JOIN.join(str(message.get("content")) for message in asked)
        # The questions of a study (`annotate judge`): any of the choices.
        if lines := [
            f"{key}: {_pick(chance, _CHOICE.findall(choices))}"
            for key, choices in _QUESTION.findall(str(asked))
        ]:
            return Answer("\n".join(lines))
        return Answer("That is hard to say.")


def spoiled(kind: str, seed: int) -> Answer:
    """Return a bad answer: "empty", "refusal" or "garbage"."""
    chance = random.Random(seed)
    if kind == "empty":
        return Answer("")
    return Answer(_pick(chance, _PHRASES["refusals" if kind == "refusal" else "garbage"]))


def moderation(text: str, seed: int) -> dict[str, float]:
    """Return a moderation's scores of a text, seldom above 0.5."""
    chance = random.Random(seed)
    names = ("harassment", "hate", "self-harm", "sexual", "violence")
    scores = {name: round(chance.random() ** 8 * 0.2, 6) for name in names}
    # One text in a hundred is above the threshold.
    if chance.random() < 0.01:
        scores[_pick(chance, names)] = 0.91
    return scores


def tokens(text: str) -> int:
    """Return about as many tokens as a text has."""
    # Four letters a token, as `limits.estimate` counts them.
    return max(1, len(text) // 4) if text else 0


def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    seen: set[str] = set()
    out = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            out.append(re.escape(part))
        elif part in seen:
            # A field that occurs again has the same text.
            out.append(f"(?P={part})")
        else:
            seen.add(part)
            out.append(f"(?P<{part}>.+?)")
    return re.compile("".join(out), re.DOTALL)


def _pick(chance: random.Random, choices: Any) -> Any:
    # Not chance.choice: only random() keeps its sequence in all versions of Python.
    return choices[int(chance.random() * len(choices))]


def _draw(chance: random.Random, name: str, **fields: str) -> str:
    phrase = _pick(chance, _PHRASES[name])
    if "{" not in phrase:
        return phrase
    return phrase.format(
        place=_pick(chance, _PHRASES["places"]),
        time=_pick(chance, _PHRASES["times"]),
        thing=_pick(chance, _PHRASES["things"]),
        **fields,
    )


def _narrative(literal: str, chance: random.Random) -> str:
    """Return two or three sentences; sometimes too many, or the literal alone."""
    x = literal.split()[0].removesuffix("'s").strip(".,")
    odd = chance.random()
    if odd < 0.05:
        return literal
    # The literal's sentences become one, because four sentences are asked for again.
    told = re.sub(r"\.\s+(Now )?", lambda found: ", and now " if found[1] else ", and ", literal)
    sentences = [told.strip().rstrip(",")]
    if odd < 0.12 or odd > 0.55:
        sentences.insert(0, _draw(chance, "narrative_openings", x=x))
    if odd < 0.75:
        sentences.append(_draw(chance, "narrative_endings", x=x))
    if odd < 0.12:
        sentences += [_draw(chance, "narrative_endings", x=x) for _ in range(2)]
    return " ".join(sentences)


def _decision(chance: random.Random, choices: tuple[str, ...], first: bool) -> Answer:
    """Return one of the words, with the log-probabilities of all."""
    word = choices[0] if first else _pick(chance, choices[1:])
    sure = 0.6 + 0.39 * chance.random()
    # The remainder is shared by the other answers and the end of the line.
    rest = (1 - sure) / len(choices)
    likely = {f" {c}": round(math.log(sure if c == word else rest), 6) for c in choices}
    likely["\n"] = round(math.log(rest), 6)
    return Answer(f" {word}", likely=likely)


def _dialogue(fields: dict[str, str], chance: random.Random, *, chat: bool, start: bool) -> Answer:
    """Return a conversation in one of many layouts, most of them good."""
    x = fields["x"]
    y = fields["y"]
    y = y[0].upper() + y[1:]
    for word in ("His ", "Her ", "The ", "A "):
        y = y.removeprefix(word)
    y = y[0].upper() + y[1:]
    odd = chance.random()
    # Without a middle there are three turns, fewer than the filter wants.
    middle = 0 if odd < 0.03 else 1 + int(5 * chance.random())
    turns = _turns(x, y, fields["narrative"], chance, middle)
    if not start:
        # A continuation is the end of a conversation.
        turns = turns[-4:]
        # Our prompt ends with this speaker's name, so the answer has to begin with their turn. The
        # published code's prompt ends after a turn.
        if not turns[0][0].startswith(fields.get("next", "")[:3]):
            turns = turns[1:]
    reason = "stop"
    if 0.03 <= odd < 0.07:  # a third one joins in
        turns.insert(4, ("Stranger", "Sorry to interrupt, is this seat taken?"))
    elif 0.07 <= odd < 0.10:  # it goes round in circles
        turns = turns[:4] + turns[2:4] * 3
    elif 0.10 <= odd < 0.13:
        reason = "length"
        turns[-1] = (turns[-1][0], turns[-1][1][: len(turns[-1][1]) // 2])
    return Answer(_laid_out(turns, x, y, chance, chat=chat), reason)


def _turns(x: str, y: str, narrative: str, chance: random.Random, middle: int) -> list:
    """Return (speaker, utterance) pairs: 2 * middle + 4 of them, or 3 if `middle` is 0."""
    event = [s for s in re.split(r"(?<=[.!?])\s+", narrative.strip()) if s.startswith(x)]
    told = _first_person(_pick(chance, event), x) if event else "it is a long story."
    said: set[str] = set()

    def say(name: str, **more: str) -> str:
        # Several draws, because a repeated utterance is a fault.
        for _ in range(4):
            line = _draw(chance, name, x=x, y=y, **more)
            if line not in said:
                break
        said.add(line)
        return line

    turns = [(x, say("hello")), (y, say("hello_back")), (x, say("tell", event=told))]
    for _ in range(middle - 1):
        asks = chance.random() < 0.5
        turns.append((y, say("asks" if asks else "advice")))
        turns.append((x, say("answers" if asks else "agrees")))
    if middle:
        turns += [(y, say("advice")), (x, say("closings")), (y, say("closings_back"))]
    return turns


def _first_person(sentence: str, x: str) -> str:
    """Put a sentence about X into the first person: "Ann goes home." becomes "I go home."."""
    told = re.sub(rf"\b{re.escape(x)}'s\b", "my", sentence)
    told = re.sub(rf"\b{re.escape(x)}\b", "I", told)
    odd = {"is": "am", "has": "have", "was": "was", "does": "do", "goes": "go"}

    def verb(found: re.Match) -> str:
        word = found[1]
        if word in odd:
            return f"I {odd[word]}"
        if word.endswith("ies"):
            return f"I {word[:-3]}y"
        if word.endswith(("shes", "ches", "sses", "xes")):
            return f"I {word[:-2]}"
        return f"I {word[:-1]}" if word[-2:] not in ("ss", "us", "is") else found[0]

    return re.sub(r"\bI (\w+s)\b", verb, told)


def _laid_out(turns: list, x: str, y: str, chance: random.Random, *, chat: bool) -> str:
    """Lay the turns out as models do: the first prefix is missing, names are bold, and so on."""
    layout = chance.random()
    between = "\n\n" if layout > 0.8 else "\n"
    lines = []
    for number, (name, words) in enumerate(turns):
        if layout < 0.08:
            line = f"**{name}:** {words}"
        elif layout < 0.12:
            line = f"{number + 1}. {name}: {words}"
        elif layout < 0.16:
            line = f"{name}: \u201c{words}\u201d"
        else:
            line = f"{name}: {words}"
        lines.append(line)
    if not chat and layout >= 0.16:  # the prompt ends with "X:"
        lines[0] = f" {turns[0][1]}"
    odd = chance.random()
    if odd < 0.03:
        lines.insert(3, _draw(chance, "narration", x=x, y=y))
    elif odd < 0.06:
        lines.append(between + _draw(chance, "commentary"))
    elif odd < 0.08:
        lines[2] = turns[2][1]  # a prefix forgotten
    return between.join(lines)
