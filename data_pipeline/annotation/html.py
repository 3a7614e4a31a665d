"""Draw a view as HTML. Every text of a task is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from data_pipeline.annotation.answers import MAX_TEXT_CHARS

MAX_SHORT_CHARS = 20  # of choices that stand beside each other


def escaped(text: str) -> str:
    """Return a text as HTML in ASCII, on one line.

    Mechanical Turk refuses characters beyond U+FFFF in its CSV files, and fills in `${NAME}`.
    """
    safe = html.escape(text).replace("$", "&#36;")
    safe = safe.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "<br>")
    return safe.encode("ascii", "xmlcharrefreplace").decode()


def attribute(text: str) -> str:
    """Return a text as the value of an attribute, without its quotation marks."""
    safe = html.escape(text).replace("$", "&#36;")
    safe = safe.replace("\n", "&#10;").replace("\r", "&#13;")
    return safe.encode("ascii", "xmlcharrefreplace").decode()


def part(one: Mapping[str, Any]) -> str:
    """Return the content of one part of a view: a text, or bubbles."""
    if "text" in one:
        return f'<p class="text">{escaped(one["text"])}</p>'
    return "".join(
        f'<p class="bubble {b["side"]}"><b>{escaped(b["speaker"])}:</b> {escaped(b["text"])}</p>'
        for b in one["bubbles"]
    )


def questions(view: Mapping[str, Any], values: Mapping[str, str] = {}) -> str:
    """Return the questions of a view with their controls, which hold the `values` of a form."""
    made = []
    for number, field in enumerate(view["fields"], 1):
        conditions = ";".join(
            f"{key}={'|'.join(str(v).lower() if v is True else str(v) for v in values)}"
            for key, values in field["when"].items()
        )
        when = f' data-when="{attribute(conditions)}"' if conditions else ""
        legend = f'<span class="number">{number}</span>. {escaped(field["text"])}'
        note = f'<p class="help">{escaped(field["help"])}</p>' if field["help"] else ""
        if field["utterance"]:
            about = f"{field['utterance']}. {field['about']}"
            note = f'<p class="about">{escaped(about)}</p>{note}'
        made.append(
            f"<fieldset{when}><legend>{legend}</legend>{note}{_controls(field, values)}</fieldset>"
        )
    return "".join(made)


def _controls(field: Mapping[str, Any], values: Mapping[str, str]) -> str:
    key, kind = attribute(field["key"]), field["kind"]
    required = " required" if field["required"] else ""
    given = values.get(field["key"], "")
    if kind == "choice":
        choices = "".join(
            f'<label class="choice {attribute(c["colour"])}"><input type="radio" name="{key}" '
            f'value="{attribute(c["id"])}"{required}{_checked(given == c["id"])}> '
            f"{escaped(c['text'])}</label>"
            for c in field["choices"]
        )
        short = all(len(c["text"]) <= MAX_SHORT_CHARS for c in field["choices"])
        return f'<div class="choices{" short" if short else ""}">{choices}</div>'
    if kind == "text":
        least = max(field["least"], 1) if field["required"] else 0
        return (
            f'<textarea name="{key}" rows="3" data-least="{least}" maxlength="{MAX_TEXT_CHARS}" '
            f'aria-label="{attribute(field["text"])}"{required}>{_content(given)}</textarea>'
            '<p class="count"></p>'
        )
    if kind == "checkbox":
        on = _checked(bool(given))
        return (
            f'<label class="choice"><input type="checkbox" name="{key}"{required}{on}> Yes</label>'
        )
    rows = []
    for one in field["numbered"]:
        name, text = f"{key}-{one['number']}", f"{one['number']}. {escaped(one['text'])}"
        given = values.get(f"{field['key']}-{one['number']}", "")
        if kind == "edits":
            rows.append(
                f'<label class="edit">{text}<textarea name="{name}" rows="2" '
                f'maxlength="{MAX_TEXT_CHARS}">{_content(given)}</textarea></label>'
            )
        else:
            rows.append(
                f'<label class="choice"><input type="checkbox" name="{name}"'
                f"{_checked(bool(given))}> {text}</label>"
            )
    return f'<div data-numbered="{field["least"]} {field["most"]}">{"".join(rows)}</div>'


def _checked(on: bool) -> str:
    return " checked" if on else ""


def _content(text: str) -> str:
    # A browser drops the first newline of a textarea.
    return "\n" + attribute(text) if text else ""


def instructions(view: Mapping[str, Any], folded: bool = False) -> str:
    """Return the guidelines and examples of a view, which a judge can fold."""
    made = []
    for title, lines in (("Guidelines", view["guidelines"]), ("Examples", view["examples"])):
        if lines:
            items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
            state = "" if folded else " open"
            made.append(f"<details{state}><summary>{title}</summary><ol>{items}</ol></details>")
    return "".join(made)


def introduction(view: Mapping[str, Any]) -> str:
    """Return the words before an item: warning, purpose, guidelines, examples, consent."""
    return purpose(view) + consent(view)


def purpose(view: Mapping[str, Any]) -> str:
    """Return warning, purpose, guidelines and examples."""
    warning = escaped(view["warning"])
    note = f'<p class="warning" role="note">{warning}</p>' if warning else ""
    return f"{note}<p>{escaped(view['intro'])}</p>{instructions(view)}"


def consent(view: Mapping[str, Any]) -> str:
    """Return the box of consent, if the page asks for it."""
    if not view["consent"]:
        return ""
    return (
        '<label class="choice consent"><input type="checkbox" name="consent" required> '
        f"{escaped(view['consent'])}</label>"
    )
