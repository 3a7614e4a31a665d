"""Make a page for each judge: right gold answers, agreement, and answers that differ.

Kim et al. 2022, appendix A, give their workers feedback in stages; the form is ours. A page names
no other judge.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any

from cosmo.engine.base.errors import DataError
from data_pipeline.annotation import html, report, statistics, views
from data_pipeline.annotation.answers import Answer, Answers
from data_pipeline.annotation.assignment import is_right
from data_pipeline.annotation.pages import Question
from data_pipeline.annotation.task_files import Item, Task, fields

STYLE = """\
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
section { border: 1px solid #888; border-radius: .5rem; padding: .5rem 1rem; margin: .8rem 0; }
.bubble { border: 1px solid #888; border-radius: .8rem; padding: .3rem .8rem; max-width: 85%;
  width: fit-content; overflow-wrap: anywhere; }
.right { margin-left: auto; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; } h3 { font-size: 1rem; margin: .4rem 0; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
"""


def build(task: Task, answers: Answers, most: int, gold_items: bool) -> dict[str, dict[str, Any]]:
    """Return the feedback of each person by name, as JSON values.

    `differences` has at most `most` answers that the majority of the others does not share;
    `differing` counts them all. Without `gold_items` gold is counted only, and `wrong_gold` is
    empty. Raises DataError if no person has answered.
    """
    people = answers.people()
    if not people:
        raise DataError.at(
            "the answers", None, "nobody to write to",
            got=f"{len(answers.kept)} answers of models",
            expected="at least one answer of a person",
            remedy="Collect answers first.", setting="answers",
        )  # fmt: skip
    numbers = report.judges(task, people)
    own: dict[str, list[Answer]] = {}
    for answer in people:
        own.setdefault(answer.judge, []).append(answer)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in own}
    given = {(answer.judge, answer.item): answer for answer in people}
    for question in task.page.questions:
        if question.kind in ("choice", "utterances"):
            _add_differences(task, people, question, given, found)
    places = {item.id: place for place, item in enumerate(task.items)}
    made = {}
    for name, differences in found.items():
        differences.sort(key=lambda one: (places[one["item"]], one["utterance"]))
        wrong = [a for a in own[name] if task.by_id[a.item].expected and not is_right(task, a)]
        one = numbers[name]
        made[name] = {
            "judge": name,
            **{key: one[key] for key in ("answers", "agreement", "gold", "qualification")},
            "median_seconds": one["seconds"] and one["seconds"]["median"],
            "wrong_gold": [_wrong(task, a) for a in wrong] if gold_items else [],
            "differing": len(differences),
            "differences": differences[:most],
        }
    return made


def _add_differences(
    task: Task,
    people: Sequence[Answer],
    question: Question,
    given: dict[tuple[str, str], Answer],
    found: dict[str, list[dict[str, Any]]],
) -> None:
    """Add the answers to a question that are not the majority's, to their judges in `found`."""
    for (name, utterance), votes in report.votes_of(task, people, question).items():
        values = [report.side(v.value) if question.compares else v.value for v in votes]
        item = task.by_id[name]
        for place, vote in enumerate(votes):
            others = values[:place] + values[place + 1 :]
            majority = statistics.majority(others)
            if majority is None or majority == values[place]:
                continue
            order = given[vote.judge, name].order
            agreeing = [
                given[other.judge, name]
                for other, value in zip(votes, values, strict=True)
                if other is not vote and value == majority
            ]
            found[vote.judge].append({
                "item": name,
                "utterance": utterance,
                "question": _text(task, item, question, utterance),
                "order": list(order),
                "yours": _shown(task, question, values[place], order),
                "majority": _shown(task, question, majority, order),
                "of_others": [others.count(majority), len(others)],
                "your_reasons": _reasons(task, given[vote.judge, name], utterance),
                "their_reasons": [
                    reason
                    for other in agreeing
                    # Reasons name sides: those of judges who saw the other order would mislead.
                    if other.order == order
                    for reason in _reasons(task, other, utterance)
                ],
            })  # fmt: skip


def _text(task: Task, item: Item, question: Question, utterance: int) -> str:
    """Return a question as it was asked about an utterance, or 0."""
    texts = {(f.question.id, f.utterance): f.text for f in fields(task.page, item)}
    return texts.get((question.id, utterance)) or texts[question.id, 0]


def _shown(task: Task, question: Question, value: Any, order: Sequence[int]) -> str:
    """Return a vote in words; a side of a comparison by the letter that this judge saw."""
    if question.compares:
        place = {"first": 0, "second": 1}.get(value)
        return "tie" if place is None else f"{task.page.option_name} {'AB'[order.index(place)]}"
    if question.kind == "utterances":
        return "marked" if value else "not marked"
    return {choice.id: choice.text for choice in question.choices}.get(value, str(value))


def _reasons(task: Task, answer: Answer, utterance: int) -> list[str]:
    """Return the texts that a judge wrote about an utterance, or about the whole item."""
    return [
        answer.answers[field.key]
        for field in fields(task.page, task.by_id[answer.item])
        if field.question.kind == "text"
        and field.utterance in (0, utterance)
        and field.key in answer.answers
    ]


def _wrong(task: Task, answer: Answer) -> dict[str, Any]:
    """Return the expected and the given answers of a gold item, where they differ."""
    item = task.by_id[answer.item]
    made = []
    for field in fields(task.page, item):
        if field.key not in item.expected:
            continue
        question, value = field.question, answer.answers.get(field.key)
        if question.compares and value is not None:
            number = {choice.id: choice.value for choice in question.choices}[value]
            value = report.side(-number if answer.order == (1, 0) else number)
        expected = item.expected[field.key]
        if value not in expected:
            words = [_words(task, question, one, answer.order) for one in expected]
            yours = "no answer" if value is None else _words(task, question, value, answer.order)
            made.append({"question": field.text, "utterance": field.utterance,
                         "yours": yours, "expected": words})  # fmt: skip
    return {"item": item.id, "order": list(answer.order), "answers": made}


def _words(task: Task, question: Question, value: Any, order: Sequence[int]) -> str:
    """Return an answer to a gold item's question in words."""
    if question.kind == "choice":
        return _shown(task, question, value, order)
    return str(value)


def page(task: Task, one: dict[str, Any]) -> str:
    """Return the HTML page of one judge's feedback; it needs no other file."""
    agreement, rows = one["agreement"], []
    rows.append(("Items answered", f"{one['answers']:,}"))
    if agreement["of"]:
        share = f" ({100 * agreement['share']:.0f}%)"
        rows.append(("Answers that most other judges gave too",
                     f"{agreement['agreed']:,} of {agreement['of']:,}{share}"))  # fmt: skip
    for role, title in (("gold", "Right answers to test items"),
                        ("qualification", "Right answers to qualification items")):  # fmt: skip
        if one[role]["total"]:
            rows.append((title, f"{one[role]['right']} of {one[role]['total']}"))
    if one["median_seconds"] is not None:
        rows.append(("Median seconds an item", f"{one['median_seconds']:.0f}"))
    table = "".join(f"<tr><th>{title}</th><td>{value}</td></tr>" for title, value in rows)
    parts = [f"<table>{table}</table>"]
    if one["wrong_gold"]:
        parts.append("<h2>Test items that you answered otherwise than expected</h2>")
    for wrong in one["wrong_gold"]:
        lines = [
            f"<p><b>{html.escaped(_about(a))}</b><br>You: {html.escaped(a['yours'])}<br>"
            f"Expected: {html.escaped(' or '.join(a['expected']))}</p>"
            for a in wrong["answers"]
        ]
        parts.append(_section(task, wrong, "".join(lines)))
    if one["differing"]:
        parts.append(f"<h2>Answers that most other judges do not share: {one['differing']:,}</h2>")
        parts.append("<p>Neither is wrong by itself. Read their reasons, and compare them with "
                     "the guidelines.</p>")  # fmt: skip
    for _, group in itertools.groupby(one["differences"], operator.itemgetter("item")):
        of_item = list(group)
        lines = [
            _difference(different, _texts(different) != _texts(after))
            for different, after in itertools.zip_longest(of_item, of_item[1:])
        ]
        parts.append(_section(task, of_item[0], "".join(lines)))
    if one["differing"] > len(one["differences"]):
        parts.append(f"<p>{one['differing'] - len(one['differences']):,} more are not shown.</p>")
    title = html.escaped(f"{task.page.title}: feedback for {one['judge']}")
    warning = html.escaped(task.page.warning)
    note = f'<p role="note">{warning}</p>' if warning else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>\n{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{note}{''.join(parts)}{html.instructions(_view(task, None))}"
        "</body></html>\n"
    )


def _view(task: Task, item: Item | None, order: Sequence[int] = ()) -> dict[str, Any]:
    return views.view(task.page, item or task.items[0], tuple(order) or (0, 1))


def _about(one: dict[str, Any]) -> str:
    about = f"Utterance {one['utterance']}: " if one["utterance"] else ""
    return about + one["question"]


def _texts(one: dict[str, Any] | None) -> tuple:
    return (one["your_reasons"], one["their_reasons"]) if one else ()


def _difference(one: dict[str, Any], with_reasons: bool) -> str:
    """Return an answer that the majority does not share as HTML."""
    count, total = one["of_others"]
    made = (
        f"<p><b>{html.escaped(_about(one))}</b><br>You: {html.escaped(one['yours'])}<br>"
        f"Others: {html.escaped(one['majority'])} ({count} of {total})</p>"
    )
    titled = (("You wrote", one["your_reasons"]), ("They wrote", one["their_reasons"]))
    for title, reasons in titled if with_reasons else ():
        if reasons:
            items = "".join(f"<li>{html.escaped(reason)}</li>" for reason in reasons)
            made += f"<h3>{title}</h3><ul>{items}</ul>"
    return made


def _section(task: Task, one: dict[str, Any], lines: str) -> str:
    """Return an item as the judge saw it, with `lines` of HTML below it."""
    seen = _view(task, task.by_id[one["item"]], one["order"])
    parts = "".join(f"<h3>{html.escaped(p['title'])}</h3>{html.part(p)}" for p in seen["parts"])
    return f"<section>{parts}{lines}</section>"


def file_name(judge: str) -> str:
    """Return the name of a judge's page, different for different names: its letters, and a hash."""
    letters = re.sub(r"[^A-Za-z0-9_-]+", "-", judge)[:60].strip("-")
    mark = hashlib.blake2b(judge.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{letters or 'judge'}-{mark}.html"
