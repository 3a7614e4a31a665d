"""Let a model judge a task: its choices as answers of the judge "model:NAME", in both orders.

A model is asked what a page asks people, without the texts and boxes. Where two things are compared
it judges each item twice, the second time with A and B exchanged.
"""

from __future__ import annotations

import functools
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.answers import MODEL, ORDERS, Answer, check_answer
from data_pipeline.annotation.task_files import Field, Item, Task, fields, sides
from data_pipeline.calls.requests import Rejected, Request, Sampling, Stage

ATTEMPTS = 3  # the first, and two after an answer that cannot be read
_LINE = re.compile(r"[\s>*_`#\-\d.)]*(?P<key>[\w.]+)[*_`]*\s*[:=]\s*(?P<value>.+)")


@functools.cache
def prompts() -> dict[str, Any]:
    """Return the prompts of `prompts.toml`."""
    return tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))


def asked_fields(task: Task, item: Item) -> list[Field]:
    """Return the questions that a model is asked: choices that depend on no other answer."""
    return [f for f in fields(task.page, item) if f.question.kind == "choice" and not _hangs(f)]


def _hangs(field: Field) -> bool:
    return bool(field.question.when)


def conversation(turns: Sequence[str], names: Sequence[str], speakers: Sequence[str] = ()) -> str:
    """Return utterances as lines `NAME: text`."""
    sided = sides(turns, speakers)
    name = {"left": names[0], "right": names[1]}
    return "\n".join(f"{name[side]}: {turn}" for side, turn in zip(sided, turns, strict=True))


def prompt(task: Task, item: Item, order: Sequence[int]) -> str:
    """Return the user's part of the request: content, questions with choices, the lines to write.

    Utterances that a question is asked about are numbered in its text.
    """
    page, words = task.page, prompts()["judge"]
    parts = [page.intro, "\n".join(page.guidelines)]
    if item.narrative:
        parts.append(f"Story: {item.narrative}")
    if item.context:
        parts.append("Conversation:\n" + conversation(item.context, page.speakers, item.speakers))
    if item.options:
        shown = []
        for place in order:
            option = item.options[place]
            own = item.option_speakers[place] if item.option_speakers else ()
            # One response is no conversation: its speaker is not named.
            single = len(option) == 1 and item.context
            shown.append(option[0] if single else conversation(option, ("X", "Y"), own))
        parts.append(
            words["options"].format(name=page.option_name, first=shown[0], second=shown[1])
        )
    lines = []
    for field in asked_fields(task, item):
        about = ""
        if field.utterance:
            about = f" (utterance {field.utterance}: {item.context[field.utterance - 1]})"
        choices = "; ".join(f"{c.id} = {c.text}" for c in field.question.choices)
        lines.append(f"{field.key}: {field.text}{about} [{choices}]")
    parts.append("Questions:\n" + "\n".join(lines))
    keys = "\n".join(f"{field.key}:" for field in asked_fields(task, item))
    parts.append(f"{words['closing']}\n{keys}")
    return "\n\n".join(part for part in parts if part)


def read_reply(task: Task, item: Item, text: str) -> dict[str, str]:
    """Return the choices in a model's reply; ValueError if a question has none, or two.

    A choice may be given by its id or its whole text, in any case, with marks around it.
    """
    wanted = {field.key.lower(): field for field in asked_fields(task, item)}
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        field = wanted.get(match["key"].lower()) if match else None
        if field is None:
            continue
        given = match["value"].strip().strip("*_`\"'[]().").lower()
        for choice in field.question.choices:
            names = (choice.id.lower(), choice.text.lower(), choice.text.partition(":")[0].lower())
            if given in names or given.startswith(f"{choice.id.lower()} ="):
                if found.get(field.key, choice.id) != choice.id:
                    raise ValueError(f"question {field.key!r}: two answers")
                found[field.key] = choice.id
                break
        else:
            raise ValueError(f"question {field.key!r}: got {given[:60]!r}, no choice of it")
    missing = [field.key for field in wanted.values() if field.key not in found]
    if missing:
        raise ValueError(f"question {missing[0]!r}: no line answers it")
    return found


def judge_stage(task: Task, item: Item, order: Sequence[int]) -> Stage:
    """Return a model's choices for one item in one order, or Rejected after ATTEMPTS replies."""
    words = prompts()["judge"]
    name = stage_name(item, order)
    asked, reason = prompt(task, item, order), ""
    sampling = Sampling(
        max_tokens=words["max_tokens"], temperature=0.0, top_p=1.0, frequency_penalty=0.0,
        presence_penalty=0.0,
    )  # fmt: skip
    for attempt in range(ATTEMPTS):
        again = f"\n\n{words['retry']}" if attempt else ""
        user = asked + again
        response = yield Request(
            record_id=name,
            stage="judge",
            attempt=attempt,
            prompt=f"{words['system']}\n\n{user}\n\nAnswer:\n",
            messages=(("system", words["system"]), ("user", user)),
            sampling=sampling,
        )
        if response.fault:
            reason = response.fault
            continue
        try:
            return read_reply(task, item, response.text)
        except ValueError as error:
            reason = str(error)
    return Rejected(name, "judge", f"unreadable: {reason}", {"reply": response.text[:2000]})


def stage_name(item: Item, order: Sequence[int]) -> str:
    """Return the name of a judgement in the journal: `ID#ba` for the exchanged order."""
    return f"{item.id}#{'ba' if tuple(order) == (1, 0) else 'ab'}"


def judgements(
    task: Task, known: Iterable[Answer], judge: str
) -> dict[str, tuple[Item, tuple[int, ...], Callable[[], Stage]]]:
    """Return what a model has not judged yet, by stage name. Raises UserError for a page of texts.

    Qualification items are left out: a model has no right to be let in.
    """
    done = {(a.item, a.order) for a in known if a.judge == judge}
    made = {}
    for item in task.items:
        if item.role == "qualification":
            continue
        if not asked_fields(task, item):
            raise UserError(
                f"page {task.page.name!r} has no question of choices for a model to answer: give "
                "another task",
                setting="task",
            )
        for order in ORDERS if item.options else ((),):
            if (item.id, order) not in done:
                start = functools.partial(judge_stage, task, item, order)
                made[stage_name(item, order)] = (item, order, start)
    return made


def answer_of(
    task: Task, item: Item, order: tuple[int, ...], choices: dict[str, str], judge: str
) -> Answer:
    """Return a model's choices as an answer; ValueError if the task does not allow them."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    answer = Answer(task.fingerprint, item.id, judge, choices, None, now, order)
    check_answer(task, answer)
    return answer


def judge_name(model: str) -> str:
    """Return the judge's name of a model."""
    return f"{MODEL}{model}"
