"""Task files: a head line with the page and the rules of the study, then an item a line.

One format serves all pages. The head holds the whole page, so a task file needs no other file. Its
fingerprint covers head and items, and every answer carries it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.record_files import read_lines
from data_pipeline.annotation.fields import built, plain
from data_pipeline.annotation.pages import Page, Question

FORMAT = "annotation-task-1"
_PLACE = re.compile(r"\{(\w+)\}")  # in a question, for a text of the item
ROLES = ("item", "gold", "qualification")
MAX_UTTERANCES = 100  # of a context or an option


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to judge. `options` are the two compared, in the order of the task's systems.

    An utterance's speaker follows from its place: the first, third ... are the left one's.
    `speakers` names others, where turns do not alternate: "left" or "right" for each utterance of
    the context; `option_speakers` does so for each option. `texts` fill the {places} of questions.

    Gold and qualification items have `expected` {field: [answers]}, in terms of options: a
    comparison expects "first", "tie" or "second". `predicted` {question: answer} are a model's
    answers to measure; `about` is kept and shown to nobody.
    """

    id: str
    role: str = "item"
    narrative: str = ""
    context: tuple[str, ...] = ()
    speakers: tuple[str, ...] = ()
    options: tuple[tuple[str, ...], ...] = ()
    option_speakers: tuple[tuple[str, ...], ...] = ()
    rots: tuple[str, ...] = ()
    texts: dict[str, Any] = dataclasses.field(default_factory=dict)
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)
    predicted: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip():
            raise ValueError(f"field 'id': got {self.id!r}, expected a text without outer spaces")
        if self.role not in ROLES:
            raise ValueError(f"field 'role': got {self.role!r}, expected one of {ROLES}")
        if len(self.options) not in (0, 2):
            raise ValueError(f"field 'options': got {len(self.options)}, expected two or none")
        for name, turns, speakers in (
            ("context", self.context, self.speakers),
            *(
                ("options", option, speakers)
                for option, speakers in zip(
                    self.options, self.option_speakers or ((),) * len(self.options), strict=True
                )
            ),
        ):
            if len(turns) > MAX_UTTERANCES or not all(turn.strip() for turn in turns):
                raise ValueError(
                    f"field {name!r}: expected at most {MAX_UTTERANCES} utterances, none empty"
                )
            if speakers and (len(speakers) != len(turns) or not {*speakers} <= {"left", "right"}):
                raise ValueError(
                    f"field {name!r}: expected a speaker (left or right) for each utterance"
                )

    def side(self, utterance: int) -> str:
        """Return the side, left or right, of an utterance of the context (from 1)."""
        return sides(self.context, self.speakers)[utterance - 1]


def sides(turns: Sequence[str], speakers: Sequence[str] = ()) -> tuple[str, ...]:
    """Return left or right for each utterance: as given, else in turns from the left."""
    return tuple(speakers) or tuple(("left", "right")[i % 2] for i in range(len(turns)))


