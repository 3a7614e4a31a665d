"""Label Studio: a labelling configuration (XML), tasks (JSON), and its JSON export read back.

Label Studio shows every annotator the same task, so A is the same for all judges of an item: the
coin of (seed, item). Questions about single utterances are there up to the longest conversation.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.record_files import read_lines
from data_pipeline.annotation import views
from data_pipeline.annotation.answers import Answer
from data_pipeline.annotation.assignment import shown_order
from data_pipeline.annotation.exchange.mturk import order_of, seconds
from data_pipeline.annotation.task_files import Item, Task

COIN = "label-studio"  # in place of the judge, whom an export does not know
YES = "Yes"


def _name(key: str) -> str:
    # A dot would end the name of a variable.
    return key.replace(".", "__")


def all_fields(task: Task) -> list[dict[str, Any]]:
    """Return every field that any item has, in order, with the most numbered controls seen."""
    made: dict[str, dict[str, Any]] = {}
    for item in task.items:
        for field in views.view(task.page, item)["fields"]:
            known = made.setdefault(field["key"], {**field, "count": 0, "items": 0})
            known["items"] += 1
            numbers = [one["number"] for one in field.get("numbered", ())]
            known["count"] = max([known["count"], *numbers])
            if len(numbers) > len(known.get("numbered", ())):
                known["numbered"] = field["numbered"]
    return list(made.values())


def config(task: Task) -> str:
    """Return the labelling configuration."""
    page, view = task.page, ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value=page.title)
    for text in (page.warning, page.intro, *page.guidelines, *page.examples):
        if text:
            ElementTree.SubElement(view, "Header", value=text, size="5")
    target = ""
    for name, title in (("narrative", "Story"), ("context", "Conversation")):
        if any(getattr(item, name) for item in task.items):
            ElementTree.SubElement(view, "Header", value=title)
            _text(view, name)
            target = target or name
    if "options" in page.shows:
        both = ElementTree.SubElement(view, "View", style="display: flex; gap: 1em")
        for letter in "ab":
            side = ElementTree.SubElement(both, "View", style="flex: 1")
            title = f"{page.option_name} {letter.upper()}"
            ElementTree.SubElement(side, "Header", value=title)
            _text(side, f"dialog{letter}")
            target = target or "dialoga"
    if not target:
        # Every question needs a text that it is about, and a survey's page shows none.
        _text(view, "item")
        target = "item"
    for field in all_fields(task):
        _question(view, field, target, task)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _text(parent: ElementTree.Element, name: str) -> None:
    ElementTree.SubElement(parent, "Text", name=name, value=f"${name}", granularity="word")


def _question(parent: ElementTree.Element, field: dict[str, Any], target: str, task: Task) -> None:
    name, kind = _name(field["key"]), field["kind"]
    ElementTree.SubElement(parent, "Header", value=f"$q_{name}", size="4")
    # Shorter conversations lack the field, so Label Studio may not demand it.
    required = field["required"] and field["items"] == len(task.items)
    rules = {"name": name, "toName": target, "required": str(bool(required)).lower()}
    for key, values in field["when"].items():
        texts = _condition(task, key, values)
        if texts:
            rules |= {"visibleWhen": "choice-selected", "whenTagName": _name(key),
                      "whenChoiceValue": texts}  # fmt: skip
    if kind == "text":
        ElementTree.SubElement(parent, "TextArea", maxSubmissions="1", editable="true", **rules)
    elif kind == "edits":
        for one in field["numbered"]:
            own = {**rules, "name": f"{name}-{one['number']}", "required": "false"}
            place = f"{one['number']}."
            ElementTree.SubElement(parent, "TextArea", maxSubmissions="1", placeholder=place, **own)
    else:
        single = kind == "choice"
        tag = ElementTree.SubElement(
            parent, "Choices", choice="single" if single else "multiple", **rules
        )
        texts = [c["text"] for c in field["choices"]] if single else [YES]
        if kind in ("utterances", "several"):
            texts = [str(one["number"]) for one in field["numbered"]]
            tag.set("required", str(bool(field["least"])).lower())
        for text in texts:
            ElementTree.SubElement(tag, "Choice", value=text)


def _condition(task: Task, key: str, values: list[Any]) -> str:
    question = task.page.question(key.partition(".")[0])
    if question.kind == "checkbox":
        return YES
    texts = [choice.text for choice in question.choices if choice.id in values]
    # A comma separates values there, so such a choice cannot be a condition.
    return ",".join(texts) if not any("," in text for text in texts) else ""


def tasks(task: Task, items: list[Item]) -> str:
    """Return the tasks to import, as JSON."""
    return json.dumps([{"data": data(task, item)} for item in items], indent=1) + "\n"


def data(task: Task, item: Item) -> dict[str, str]:
    """Return the variables of an item: plain texts, which Label Studio escapes."""
    order = shown_order(task, item, COIN)
    seen = views.view(task.page, item, order or (0, 1))
    made = {"task": task.fingerprint, "item": item.id, "order": ",".join(map(str, order))}
    for part in seen["parts"]:
        made[part["name"]] = part.get("text") or "\n".join(
            f"{b['number']}. {b['speaker']}: {b['text']}" for b in part["bubbles"]
        )
    questions = {f"q_{_name(f['key'])}": "(not asked here)" for f in all_fields(task)}
    for field in seen["fields"]:
        lines = [f"{one['number']}. {one['text']}" for one in field.get("numbered", ())]
        about = [f"{field['utterance']}. {field['about']}"] if field["utterance"] else []
        said = [field["text"], field["help"], *about, *lines]
        questions[f"q_{_name(field['key'])}"] = "\n".join(text for text in said if text)
    return made | questions


def read_results(task: Task, path: Any) -> Iterator[tuple[int, str, Answer | str]]:
    """Yield (number of the task, its text, an answer or why there is none) of a JSON export.

    Raises DataError for a file that is not an export, or of another task.
    """
    text = "".join(line for _, line in read_lines(path))
    try:
        rows = json_lines.value(text)
    except ValueError as error:
        rows, text = None, str(error)
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("data"), dict) for row in rows
    )
    if not good or not rows:
        raise DataError.at(
            path, None, "not a JSON export of Label Studio", got=shown(text[:200]),
            expected="a list of tasks with data and annotations",
            remedy="Export the project as JSON (not JSON-MIN).", setting="input",
        )  # fmt: skip
    found = {str(row["data"].get("task")) for row in rows}
    if task.fingerprint not in found:
        raise DataError.at(
            path, None, "the results are of another task", got=shown(sorted(found)[0]),
            expected=task.fingerprint, remedy="Give the task file that was exported.",
            setting="task",
        )  # fmt: skip
    for number, row in enumerate(rows, 1):
        annotations = row.get("annotations")
        for one in annotations if isinstance(annotations, list) else ():
            try:
                made: Answer | str = _answer(task, row["data"], one)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                made = str(error) if isinstance(error, ValueError) else f"broken: {error!r}"
            yield number, json.dumps(one), made


def _answer(task: Task, data: dict[str, Any], annotation: dict[str, Any]) -> Answer:
    if data.get("task") != task.fingerprint:
        raise ValueError(f"of another task: got {shown(data.get('task'))}")
    item = task.by_id.get(data.get("item"))
    if item is None:
        raise ValueError(f"unknown item: got {shown(data.get('item'))}")
    if annotation.get("was_cancelled"):
        raise ValueError("the annotator skipped it")
    ids = {
        _name(field["key"]): {choice["text"]: choice["id"] for choice in field["choices"]}
        for field in views.view(task.page, item)["fields"]
    }
    form: dict[str, str] = {}
    for one in annotation["result"]:
        name, value = one["from_name"], one["value"]
        key = name.replace("__", ".")
        if one["type"] == "textarea":
            form[key] = "\n".join(value["text"])
            continue
        for text in value["choices"]:
            if text == YES and not ids.get(name):
                form[key] = "true"
            elif text.isdigit() and text not in ids.get(name, {}):
                form[f"{key}-{text}"] = "true"
            else:
                form[key] = ids.get(name, {}).get(text, text)
    by = annotation.get("completed_by")
    by = by.get("email") or by.get("id") if isinstance(by, dict) else by
    if by is None:
        raise ValueError("nobody is named as its annotator")
    return Answer(
        task.fingerprint,
        item.id,
        str(by) if isinstance(by, str) else f"label-studio-{by}",
        views.form_answers(task.page, item, form),
        seconds(annotation.get("lead_time")),
        str(annotation.get("created_at", "")),
        order_of(item, str(data.get("order", ""))),
    )
