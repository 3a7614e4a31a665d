"""Potato 2: a configuration, items as JSON lines, and its annotators' states read back.

The configuration is JSON, which is YAML too. Potato shows everybody the same text, so A is the same
for all judges of an item, as in Label Studio. Questions about single utterances are there up to the
longest conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import DataError, shown
from data_pipeline.annotation import html, views
from data_pipeline.annotation.answers import Answer
from data_pipeline.annotation.assignment import shown_order
from data_pipeline.annotation.exchange.label_studio import all_fields
from data_pipeline.annotation.exchange.mturk import seconds
from data_pipeline.annotation.task_files import Item, Task

COIN = "potato"
OUTPUT = "annotation_output"
YES = "Yes"


def config(task: Task) -> str:
    """Return the configuration, as JSON, which is YAML."""
    made = {
        "annotation_task_name": f"{task.page.title} ({task.fingerprint})",
        "task_dir": ".",
        "output_annotation_dir": OUTPUT,
        "output_annotation_format": "jsonl",
        "data_files": ["items.jsonl"],
        "item_properties": {"id_key": "id", "text_key": "text"},
        "user_config": {"allow_all_users": True, "users": []},
        "assignment_strategy": "random",
        "max_annotations_per_item": task.judges_per_item,
        "annotation_schemes": [one for field in all_fields(task) for one in _schemes(task, field)],
    }
    return json.dumps(made, indent=1) + "\n"


def _schemes(task: Task, field: dict[str, Any]) -> list[dict[str, Any]]:
    kind, key = field["kind"], field["key"]
    # The places of a question are filled in the item's own text.
    asked = task.page.question(key.partition(".")[0])
    about = f" (utterance {field['utterance']})" if field["utterance"] else ""
    words = f"{asked.text}{about} {asked.help}".strip()
    needed = field["required"] and field["items"] == len(task.items) and not field["when"]
    rule = {"label_requirement": {"required": True}} if needed else {}
    if kind == "edits":
        return [
            {"annotation_type": "text", "name": f"{key}-{one['number']}",
             "description": f"{html.escaped(words)} Utterance {one['number']}:"}
            for one in field["numbered"]
        ]  # fmt: skip
    made = {"name": key, "description": html.escaped(words), **rule}
    if kind == "text":
        return [{"annotation_type": "text", **made}]
    if kind == "choice":
        labels = [choice["text"] for choice in field["choices"]]
        return [{"annotation_type": "radio", **made, "labels": labels}]
    labels = [str(one["number"]) for one in field.get("numbered", ())] or [YES]
    return [{"annotation_type": "multiselect", **made, "labels": labels}]


def items(task: Task, wanted: list[Item]) -> bytes:
    """Return the items as JSON lines; their text is HTML."""
    return json_lines.lines(
        {"id": item.id, "task": task.fingerprint, "text": _text(task, item)} for item in wanted
    )


def _text(task: Task, item: Item) -> str:
    page = task.page
    seen = views.view(page, item, shown_order(task, item, COIN) or (0, 1))
    head = [f"<p>{html.escaped(text)}</p>" for text in (seen["warning"], seen["intro"]) if text]
    guide = "".join(f"<li>{html.escaped(line)}</li>" for line in seen["guidelines"])
    parts = [f"<h4>{html.escaped(p['title'])}</h4>{html.part(p)}" for p in seen["parts"]]
    for field in seen["fields"]:
        lines = [f"{one['number']}. {one['text']}" for one in field.get("numbered", ())]
        if lines or field["text"] != page.question(field["key"].partition(".")[0]).text:
            asked = "".join(f"<li>{html.escaped(line)}</li>" for line in lines)
            parts.append(f"<h4>{html.escaped(field['text'])}</h4><ul>{asked}</ul>")
    return "".join([*head, f"<ul>{guide}</ul>", *parts])


def read_results(task: Task, path: Any) -> Iterator[tuple[int, str, Answer | str]]:
    """Yield (number, text, an answer or why there is none) of the states in Potato's folder.

    `path` is the study's folder, its output folder, or one user_state.json. Raises DataError for a
    path without any, or with items of another task.
    """
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.rglob("user_state.json"))
    states = [(file, _state(file)) for file in files]
    known = [name for _, s in states for name in s["instance_id_to_label_to_value"]]
    if not known or not any(name in task.by_id for name in known):
        raise DataError.at(
            path, None, "no annotations of this task" if not known else
            "the results are of another task",
            got=shown(known[0]) if known else f"{len(files)} files named user_state.json",
            expected="ids of the task's items", setting="input",
            remedy="Give the folder of the study that was exported.",
        )  # fmt: skip
    number = 0
    for _, state in states:
        for name, labels in state["instance_id_to_label_to_value"].items():
            number += 1
            try:
                made: Answer | str = _answer(task, state, name, labels)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                made = str(error) if isinstance(error, ValueError) else f"broken: {error!r}"
            yield number, json.dumps({"id": name, "labels": labels}), made


def _state(file: Path) -> dict[str, Any]:
    try:
        state = json_lines.value(file.read_bytes())
        if not isinstance(state.get("instance_id_to_label_to_value"), dict):
            raise ValueError("no field instance_id_to_label_to_value")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError.at(
            file, None, "not a state of a Potato annotator", got=str(error),
            expected="the user_state.json of Potato 2", remedy="Remove or restore the file.",
            setting="input",
        ) from None  # fmt: skip
    return state


def _answer(task: Task, state: dict[str, Any], name: str, labels: Any) -> Answer:
    item = task.by_id.get(name)
    if item is None:
        raise ValueError(f"unknown item: got {shown(name)}")
    ids = {
        field["key"]: {choice["text"]: choice["id"] for choice in field["choices"]}
        for field in views.view(task.page, item)["fields"]
    }
    form: dict[str, str] = {}
    for about, value in _pairs(labels):
        key, label = about["schema"], str(about["name"])
        if ids.get(key):
            # The chosen label is the name, with a mark "true", or the value in older files.
            text = label if str(value).lower() in views.CHECKED else str(value)
            if str(value).lower() != "false":
                form[key] = ids[key].get(text, text)
        elif str(value).lower() in views.CHECKED and label == YES:
            form[key] = "true"
        elif label.isdigit():
            form[f"{key}-{label}"] = str(value).lower()
        else:
            form[key] = str(value)
    times = (state.get("instance_id_to_behavioral_data") or {}).get(name) or {}
    taken = times.get("total_time_ms")
    return Answer(
        task.fingerprint,
        item.id,
        str(state.get("user_id") or "").strip(),
        views.form_answers(task.page, item, form),
        seconds(taken / 1000) if isinstance(taken, int | float) and taken > 0 else None,
        "",
        shown_order(task, item, COIN),
    )


def _pairs(labels: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield ({schema, name}, value) of a list of such pairs, or of {schema: {name: value}}."""
    if isinstance(labels, dict):
        for schema, values in labels.items():
            for name, value in values.items():
                yield {"schema": schema, "name": name}, value
        return
    for about, value in labels:
        yield about, value
