"""Mechanical Turk: one HTML page, the CSV of its variables, and the results read back.

The page is a plain form with its style and script inside, so it needs no other host. Amazon's own
crowd-form loads its elements from a server of theirs, and works in their editor alone. A plain form
works as an HTMLQuestion, inside a form that the requester's editor adds, and from a file.

A is chosen in the worker's browser by the coin of (seed, item, worker), and sent with the answer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.record_files import read_table
from data_pipeline.annotation import html, views
from data_pipeline.annotation.answers import Answer
from data_pipeline.annotation.task_files import Item, Task

_PARTS = ("narrative", "context", "dialoga", "dialogb")
VARIABLES = ("task", "item", "seed", *_PARTS, "questions")


def page_html(task: Task) -> str:
    """Return the page of a task, with `${NAME}` for each of VARIABLES that it shows."""
    page = task.page
    example = views.view(page, task.items[0])
    sections = "".join(
        f"<section><h2>{title}</h2><div>${{{name}}}</div></section>"
        for name, title in (("narrative", "Story"), ("context", "Conversation"))
        if name in page.shows or any(getattr(item, name) for item in task.items)
    )
    if "options" in page.shows:
        both = "".join(
            f"<section><h2>{html.escaped(page.option_name)} {letter.upper()}</h2>"
            f'<div id="dialog{letter}">${{dialog{letter}}}</div></section>'
            for letter in "ab"
        )
        sections += f'<div class="options">{both}</div>'
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    scripts = (here.parent / "form.js", here / "page.js")
    script = "".join(path.read_text(encoding="utf-8") for path in scripts)
    hidden = "".join(
        f'<input type="hidden" name="{name}" value="{value}">'
        for name, value in (
            ("task", "${task}"), ("item", "${item}"), ("seed", "${seed}"), ("order", ""),
            ("seconds", ""),
        )
    )  # fmt: skip
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escaped(page.title)}</title><style>\n{style}</style></head><body>"
        f"<h1>{html.escaped(page.title)}</h1>"
        '<form id="page" method="post" '
        'action="https://www.mturk.com/mturk/externalSubmit">'
        '<input type="hidden" name="assignmentId" id="assignment" value="">'
        f"{hidden}{html.introduction(example)}{sections}${{questions}}"
        f'<button type="submit">Submit</button></form><script>\n{script}</script></body></html>\n'
    )


def variables(task: Task, item: Item) -> dict[str, str]:
    """Return the values of VARIABLES for an item: HTML in ASCII, on one line each."""
    seen = views.view(task.page, item)
    parts = {one["name"]: html.part(one) for one in seen["parts"]}
    return {
        "task": task.fingerprint,
        "item": html.attribute(item.id),
        "seed": str(task.seed),
        **{name: parts.get(name, "") for name in _PARTS},
        "questions": html.questions(seen),
    }


def items_csv(task: Task, items: list[Item]) -> str:
    """Return the CSV of variables, a row an item."""
    text = io.StringIO()
    writer = csv.DictWriter(text, VARIABLES, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(variables(task, item) for item in items)
    return text.getvalue()


def read_results(task: Task, path: Any) -> Iterator[tuple[int, str, Answer | str]]:
    """Yield (line, its text, an answer or why there is none) for each row of a results CSV.

    Raises DataError for a file that is not a results CSV, or of another task.
    """
    rows = list(read_table(path, delimiter=","))
    names = rows[0][1].keys() if rows else []
    needed = ("WorkerId", "Input.task", "Answer.item")
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError.at(
            path, 1, "not a results CSV", got=f"columns {shown(list(names))}",
            expected=", ".join(needed), remedy="Give the file that Mechanical Turk offers as "
            "results.", setting="input",
        )  # fmt: skip
    tasks = {row["Input.task"] for _, row in rows}
    if task.fingerprint not in tasks:
        raise DataError.at(
            path, 2, "the results are of another task", got=shown(sorted(tasks)[0]),
            expected=task.fingerprint, remedy="Give the task file that was exported.",
            setting="task",
        )  # fmt: skip
    for place, row in rows:
        try:
            made: Answer | str = _answer(task, row)
        except ValueError as error:
            made = str(error)
        yield place.line, repr(dict(row)), made


def _answer(task: Task, row: dict[str, str]) -> Answer:
    if row["Input.task"] != task.fingerprint:
        raise ValueError(f"of another task: got {row['Input.task']!r}")
    if row.get("AssignmentStatus") == "Rejected":
        raise ValueError("the assignment was rejected")
    item = task.by_id.get(row["Answer.item"])
    if item is None:
        raise ValueError(f"unknown item: got {shown(row['Answer.item'])}")
    # The worker's browser sends the form; the column Input.item is Mechanical Turk's own.
    if row.get("Input.item", html.attribute(item.id)) != html.attribute(item.id):
        raise ValueError(f"of another item: got {item.id!r} in the row of {row['Input.item']!r}")
    form = {name.removeprefix("Answer."): value for name, value in row.items()
            if name.startswith("Answer.") and value is not None}  # fmt: skip
    return Answer(
        task.fingerprint,
        item.id,
        row["WorkerId"].strip(),
        views.form_answers(task.page, item, form),
        seconds(form.get("seconds") or row.get("WorkTimeInSeconds")),
        row.get("SubmitTime", ""),
        order_of(item, form.get("order", "")),
    )


def seconds(text: Any) -> float | None:
    """Return a number of seconds, or None if the text is not a number."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < 1e9 else None


def order_of(item: Item, text: str) -> tuple[int, ...]:
    """Return the order in a form's field "0,1" or "1,0", empty if nothing is compared."""
    if not item.options:
        return ()
    orders = {"0,1": (0, 1), "1,0": (1, 0)}
    if text not in orders:
        raise ValueError(f"order: got {shown(text)}, expected 0,1 or 1,0")
    return orders[text]