@dataclasses.dataclass(frozen=True)
class Field:
    """A question as asked of one item: `utterance` (from 1) if asked for each, else 0.

    `key` names it in answers: `label`, or `label.3` for the third utterance. `text` has its places
    filled.
    """

    key: str
    question: Question
    text: str
    utterance: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: page, rules and items.

    `systems` names the two that are compared. `qualification_pass` is the share of right answers to
    qualification items that lets a judge in. One gold item comes in every `gold_every` items, 0 for
    none. `wage` is what judges read about their pay. `made_by` is no part of the fingerprint.
    """

    page: Page
    items: tuple[Item, ...]
    seed: int = 0
    judges_per_item: int = 3
    systems: tuple[str, ...] = ()
    min_seconds: float = 0.0
    qualification_pass: float = 0.0
    gold_every: int = 0
    preset: str = ""
    wage: str = ""
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    NESTED = {"items": Item}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.judges_per_item < 1:
            raise ValueError(f"judges_per_item={self.judges_per_item}: expected 1 or more")
        if not 0 <= self.qualification_pass <= 1:
            raise ValueError(f"qualification_pass={self.qualification_pass}: expected 0 to 1")
        if self.gold_every < 0 or self.min_seconds < 0:
            raise ValueError("gold_every and min_seconds must be 0 or more")
        compares = "options" in self.page.shows
        if len(self.systems) != (2 if compares else 0) or len({*self.systems}) != len(self.systems):
            want = "the different names of two" if compares else "none: nothing is compared"
            raise ValueError(f"systems: got {list(self.systems)}, expected {want}")

    @functools.cached_property
    def by_id(self) -> Mapping[str, Item]:
        """Return the items by id."""
        return {item.id: item for item in self.items}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ for different tasks."""
        head = {**self.head(), "made_by": {}}
        text = json.dumps([head, plain(self.items)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def head(self) -> dict[str, Any]:
        """Return the head line: all but the items."""
        page = plain(self.page)
        values = {k: v for k, v in plain(self).items() if k not in ("items", "page")}
        return {"format": FORMAT, **values, "page": page}

    def of_role(self, role: str) -> list[Item]:
        """Return the items of a role, in the file's order."""
        return [item for item in self.items if item.role == role]


def fields(page: Page, item: Item) -> Iterator[Field]:
    """Yield the questions as asked of an item, in the page's order, utterance by utterance."""
    each = [question for question in page.questions if question.each]
    for question in page.questions:
        if not question.each:
            yield Field(question.id, question, filled(question.text, item))
    # All that is asked about one utterance stands together.
    for number in range(1, len(item.context) + 1):
        for question in each:
            if question.each in ("all", item.side(number)):
                key = f"{question.id}.{number}"
                yield Field(key, question, filled(question.text, item), number)


def filled(text: str, item: Item) -> str:
    """Return a question's text with {name} replaced by the item's texts."""
    for name, value in item.texts.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def check_item(page: Page, item: Item, compares_only: bool = False) -> None:
    """Raise ValueError if an item lacks what its page shows, or expects what is not asked."""
    for name in page.shows:
        # Rules of thumb may be absent: a situation need not have any.
        if name != "rots" and not getattr(item, name):
            raise ValueError(f"field {name!r} is missing, which page {page.name!r} shows")
    for question in page.questions:
        for place in _PLACE.findall(question.text):
            if not isinstance(item.texts.get(place), str) or not item.texts[place].strip():
                raise ValueError(f"field 'texts': no text {place!r}, which a question needs")
    if item.role == "item":
        return
    asked = {field.key: field.question for field in fields(page, item)}
    if not item.expected:
        raise ValueError(f"a {item.role} item expects no answer: field 'expected' is missing")
    for key, answers in item.expected.items():
        if key not in asked or asked[key].kind != "choice":
            raise ValueError(f"field 'expected': {key!r} is no question of choices on this page")
        known = {c.id for c in asked[key].choices}
        known = {"first", "tie", "second"} if asked[key].compares else known
        if not isinstance(answers, list) or not answers or not {*map(str, answers)} <= known:
            raise ValueError(
                f"field 'expected', {key!r}: got {shown(answers)}, expected a list of some of "
                f"{sorted(known)}"
            )


def read_task(path: Any) -> Task:
    """Return the task of a file; DataError names file, line and fault."""
    head, items, seen = None, [], {}

    def wrong(line: int | None, problem: str, got: str, expected: str, remedy: str) -> DataError:
        return DataError.at(
            path, line, problem, got=got, expected=expected, remedy=remedy, setting="task"
        )

    make_anew = "Make the task file anew, or correct the line."
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json_lines.value(line)
            if head is None:
                if not isinstance(row, dict) or row.get("format") != FORMAT:
                    what = row.get("format") if isinstance(row, dict) else row
                    raise wrong(
                        number, "no task file", f"format {shown(what)}", FORMAT,
                        "Give a file that `annotate pairs` or `annotate make` wrote.",
                    )  # fmt: skip
                given = {k: v for k, v in row.items() if k != "format"}
                page = built(Page, given.get("page"), "field 'page'")
                head = built(_Head, {**given, "page": {}}, "the head")
                continue
            item = item_of(row)
            check_item(page, item)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise wrong(
                number, "a broken line", str(error), "a line of a task file", make_anew
            ) from None
        if item.id in seen:
            raise wrong(
                number, "an id twice", f"{item.id!r}, as in line {seen[item.id]}",
                "a different id for each item", make_anew,
            )  # fmt: skip
        seen[item.id] = number
        items.append(item)
    if head is None or not items:
        what = "an empty file" if head is None else "a head line without items"
        raise wrong(None, "nothing to judge", what, "a head line and items", make_anew)
    values = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}
    try:
        return Task(**{**values, "page": page, "items": tuple(items)})
    except ValueError as error:
        raise wrong(1, "a broken head", str(error), "a head line", make_anew) from None


@dataclasses.dataclass(frozen=True)
class _Head:
    """The head line as read: a Task without its page and items."""

    page: dict[str, Any]
    seed: int = 0
    judges_per_item: int = 3
    systems: tuple[str, ...] = ()
    min_seconds: float = 0.0
    qualification_pass: float = 0.0
    gold_every: int = 0
    preset: str = ""
    wage: str = ""
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)


def item_of(row: Any) -> Item:
    """Return a line of a task file as an item; ValueError names the fault."""
    if not isinstance(row, dict):
        raise ValueError(f"got {shown(row)}, expected an object")
    nested = {k: row[k] for k in ("options", "option_speakers") if k in row}
    for name, value in nested.items():
        if not isinstance(value, list) or not all(
            isinstance(one, list) and all(isinstance(text, str) for text in one) for one in value
        ):
            raise ValueError(f"field {name!r}: got {shown(value)}, expected lists of texts")
    plain_fields = {k: v for k, v in row.items() if k not in nested}
    item = built(Item, plain_fields, "the item")
    return dataclasses.replace(item, **{k: tuple(map(tuple, v)) for k, v in nested.items()})


def write_task(path: Any, task: Task) -> None:
    """Write a task file. Raises UserError, or ValueError for an item that its page cannot show."""
    for item in task.items:
        check_item(task.page, item)
    write_atomic(path, json_lines.lines([task.head(), *map(plain, task.items)]))
