"""Make plain data of what a page shows, and read answers from the fields of a form.

Servers and exports draw the same view. A form has a field for each control. A choice, text or box
is `KEY`. A question about several utterances or rules has `KEY-N` for the N-th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.annotation.answers import is_asked, utterance_numbers
from data_pipeline.annotation.pages import Page
from data_pipeline.annotation.task_files import Item, fields, sides

NUMBERED = ("utterances", "edits", "several")  # kinds with a control for each number
CHECKED = ("true", "on", "yes")


def view(page: Page, item: Item, order: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """Return everything that a judge sees of an item, as JSON values.

    `parts` are the story, the conversation and the two options, in the order given. `fields` are
    the questions with their controls.
    """
    parts: list[dict[str, Any]] = []
    if item.narrative:
        parts.append({"name": "narrative", "title": "Story", "text": item.narrative})
    if item.context:
        bubbles = _bubbles(item.context, item.speakers, page.speakers)
        parts.append({"name": "context", "title": "Conversation", "bubbles": bubbles})
    for letter, place in zip("ab", order if item.options else (), strict=False):
        own = item.option_speakers[place] if item.option_speakers else ()
        option, title = item.options[place], f"{page.option_name} {letter.upper()}"
        part: dict[str, Any] = {"name": f"dialog{letter}", "title": title}
        if len(option) == 1 and item.context:  # one response, to a conversation
            part["text"] = option[0]
        else:
            part["bubbles"] = _bubbles(option, own, ("Speaker 1", "Speaker 2"))
        parts.append(part)
    return {
        "page": page.name,
        "title": page.title,
        "intro": page.intro,
        "guidelines": list(page.guidelines),
        "examples": list(page.examples),
        "warning": page.warning,
        "consent": page.consent,
        "item": item.id,
        "parts": parts,
        "fields": [_field(field, item) for field in fields(page, item)],
    }


def _bubbles(
    turns: Sequence[str], speakers: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    name = {"left": names[0], "right": names[1]}
    return [
        {"number": number, "side": side, "speaker": name[side], "text": text}
        for number, (side, text) in enumerate(zip(sides(turns, speakers), turns, strict=True), 1)
    ]


def _field(field: Any, item: Item) -> dict[str, Any]:
    question = field.question
    suffix = f".{field.utterance}" if field.utterance else ""
    each = {name for name in question.when if suffix}
    made = {
        "key": field.key,
        "kind": question.kind,
        "text": field.text,
        "help": question.help,
        "required": question.required,
        "utterance": field.utterance,
        "about": item.context[field.utterance - 1] if field.utterance else "",
        "least": question.least,
        "most": question.most,
        "choices": [{"id": c.id, "text": c.text, "colour": c.colour} for c in question.choices],
        "when": {f"{n}{suffix}" if n in each else n: list(v) for n, v in question.when.items()},
    }
    if question.kind in ("utterances", "edits"):
        numbers = utterance_numbers(question, item)
        made["numbered"] = [{"number": n, "text": item.context[n - 1]} for n in numbers]
    elif question.kind == "several":
        made["numbered"] = [{"number": n, "text": rot} for n, rot in enumerate(item.rots, 1)]
    return made


def form_answers(page: Page, item: Item, form: Mapping[str, str]) -> dict[str, Any]:
    """Return the answers in the fields of a form, without what was not asked or left empty.

    They still have to be checked (`answers.check_answers`).
    """
    made: dict[str, Any] = {}
    for field in fields(page, item):
        question, key = field.question, field.key
        # A page may keep the text of a box that it has hidden again.
        if not is_asked(field, made):
            continue
        if question.kind in NUMBERED:
            numbers = (
                range(1, len(item.rots) + 1)
                if question.kind == "several"
                else utterance_numbers(question, item)
            )
            given = {n: form.get(f"{key}-{n}", "").strip() for n in numbers}
            if question.kind == "edits":
                same = {n: item.context[n - 1].strip() for n in given}
                made[key] = {str(n): t for n, t in given.items() if t and t != same[n]}
            else:
                made[key] = [n for n, text in given.items() if text.lower() in CHECKED]
            continue
        value = form.get(key, "").strip()
        if question.kind == "checkbox":
            made[key] = value.lower() in CHECKED
        elif value:
            made[key] = value
    # A box that must be agreed to, and was not, is an answer left out.
    return {k: v for k, v in made.items() if not (v is False and _needed(page, k))}


def _needed(page: Page, key: str) -> bool:
    return page.question(key.partition(".")[0]).required
