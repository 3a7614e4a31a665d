"""Answers of judges: checked, appended to a file, read back with every bad line set aside.

A line is {task, item, judge, answers, seconds, time, order}. `order` has the numbers of the two
options, from 0, as the judge saw them: [1, 0] showed the second one as A. A judge whose name begins
with "model:" is a model.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.tasks.record_files import read_lines
from data_pipeline.annotation.fields import built, plain
from data_pipeline.annotation.pages import Page, Question
from data_pipeline.annotation.task_files import Field, Item, Task, fields

MODEL = "model:"
ORDERS = ((0, 1), (1, 0))
MAX_TEXT_CHARS = 20_000
MAX_SECONDS = 1e9  # 31 years: above it a sum of times overflows
_JUDGE = re.compile(r"\S(.{0,198}\S)?")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A judge's answers to one item: {field key: answer}."""

    task: str
    item: str
    judge: str
    answers: dict[str, Any]
    seconds: float | None = None
    time: str = ""
    order: tuple[int, ...] = ()

    @property
    def by_model(self) -> bool:
        """Return whether a model gave the answers."""
        return self.judge.casefold().startswith(MODEL)

    def line(self) -> bytes:
        """Return the line of the answers file."""
        return json_lines.line(plain(self))


class FieldError(ValueError):
    """A fault of one field's answer: `key` names the field, `expected` is the rule in words."""

    def __init__(self, key: str, problem: str, expected: str):
        super().__init__(f"question {key!r}: {problem}")
        self.key, self.expected = key, expected


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """A line that cannot be used: file, line, reason, and the line itself."""

    file: str
    line: int
    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """The usable answers of some files, and the lines that were set aside."""

    kept: tuple[Answer, ...]
    quarantined: tuple[Quarantined, ...] = ()
    # Judges whose name stands in several files: it is unknown whether they are one person.
    shared_names: tuple[str, ...] = ()
    # Judges whose names differ in case or spaces alone: one person may count as several.
    similar_names: tuple[tuple[str, ...], ...] = ()

    def people(self) -> list[Answer]:
        """Return the answers of people."""
        return [answer for answer in self.kept if not answer.by_model]

    def models(self) -> dict[str, list[Answer]]:
        """Return the answers of each model, by its judge name."""
        made: dict[str, list[Answer]] = {}
        for answer in self.kept:
            if answer.by_model:
                made.setdefault(answer.judge, []).append(answer)
        return made


def check_answers(page: Page, item: Item, answers: Any, texts_required: bool = True) -> None:
    """Raise ValueError for answers that the page does not allow; FieldError names a field.

    Models need not write texts: `texts_required` False.
    """
    if not isinstance(answers, Mapping):
        raise ValueError(f"got {shown(answers)}, expected answers by question")
    asked = {field.key: field for field in fields(page, item)}
    if unknown := [key for key in answers if key not in asked]:
        raise ValueError(f"unknown question {shown(unknown[0])}, expected some of {list(asked)}")
    for field in asked.values():
        wanted, given = is_asked(field, answers), answers.get(field.key)
        if field.key in answers and not wanted:
            raise FieldError(field.key, "answered, although it was not asked", "no answer")
        if field.key in answers:
            _check_value(field, item, given)
            continue
        may_lack = not field.question.required
        if not texts_required and field.question.kind != "choice":
            may_lack = True  # a model need not write texts
        if wanted and not may_lack:
            raise FieldError(field.key, "not answered", "an answer")


def is_asked(field: Field, answers: Mapping[str, Any]) -> bool:
    """Return whether the earlier answers let a question be asked (`Question.when`)."""
    for name, wanted in field.question.when.items():
        key = f"{name}.{field.utterance}" if field.utterance else name
        if answers.get(key, answers.get(name)) not in wanted:
            return False
    return True


