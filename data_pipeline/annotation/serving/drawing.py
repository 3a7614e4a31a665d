"""Draw the pages of a study as HTML. A script adds keys and drafts.

The script also hides the questions that were not asked: without it, a page that has such questions
cannot be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.annotation import html, views
from data_pipeline.annotation.serving.study import Progress
from data_pipeline.annotation.task_files import Item, Task, fields

FEEDBACK_CHARS = 5000
FOLDER = Path(__file__).parent
STYLE = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER.parent / "form.js").read_text(encoding="utf-8") + (FOLDER / "page.js").read_text(
    encoding="utf-8"
)


def document(title: str, body: str, refresh_seconds: int = 0) -> str:
    """Return a whole page; `body` is HTML."""
    again = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{again}'
        f'<title>{html.escaped(title)}</title><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/page.css"><script src="/page.js" defer></script></head>'
        f"<body>{body}</body></html>\n"
    )


def message(title: str, *paragraphs: str, further: str = "", refresh_seconds: int = 0) -> str:
    """Return a page of a few sentences; `further` is HTML."""
    texts = "".join(f"<p>{html.escaped(text)}</p>" for text in paragraphs)
    body = f'<main class="message"><h1>{html.escaped(title)}</h1>{texts}{further}</main>'
    return document(title, body, refresh_seconds)


def stranger(wrong: bool) -> str:
    """Return the page for a visitor without a token, or with a wrong one."""
    problem = (
        "This link is not one of this study. Perhaps a part of it was lost when it was copied."
        if wrong
        else "This study is open to people who got a link of their own."
    )
    field = (
        '<form method="get" action="/judge" class="token"><label>Your token '
        '<input type="text" name="token" required autocomplete="off" spellcheck="false"></label>'
        '<button class="primary">Open</button></form>'
    )
    title = "This link does not work" if wrong else "You need a link"
    return message(
        title, problem, "Please ask the people who run the study, or enter your token.",
        further=field,
    )  # fmt: skip


def go_on(token: str, text: str = "Go on") -> str:
    """Return a link to the judge's next item."""
    return (
        f'<p><a class="button primary" href="/judge?token={html.attribute(token)}">{text}</a></p>'
    )


def _hidden(**values: str) -> str:
    return "".join(
        f'<input type="hidden" name="{name}" value="{html.attribute(value)}">'
        for name, value in values.items()
    )


def _wage(task: Task) -> str:
    return f'<p class="wage"><b>Your pay:</b> {html.escaped(task.wage)}</p>' if task.wage else ""


def consent(task: Task, token: str, hold_seconds: float, problem: str = "") -> str:
    """Return the first page: warning, purpose, instructions, pay, consent."""
    view = views.view(task.page, task.items[0])
    rules = [f"Please send each page within {duration(hold_seconds)} of opening it."]
    if task.min_seconds:
        rules.insert(0, f"Please take at least {task.min_seconds:g} seconds for each page.")
    rules += [
        "You may stop at any time, close the page, and come back with the same link.",
        "Your answers are stored with your name in this study, the time, and how long you took.",
    ]
    listed = "".join(f"<li>{html.escaped(rule)}</li>" for rule in rules)
    body = (
        f'<main class="message"><h1>{html.escaped(task.page.title)}</h1>{_alert(problem)}'
        f'<form method="post" action="/judge" id="form">'
        f"{_hidden(token=token, action='consent')}"
        f'{html.purpose(view)}{_wage(task)}<ul class="rules">{listed}</ul>{html.consent(view)}'
        '<button class="primary" id="send">Start</button></form></main>'
    )
    return document(task.page.title, body)


def duration(seconds: float) -> str:
    """Return a time in words."""
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _alert(problem: str) -> str:
    return f'<p class="alert" role="alert">{html.escaped(problem)}</p>' if problem else ""


def _progress(progress: Progress) -> str:
    number, total = progress.done + 1, max(progress.total, progress.done + 1)
    stored = f" · {progress.done} stored, thank you" if progress.done else ""
    return (
        f'<p class="progress"><label for="bar">{number} of {total}</label>'
        f'<progress id="bar" max="{total}" value="{progress.done}"></progress>'
        f"<span>{stored}</span></p>"
    )


