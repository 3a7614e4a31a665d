"""The pages that judges see, as data: `pages.toml`, with content after the papers' own pages."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.fields import built

KINDS = ("choice", "text", "checkbox", "utterances", "edits", "several")
SCALES = ("nominal", "ordinal", "interval")
# Utterances by speaker: the first one's stand on the left, the second one's on the right.
SPEAKERS = ("all", "left", "right")
CONTENT = ("narrative", "context", "options", "rots")
# Fields of the pages' own forms, here and on Mechanical Turk.
RESERVED = ("token", "action", "item", "consent", "task", "seed", "order", "seconds")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice. In a comparison `value` is below 0 for A, 0 for a tie, above 0 for B."""

    id: str
    text: str
    value: float | None = None
    colour: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a page.

    Kinds: `choice` (one of `choices`), `text`, `checkbox`, `utterances` (numbers of `speaker`'s).
    `edits` are new texts of utterances, `several` are numbers of the item's rules of thumb.

    `each` asks it once for every utterance of that speaker. `when` {question: [answers]} asks it
    only after one of these answers. A question `on_request` is left out unless a task wants it.
    `least` and `most` count characters of a text, utterances edited, or rules chosen.
    """

    id: str
    kind: str
    text: str
    help: str = ""
    choices: tuple[Choice, ...] = ()
    scale: str = "nominal"
    compares: bool = False
    required: bool = True
    speaker: str = "all"
    each: str = ""
    when: dict[str, Any] = dataclasses.field(default_factory=dict)
    least: int = 0
    most: int = 0
    on_request: bool = False

    NESTED = {"choices": Choice}  # noqa: RUF012 no field: it has no annotation

    def __post_init__(self) -> None:
        def check(good: bool, problem: str) -> None:
            if not good:
                raise ValueError(f"question {self.id!r}: {problem}")

        # The id names columns of CSV, fields of forms and XML attributes.
        plain = self.id.replace("_", "").isalnum() and self.id.isascii()
        check(plain, "the id may have letters, digits and _ only")
        reserved = self.id in RESERVED or self.id.startswith("_")
        check(not reserved, f"the id may not begin with _ or be one of {', '.join(RESERVED)}")
        check(self.kind in KINDS, f"got kind {self.kind!r}, expected one of {KINDS}")
        check(self.scale in SCALES, f"got scale {self.scale!r}, expected one of {SCALES}")
        check(self.speaker in SPEAKERS, f"got speaker {self.speaker!r}, expected {SPEAKERS}")
        check(self.each in ("", *SPEAKERS), f"got each {self.each!r}, expected {SPEAKERS}")
        check((self.kind == "choice") == bool(self.choices), "choices belong to the kind 'choice'")
        ids = [choice.id for choice in self.choices]
        check(len(set(ids)) == len(ids), f"two choices have one id: {ids}")
        numbered = all(choice.value is not None for choice in self.choices)
        check(numbered or (self.scale == "nominal" and not self.compares), "a choice has no value")
        values = [choice.value for choice in self.choices]
        mirrored = sorted(values) == sorted(-v for v in values) if self.compares else True
        check(mirrored, "the values of a comparison must be symmetric around 0")
        check(all(isinstance(v, list) for v in self.when.values()), "'when' needs lists of answers")


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: words for the judge, the content that an item must have (`shows`), questions."""

    name: str
    title: str
    shows: tuple[str, ...]
    questions: tuple[Question, ...]
    intro: str = ""
    guidelines: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    warning: str = ""
    consent: str = ""
    speakers: tuple[str, ...] = ("A", "B")  # names of the left and the right speaker
    option_name: str = ""  # "Response": the two options are Response A and Response B
    source: str = ""  # the paper's figure or section

    NESTED = {"questions": Question}  # noqa: RUF012

    def __post_init__(self) -> None:
        ids = [question.id for question in self.questions]
        if len(set(ids)) != len(ids) or not ids:
            raise ValueError(f"page {self.name!r}: got questions {ids}, expected different ids")
        if unknown := sorted(set(self.shows) - set(CONTENT)):
            raise ValueError(f"page {self.name!r}: got shows {unknown}, expected some of {CONTENT}")
        if len(self.speakers) != 2:
            raise ValueError(f"page {self.name!r}: expected the names of two speakers")
        for number, question in enumerate(self.questions):
            for name in question.when:
                # An earlier one, so that a form can be checked from top to bottom.
                if name not in ids[:number]:
                    raise ValueError(f"question {question.id!r}: no earlier question {name!r}")
            if question.compares and "options" not in self.shows:
                raise ValueError(f"question {question.id!r} compares, but nothing is compared")

    def question(self, name: str) -> Question:
        """Return the question with this id; KeyError if there is none."""
        return {question.id: question for question in self.questions}[name]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The numbers of a study of the papers."""

    page: str
    items: int
    judges_per_item: int
    study: str
    questions: tuple[str, ...] = ()  # of those on request
    kind: str = "predictions"  # or "corpora": what is compared
    not_casual: bool = False
    table: str = ""  # of tasks/paper_tables.toml


@functools.cache
def _data() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("pages.toml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Return the names of the pages that come with the package."""
    return list(_data()["pages"])


def presets() -> dict[str, Preset]:
    """Return the studies of the papers by name."""
    return {name: built(Preset, p, name) for name, p in _data()["presets"].items()}


def load(name: str, on_request: Iterable[str] = ()) -> Page:
    """Return a page of the package, or of a TOML file, with the questions of `on_request`.

    The file has the fields of one page, as `pages.toml` has them; its choices may be those of the
    package by name. Raises UserError for an unknown page, and for a file that is none.
    """
    if name.endswith(".toml"):
        try:
            given = tomllib.loads(Path(name).read_text(encoding="utf-8"))
            return _page({"name": Path(name).stem, **given}, on_request)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is no page: {error}", setting="page") from error
    if name not in names():
        known = f"{', '.join(names())}, or a file that ends in .toml"
        raise UserError(f"no page {name!r}: give one of {known}", setting="page")
    return _page({"name": name, **_data()["pages"][name]}, on_request)


def _page(given: dict[str, Any], on_request: Iterable[str]) -> Page:
    name, shared, wanted = given["name"], _data()["choices"], set(on_request)
    questions = []
    for question in given.get("questions", []):
        chosen = question.get("choices")
        if isinstance(chosen, str) and chosen not in shared:
            raise ValueError(f"no choices {chosen!r}: give one of {', '.join(shared)}, or a list")
        question = {**question, "choices": shared[chosen]} if isinstance(chosen, str) else question
        if not question.get("on_request") or question["id"] in wanted:
            questions.append({k: v for k, v in question.items() if k != "on_request"})
    if unknown := sorted(wanted - {question["id"] for question in questions}):
        raise UserError(f"page {name!r} has no question {unknown[0]!r}", setting="questions")
    defaults = {key: _data()[key] for key in ("warning", "consent")}
    return built(Page, {**defaults, **given, "questions": questions}, name)
