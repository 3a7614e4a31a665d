"""The small dialogue grammar behind the sample corpus: scripts, slots and how they expand.

A *script* is text.  Lines are utterances, a blank line separates alternatives, and a line
beginning with ``---`` starts the next stage (``--- optional`` may be skipped).  A dialogue takes
one alternative from each stage, in order, so a line may rely on every alternative of the stage
before it ending in the same kind of question.  Inside a line ``(this|that)`` is a choice of
phrasing and ``{slot}`` a value drawn once for the whole dialogue.

*Slots* are lines ``name: value; value`` or, for values that belong together,
``name, other: value, value; value, value``: one row is drawn for all the names of a line.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")
_OPTIONAL_CHANCE = 0.4
_SHORT_CHANCE = 0.35

_WOMEN = [
    "Amara",
    "Beth",
    "Clara",
    "Dora",
    "Elena",
    "Fiona",
    "Gina",
    "Hana",
    "Ines",
    "Julia",
    "Kira",
    "Lucy",
    "Maya",
    "Nora",
    "Olga",
    "Priya",
    "Rosa",
    "Sara",
    "Tara",
    "Zoe",
]
_MEN = [
    "Adam",
    "Ben",
    "Carlos",
    "Dan",
    "Eli",
    "Felix",
    "George",
    "Hugo",
    "Ivan",
    "Jack",
    "Kofi",
    "Leo",
    "Max",
    "Noah",
    "Omar",
    "Paul",
    "Raj",
    "Simon",
    "Tom",
    "Victor",
]
_PRONOUNS = {
    "f": {"he": "she", "him": "her", "his": "her"},
    "m": {"he": "he", "him": "him", "his": "his"},
}
_COMMON_SLOTS = """
day: Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday
hour: three; four; five; six; seven; eight
"""


class GrammarError(ValueError):
    """A grammar file says something that cannot be expanded."""


@dataclass(frozen=True)
class Stage:
    """One step of a script: alternatives, each a list of utterances."""

    optional: bool
    alternatives: tuple[tuple[str, ...], ...]


def parse_script(text: str) -> list[Stage]:
    """Split a script's text into stages."""
    stages: list[Stage] = []
    for index, part in enumerate(re.split(r"^---", text.strip(), flags=re.MULTILINE)):
        optional = False
        if index:
            header, _, part = part.partition("\n")
            optional = header.strip() == "optional"
            if header.strip() not in ("", "optional"):
                raise GrammarError(f"unknown stage header: {header.strip()!r}")
        alternatives = tuple(
            tuple(line.strip() for line in block.strip().splitlines())
            for block in re.split(r"\n\s*\n", part.strip())
            if block.strip()
        )
        if not alternatives:
            raise GrammarError("a stage has no utterances")
        stages.append(Stage(optional, alternatives))
    for stage in stages[:-1]:
        # An odd stage would hand the next one's first line to the wrong speaker.
        odd = [alt[0] for alt in stage.alternatives if len(alt) % 2]
        if odd:
            raise GrammarError(f"odd number of utterances before the last stage: {odd[0]!r}")
    return stages


def parse_slots(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Read slot lines into (names, rows) pairs."""
    tables = []
    for line in text.strip().splitlines():
        head, colon, body = line.partition(":")
        names = [name.strip() for name in head.split(",")]
        rows = [
            [cell.strip() for cell in row.split(",")] if len(names) > 1 else [row.strip()]
            for row in body.split(";")
            if row.strip()
        ]
        if not colon or not rows:
            raise GrammarError(f"not a slot line: {line!r}")
        for row in rows:
            if len(row) != len(names):
                raise GrammarError(f"{len(names)} names but {len(row)} values: {row}")
        tables.append((names, rows))
    return tables


def draw_slots(text: str, rng: random.Random) -> dict[str, str]:
    """Draw a value for every slot of `text`, the common slots, and three different people."""
    slots: dict[str, str] = {}
    people = rng.sample([(n, "f") for n in _WOMEN] + [(n, "m") for n in _MEN], 3)
    for letter, (name, gender) in zip("XYZ", people, strict=True):
        slots[letter] = name
        prefix = "" if letter == "X" else letter.lower()
        for pronoun, word in _PRONOUNS[gender].items():
            slots[prefix + pronoun] = word
    for names, rows in parse_slots(_COMMON_SLOTS + text.strip()):
        slots.update(zip(names, rng.choice(rows), strict=True))
    return slots


def expand(template: str, slots: dict[str, str], rng: random.Random) -> str:
    """Settle the choices of a template, fill its slots and tidy its spaces."""

    def value(match: re.Match[str]) -> str:
        key = match.group(1)
        if key in slots:
            return slots[key]
        lower = key[0].lower() + key[1:]
        if lower in slots:  # {Thing} is {thing} at the start of a sentence
            return slots[lower][0].upper() + slots[lower][1:]
        raise GrammarError(f"unknown slot {{{key}}} in {template!r}")

    text = template
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    while _SLOT.search(text):  # a slot's value may itself name a slot
        text = _SLOT.sub(value, text)
    text = re.sub(r"\s+([,.!?])", r"\1", re.sub(r"\s+", " ", text)).strip()
    # A slot's value decides between "a" and "an"; "a used book" keeps its "a".
    text = re.sub(r"\b([Aa]) (?=[aeioAEIO]|u(?!s|ni))", r"\1n ", text)
    return text[0].upper() + text[1:]


def draw_dialogue(script: list[Stage], slots: dict[str, str], rng: random.Random) -> list[str]:
    """One walk through the stages of a script, as utterances."""
    lines: list[str] = []
    for stage in script:
        if stage.optional and rng.random() > _OPTIONAL_CHANCE:
            continue
        lines.extend(expand(line, slots, rng) for line in rng.choice(stage.alternatives))
    if rng.random() < _SHORT_CHANCE:
        # A short dialogue must not leave a question open.
        ends = [end for end in range(4, len(lines), 2) if not lines[end - 1].endswith("?")]
        lines = lines[: rng.choice(ends)] if ends else lines
    return lines


def load_grammar(prefix: str) -> list[dict]:
    """Read the entries of every `sample_corpus_<prefix>*.toml` beside this file, in name order."""
    entries: list[dict] = []
    for path in sorted(Path(__file__).parent.glob(f"sample_corpus_{prefix}*.toml")):
        with path.open("rb") as file:
            entries.extend(tomllib.load(file)["entry"])
    names = [entry["name"] for entry in entries]
    if not names or len(set(names)) != len(names):
        raise GrammarError(f"sample_corpus_{prefix}*.toml: missing, or a name occurs twice")
    return entries