def item(
    task: Task,
    token: str,
    one: Item,
    order: tuple[int, ...],
    progress: Progress,
    wait: float,
    values: Mapping[str, str] = {},
    problem: str = "",
) -> str:
    """Return the page of an item; `values` are those of a form that was not accepted."""
    view = views.view(task.page, one, order)
    parts = {
        part[
            "name"
        ]: f'<section class="{part["name"]}" aria-label="{html.attribute(part["title"])}">'
        f"<h2>{html.escaped(part['title'])}</h2>{html.part(part)}</section>"
        for part in view["parts"]
    }
    options = "".join(text for name, text in parts.items() if name.startswith("dialog"))
    content = "".join(text for name, text in parts.items() if not name.startswith("dialog"))
    # The rules are of use before the question about them opens.
    if one.rots and any(question.kind == "several" for question in task.page.questions):
        content += _rules_of_thumb(one)
    layout = "compared" if options else "single"
    options = f'<div class="options">{options}</div>' if options else ""
    asks_feedback = any(field.key == "feedback" for field in fields(task.page, one))
    box = "" if asks_feedback else _feedback_box(values.get("_feedback", ""))
    skip = (
        '<button name="action" value="skip" formnovalidate class="quiet">Skip this one</button>'
        if one.role != "qualification"
        else ""
    )
    least = (
        f'<p class="help">Please take at least {task.min_seconds:g} seconds for each page.</p>'
        if task.min_seconds
        else ""
    )
    body = (
        f'<a class="skip" href="#questions">To the questions</a><header>'
        f"<h1>{html.escaped(task.page.title)}</h1>{_progress(progress)}</header>"
        f'<main class="{layout} {html.attribute(task.page.name)}">{_alert(problem)}'
        f'<div class="instructions"><p>{html.escaped(task.page.intro)}</p>'
        f"{html.instructions(view, folded=True)}"
        '<noscript><p class="alert">Please switch on JavaScript for this page.</p></noscript></div>'
        f'<div class="content">{content}{options}</div>'
        f'<form method="post" action="/judge" id="form" data-item="{html.attribute(one.id)}" '
        f'data-wait="{wait:.3f}">{_hidden(token=token, item=one.id)}'
        f'<div id="questions" tabindex="-1">{html.questions(view, values)}</div>{box}{least}'
        '<p class="keys">Keys: 1 to 9 choose, Enter moves to the next question, '
        "Shift+Enter begins a new line.</p>"
        '<p class="send"><button class="primary" id="send" name="action" value="answer">Send'
        f'</button>{skip}<span id="wait" role="status"></span></p></form></main>'
    )
    return document(task.page.title, body)


def _rules_of_thumb(one: Item) -> str:
    rows = "".join(f"<li>{html.escaped(rule)}</li>" for rule in one.rots)
    return f'<section class="rules-of-thumb"><h2>Rules of thumb</h2><ol>{rows}</ol></section>'


def _feedback_box(value: str = "", opened: bool = False) -> str:
    state = " open" if opened or value else ""
    return (
        f'<details class="feedback"{state}><summary>Tell us something (optional)</summary>'
        f'<textarea name="_feedback" rows="2" maxlength="{FEEDBACK_CHARS}" '
        f'aria-label="Your remark">{html.attribute(value)}</textarea></details>'
    )


def end(task: Task, token: str, title: str, progress: Progress, *texts: str, again=0) -> str:
    """Return the last page of a judge: thanks, pay, a box for remarks."""
    answers = f"{progress.done} answer{'' if progress.done == 1 else 's'}"
    stored = f"Your {answers} {'is' if progress.done == 1 else 'are'} stored."
    box = (
        f'<form method="post" action="/judge">{_hidden(token=token, action="feedback")}'
        f"{_feedback_box(opened=True)}<button>Send the remark</button></form>"
    )
    further = _wage(task) + ("" if again else box)
    return message(title, *texts, stored, further=further, refresh_seconds=again)


def status(state: Mapping[str, Any]) -> str:
    """Return the operator's page."""
    head = {key: value for key, value in state.items() if key != "judges"}
    rows = "".join(
        f'<tr><th scope="row">{html.escaped(key.replace("_", " "))}</th>'
        f"<td>{html.escaped(str(value))}</td></tr>"
        for key, value in head.items()
    )
    people = state["judges"]
    table = ""
    if people:
        names = "".join(
            f'<th scope="col">{html.escaped(n.replace("_", " "))}</th>' for n in people[0]
        )
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escaped(_cell(v))}</td>" for v in one.values()) + "</tr>"
            for one in people
        )
        table = (
            '<div class="wide" tabindex="0" role="region" aria-label="Judges"><table><thead>'
            f"<tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    bar = (
        f'<progress max="{max(state["wanted"], 1)}" value="{state["answered"]}" '
        'aria-label="Answers"></progress>'
    )
    body = (
        f"<main><h1>{state['answered']:,} of {state['wanted']:,} answers</h1>{bar}"
        f'<table class="facts">{rows}</table>{table}</main>'
    )
    return document("Status", body, refresh_seconds=10)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