def _check_value(field: Field, item: Item, value: Any) -> None:
    question, key = field.question, field.key

    def check(good: bool, expected: str) -> None:
        if not good:
            raise FieldError(key, f"got {shown(value)}, expected {expected}", expected)

    if question.kind == "choice":
        ids = [choice.id for choice in question.choices]
        check(isinstance(value, str) and value in ids, f"one of {ids}")
    elif question.kind == "text":
        check(isinstance(value, str) and len(value) <= MAX_TEXT_CHARS, "a text")
        check(json_lines.is_whole(value), "characters that UTF-8 can encode")
        least = max(question.least, 1) if question.required else 0
        check(len(value.strip()) >= least, f"at least {least} characters")
    elif question.kind == "checkbox":
        check(isinstance(value, bool), "true or false")
        check(value or not question.required, "true: it has to be agreed to")
    elif question.kind == "utterances":
        allowed = utterance_numbers(question, item)
        good = isinstance(value, list) and all(type(n) is int and n in allowed for n in value)
        check(good and len({*value}) == len(value), f"different numbers of {allowed}")
        check(bool(value) or not question.required, "at least one utterance")
    elif question.kind == "several":
        allowed = list(range(1, len(item.rots) + 1))
        good = isinstance(value, list) and all(type(n) is int and n in allowed for n in value)
        check(good and len({*value}) == len(value), f"different numbers of {allowed}")
        check(question.least <= len(value) <= question.most, f"{question.least} or more"
              f", at most {question.most}")  # fmt: skip
    else:
        good = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        check(good, "new texts by number of utterance")
        allowed = list(map(str, utterance_numbers(question, item)))
        check({*value} <= {*allowed}, f"numbers of {allowed}")
        for number, text in value.items():
            check(0 < len(text.strip()) <= MAX_TEXT_CHARS, "no empty text")
            check(json_lines.is_whole(text), "characters that UTF-8 can encode")
            same = text.strip() == item.context[int(number) - 1].strip()
            check(not same, f"another text than utterance {number} has already")
        check(len(value) >= question.least, f"at least {question.least} rewritten")


def utterance_numbers(question: Question, item: Item) -> list[int]:
    """Return the numbers (from 1) of the utterances that a question is about."""
    numbers = range(1, len(item.context) + 1)
    return [n for n in numbers if question.speaker in ("all", item.side(n))]


def check_answer(task: Task, answer: Answer) -> None:
    """Raise ValueError if an answer does not belong to the task, or breaks a rule of its page."""
    if answer.task != task.fingerprint:
        raise ValueError(f"of another task: got {answer.task!r}, expected {task.fingerprint!r}")
    item = task.by_id.get(answer.item)
    if item is None:
        raise ValueError(f"unknown item: got {shown(answer.item)}")
    check_judge(answer.judge)
    if item.options and answer.order not in ORDERS:
        raise ValueError(f"order: got {shown(answer.order)}, expected [0, 1] or [1, 0]")
    if not item.options and answer.order:
        raise ValueError(f"order: got {shown(answer.order)}, but nothing is compared")
    if answer.seconds is not None and not 0 <= answer.seconds < MAX_SECONDS:
        raise ValueError(f"seconds: got {answer.seconds:g}, expected 0 to {MAX_SECONDS:g}")
    too_fast = answer.seconds is not None and answer.seconds < task.min_seconds
    if too_fast and not answer.by_model:
        raise ValueError(
            f"answered too fast: got {answer.seconds:g} s, less than {task.min_seconds:g} s"
        )
    check_answers(task.page, item, answer.answers, texts_required=not answer.by_model)


def check_judge(name: str) -> None:
    """Raise ValueError for a name that no judge can have."""
    if not _JUDGE.fullmatch(name) or not name.isprintable():
        raise ValueError(f"judge: got {shown(name)}, expected a name of 1 to 200 printable "
                         "characters without outer spaces")  # fmt: skip


def check_person(name: str) -> None:
    """Raise ValueError for a name that no person can have: a model's vote is not a person's."""
    check_judge(name)
    if name.casefold().startswith(MODEL):
        raise ValueError(f"judge: got {shown(name)}, but a name with {MODEL!r} is a model's")


