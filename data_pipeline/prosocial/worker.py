"""Answer the pages by a script, to try the pipeline without people: the same answers each time.

The answers obey the rules of each page. They depend on task, item and judge alone.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.answers import Answer, check_answer
from data_pipeline.annotation.assignment import assign
from data_pipeline.annotation.task_files import Item, Task

_PHRASES = tomllib.loads(Path(__file__).with_name("worker_phrases.toml").read_text("utf-8"))
_ACCEPTS = re.compile(r"\b(you are right|you're right|i will apologi[sz]e|i promise)\b", re.I)
_DANGER = re.compile(
    r"\b(overdose\w*|knife|gun|suicide|kill\w*|bleed\w*|pills|on fire|chest pain|unconscious)\b",
    re.I,
)
# How often the script does these.
REPORT_SHARE, OTHER_VOTE_SHARE, NEW_RULE_SHARE, SECOND_EDIT_SHARE = 0.05, 0.1, 0.6, 0.3


def answers(task: Task, known: list[Answer], workers: int, prefix: str) -> Iterator[Answer]:
    """Yield an answer for each item and worker that a task still lacks.

    Raises UserError for a page that the script does not know, or fewer workers than judges.
    """
    if task.page.name not in _PAGES:
        raise UserError(f"the script cannot answer page {task.page.name!r}: {', '.join(_PAGES)}")
    if workers < task.judges_per_item:
        raise UserError(f"--workers={workers}: the task wants {task.judges_per_item} an item")
    given = list(known)
    busy = True
    while busy:
        busy = False
        for number in range(workers):
            judge = f"{prefix}{number + 1}"
            # As the server gives them out: whole items first, nobody twice.
            following = assign(task, given, judge)
            if following.item is not None:
                made = answer(task, following.item, judge)
                given.append(made)
                busy = True
                yield made


def answer(task: Task, item: Item, judge: str) -> Answer:
    """Return a scripted worker's answer to an item."""
    chance = random.Random(fraction_bits(task.seed, "scripted worker", f"{judge}/{item.id}"))
    made = Answer(
        task.fingerprint,
        item.id,
        judge,
        {**_PAGES[task.page.name](item, chance), **_expected(item)},
        seconds=max(task.min_seconds, round(20 + 60 * chance.random(), 1)),
    )
    check_answer(task, made)
    return made


def _expected(item: Item) -> dict[str, Any]:
    """Return right answers to an item whose answers are known."""
    return {key: some[0] for key, some in item.expected.items()}


def _proofreading(item: Item, chance: random.Random) -> dict[str, Any]:
    turns = item.context
    kinds = {1: "openings", 2: "questions", len(turns): "endings"}
    wanted = [_pick(chance, list(kinds))]
    if chance.random() < SECOND_EDIT_SHARE:
        wanted.append(_pick(chance, list(kinds)))
    return {"changes": {str(n): _rewritten(turns[n - 1], kinds[n], chance) for n in set(wanted)}}


def _rewritten(text: str, kind: str, chance: random.Random) -> str:
    """Return an utterance with a phrase added that it does not have yet."""
    phrases = [one for one in _PHRASES[kind] if one.replace("{text}", "").strip() not in text]
    return _pick(chance, phrases or _PHRASES[kind]).format(text=text)


def _rots(item: Item, chance: random.Random) -> dict[str, Any]:
    if _ACCEPTS.search(item.context[-1]):
        return {
            "response": _pick(chance, _PHRASES["praising"]),
            **_rule(item, chance, new=False),
            "no_personal_data": True,
        }
    made = _rule(item, chance, new=chance.random() < NEW_RULE_SHARE)
    rule = made.get("new_rule") or item.rots[made["chosen_rules"][0] - 1]
    # Inside a sentence: "It is ..." loses its capital, and a name keeps it.
    rule = rule[0].lower() + rule[1:] if re.match(r"(It|You|People|We)\b", rule) else rule
    text = _pick(chance, _PHRASES["guiding"]).format(rule=rule.rstrip(".") + ".")
    return {"response": text, **made, "no_personal_data": True}


def _rule(item: Item, chance: random.Random, new: bool) -> dict[str, Any]:
    if new or not item.rots:
        return {"rule": "new", "new_rule": _pick(chance, _PHRASES["rules"])}
    first = 1 + int(chance.random() * len(item.rots))
    chosen = {first, 1 + int(chance.random() * len(item.rots))}
    return {"rule": "previous", "chosen_rules": sorted(chosen)}


def _validation(item: Item, chance: random.Random) -> dict[str, Any]:
    if chance.random() >= REPORT_SHARE:
        return {"incoherent": [], "harsh": []}
    if chance.random() < 0.5:
        return {"incoherent": [1 + int(chance.random() * len(item.context))], "harsh": []}
    return {"incoherent": [], "harsh": [len(item.context) // 2 * 2]}


def _safety(item: Item, chance: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {}
    danger = False
    for number in range(1, len(item.context) + 1, 2):
        text = item.context[number - 1]
        # An emergency stays one: no answer of a chatbot resolves it.
        danger = danger or bool(_DANGER.search(text))
        label = "intervention" if danger else "casual" if _ACCEPTS.search(text) else "caution"
        if label != "intervention" and chance.random() < OTHER_VOTE_SHARE:
            label = {"casual": "caution", "caution": "casual"}[label]
        made[f"label.{number}"] = label
        made[f"reason.{number}"] = _pick(chance, _PHRASES["reasons"][label])
    return made


_PAGES = {
    "proofreading": _proofreading,
    "rots": _rots,
    "validation": _validation,
    "safety": _safety,
}


def _pick(chance: random.Random, choices: list) -> Any:
    # Not chance.choice: only random() keeps its sequence in all versions of Python.
    return choices[int(chance.random() * len(choices))]
