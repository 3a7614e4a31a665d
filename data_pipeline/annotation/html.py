"""Draw a view as HTML. Every text of a task is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


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


def questions(view: Mapping[str, Any]) -> str:
    """Return the questions of a view with their controls."""
    made = []
    for number, field in enumerate(view["fields"], 1):
        conditions = ";".join(
            f"{key}={'|'.join(str(v).lower() if v is True else str(v) for v in values)}"
            for key, values in field["when"].items()
        )
        when = f' data-when="{attribute(conditions)}"' if conditions else ""
        legend = f"{number}. {escaped(field['text'])}"
        note = f'<p class="help">{escaped(field["help"])}</p>' if field["help"] else ""
        if field["utterance"]:
            about = f"{field['utterance']}. {field['about']}"
            note = f'<p class="about">{escaped(about)}</p>{note}'
        made.append(f"<fieldset{when}><legend>{legend}</legend>{note}{_controls(field)}</fieldset>")
    return "".join(made)


def _controls(field: Mapping[str, Any]) -> str:
    key, kind = attribute(field["key"]), field["kind"]
    required = " required" if field["required"] else ""
    if kind == "choice":
        return "".join(
            f'<label class="choice {attribute(c["colour"])}"><input type="radio" name="{key}" '
            f'value="{attribute(c["id"])}"{required}> {escaped(c["text"])}</label>'
            for c in field["choices"]
        )
    if kind == "text":
        least = max(field["least"], 1) if field["required"] else 0
        return (
            f'<textarea name="{key}" rows="3" data-least="{least}"{required}></textarea>'
            '<p class="count"></p>'
        )
    if kind == "checkbox":
        return f'<label class="choice"><input type="checkbox" name="{key}"{required}> Yes</label>'
    rows = []
    for one in field["numbered"]:
        name, text = f"{key}-{one['number']}", f"{one['number']}. {escaped(one['text'])}"
        if kind == "edits":
            rows.append(f'<label>{text}<textarea name="{name}" rows="2"></textarea></label>')
        else:
            rows.append(
                f'<label class="choice"><input type="checkbox" name="{name}"> {text}</label>'
            )
    return f'<div data-numbered="{field["least"]} {field["most"]}">{"".join(rows)}</div>'


def introduction(view: Mapping[str, Any]) -> str:
    """Return the words before an item: warning, purpose, guidelines, examples, consent."""
    made = []
    if view["warning"]:
        made.append(f'<p class="warning" role="note">{escaped(view["warning"])}</p>')
    made.append(f"<p>{escaped(view['intro'])}</p>")
    for title, lines in (("Guidelines", view["guidelines"]), ("Examples", view["examples"])):
        if lines:
            items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
            made.append(f"<details open><summary>{title}</summary><ol>{items}</ol></details>")
    if view["consent"]:
        made.append(
            '<label class="choice consent"><input type="checkbox" name="consent" required> '
            f"{escaped(view['consent'])}</label>"
        )
    return "".join(made)