def read_answers(task: Task, paths: Sequence[Any]) -> Answers:
    """Return the answers of files to a task, with every line that cannot be used set aside.

    Raises DataError for a file in which every answer is of another task, and for files without any
    answer.
    """
    kept: list[Answer] = []
    bad: list[Quarantined] = []
    seen: dict[tuple, str] = {}
    files_of: dict[str, set[str]] = {}
    for path in paths:
        lines, others = 0, []  # of this file: usable JSON, and the tasks of those of other tasks
        for number, line in read_lines(path):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                answer = built(Answer, _row(line), "the answer")
                lines += 1
                others += [answer.task] * (answer.task != task.fingerprint)
                check_answer(task, answer)
                # A model answers in both orders.
                key = (answer.judge, answer.item, answer.order if answer.by_model else ())
                if key in seen:
                    raise ValueError(
                        f"doubled: got judge {answer.judge!r} and item {answer.item!r} again, "
                        f"which are in {seen[key]}"
                    )
                seen[key] = place
            except ValueError as error:
                bad.append(Quarantined(str(path), number, str(error), line.rstrip("\n")))
                continue
            kept.append(answer)
            files_of.setdefault(answer.judge, set()).add(str(path))
        if others and len(others) == lines:
            raise DataError.at(
                path, None, "the answers are of another task", got=shown(others[0]),
                expected=f"answers to the task {task.fingerprint}",
                remedy="Give the task file that these answers were made with.", setting="answers",
            )  # fmt: skip
    if not kept and not bad:
        raise DataError.at(
            ", ".join(map(str, paths)), None, "no answers", got="no line",
            expected="at least one answer", remedy="Correct the path.", setting="answers",
        )  # fmt: skip
    shared = sorted(name for name, files in files_of.items() if len(files) > 1)
    return Answers(tuple(kept), tuple(bad), tuple(shared), similar_names(files_of))


def same_person(name: str) -> str:
    """Return what two names have in common that a reader would take for one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def similar_names(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that a reader would take for one person."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(same_person(name), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _row(line: str) -> Any:
    try:
        return json_lines.value(line)
    except ValueError as error:
        # The last line of a file that a kill or a full disk cut is such a line.
        raise ValueError(f"the line is cut or damaged: got {error}") from None


def check_file(path: Any) -> None:
    """Raise UserError for a place that no answers can be appended to: a folder, a device."""
    path = Path(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{path} is {what}: give the path of a file", setting="answers")


def lock_answers(path: Path) -> TextIO:
    """Return the open lock of an answers file, which one process holds until it closes it.

    Raises UserError while another process holds it, for a folder that cannot be written, and as
    `check_file` does.
    """
    check_file(path)
    try:
        durable.make_folder(path.parent)
        lock = open(f"{path}.lock", "a+")  # noqa: SIM115 the caller closes it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", setting="answers") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if not isinstance(error, BlockingIOError):
            raise UserError(f"cannot lock {path}: {error.strerror}", setting="answers") from error
        raise UserError(
            f"{path} is in use by another process, such as `annotate serve`: stop it, or give "
            "another file (`annotate report` reads several)",
            setting="answers",
        ) from None
    return lock


def append_answers(path: Any, answers: Iterable[Answer]) -> None:
    """Append answers to a file and sync it. Raises UserError; then the file may end in a cut line.

    A line that an earlier write left without its end is ended first.
    """
    append_lines(path, b"".join(answer.line() for answer in answers))


def append_lines(path: Any, lines: bytes) -> None:
    """Append whole lines to a file, as `append_answers` does."""
    path = Path(path)
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            # One write, so that a kill cuts at most the end.
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        durable.sync(path.parent)  # the name of a new file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", setting="answers") from error


def write_quarantined(path: Any, quarantined: Sequence[Quarantined]) -> None:
    """Write the lines set aside, each with its reason, to a JSON lines file; none: no file."""
    path = Path(path)
    if quarantined:
        write_atomic(path, json_lines.lines(map(plain, quarantined)))
    else:
        path.unlink(missing_ok=True)
