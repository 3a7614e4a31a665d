"""Decide what a judge gets next: pure functions of the task and the answers so far.

A server calls `assign` with all answers that it has stored, so it resumes after any stop.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from cosmo.engine.base.draws import fraction_bits
from data_pipeline.annotation.answers import ORDERS, Answer
from data_pipeline.annotation.task_files import Item, Task

DONE, NOT_QUALIFIED, TAKEN = "done", "not qualified", "taken"


@dataclasses.dataclass(frozen=True)
class Next:
    """The next item of a judge and the order of its options, or a reason why there is none.

    Reasons: DONE (the judge has answered all that is left), NOT_QUALIFIED, TAKEN (others hold the
    rest: ask again later).
    """

    item: Item | None
    order: tuple[int, ...] = ()
    reason: str = ""


def order(seed: int, item: str, judge: str) -> tuple[int, int]:
    """Return the order in which a judge sees two options: a seeded coin of (item, judge)."""
    return ORDERS[coin(f"{seed}/{item}/{judge}")]


def coin(text: str) -> int:
    """Return 0 or 1, evenly: FNV-1a of the text's UTF-8 with the last steps of MurmurHash3."""
    # Not base.draws: the pages of Mechanical Turk have to toss the same coin in a browser, which
    # has no BLAKE2. `exchange/page.js` repeats this function.
    state = 0x811C9DC5
    for byte in text.encode("utf-8", "surrogatepass"):
        state = ((state ^ byte) * 0x01000193) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    return (state ^ (state >> 16)) & 1


def shown_order(task: Task, item: Item, judge: str) -> tuple[int, ...]:
    """Return the order of an item's options for a judge, empty if nothing is compared."""
    return order(task.seed, item.id, judge) if item.options else ()


def is_right(task: Task, answer: Answer) -> bool:
    """Return whether an answer to a gold or qualification item is as expected, in every field."""
    item = task.by_id[answer.item]
    for key, expected in item.expected.items():
        given = answer.answers.get(key)
        question = task.page.question(key.partition(".")[0])
        if question.compares and given is not None:
            value = {choice.id: choice.value for choice in question.choices}[given]
            value = -value if answer.order == (1, 0) else value
            given = "first" if value < 0 else "second" if value > 0 else "tie"
        if given not in expected:
            return False
    return True


def right_share(task: Task, answers: Sequence[Answer], role: str) -> tuple[int, int]:
    """Return how many answers to items of a role are right, and how many there are."""
    of_role = [a for a in answers if task.by_id[a.item].role == role]
    return sum(is_right(task, answer) for answer in of_role), len(of_role)


def assign(
    task: Task,
    answers: Sequence[Answer],
    judge: str,
    held: Mapping[str, Collection[str]] = {},
) -> Next:
    """Return what `judge` gets next. `held` {item: judges} are pages open now, unanswered.

    Qualification comes first. An item goes to as many people as the task wants, to nobody twice.
    Gold items stand at seeded places among the others. A page that the judge holds is given again.
    """
    own = [answer for answer in answers if answer.judge == judge]
    seen = {answer.item for answer in own}
    for item in task.items:
        if item.id not in seen and judge in held.get(item.id, ()):
            return _given(task, item, judge)
    tests = task.of_role("qualification")
    left = [item for item in tests if item.id not in seen]
    if left:
        return _given(task, left[0], judge)
    right, total = right_share(task, own, "qualification")
    if tests and right < task.qualification_pass * total:
        return Next(None, reason=NOT_QUALIFIED)
    if gold := _gold(task, own, seen, judge):
        return _given(task, gold, judge)
    votes = Counter(answer.item for answer in answers if not answer.by_model)
    open_, taken = [], False
    for item in task.of_role("item"):
        holding = len([name for name in held.get(item.id, ()) if name != judge])
        if item.id in seen or votes[item.id] >= task.judges_per_item:
            continue
        if votes[item.id] + holding >= task.judges_per_item:
            taken = True
            continue
        # Begun items first, so that a study that ends early has whole items. Then a seeded order of
        # the judge's own, so that no item is always judged last.
        bits = fraction_bits(task.seed, "assign", f"{judge}/{item.id}")
        open_.append((-votes[item.id] - holding, bits, item))
    if not open_:
        return Next(None, reason=TAKEN if taken else DONE)
    return _given(task, min(open_, key=lambda one: one[:2])[2], judge)


def _given(task: Task, item: Item, judge: str) -> Next:
    return Next(item, shown_order(task, item, judge))


def _gold(task: Task, own: Sequence[Answer], seen: set[str], judge: str) -> Item | None:
    """Return the gold item that is due, if any: one at a seeded place of each block of items."""
    if not task.gold_every:
        return None
    golds = task.of_role("gold")
    done = sum(item.id in seen for item in golds)
    left = [item for item in golds if item.id not in seen]
    items = sum(task.by_id[answer.item].role == "item" for answer in own)
    place = fraction_bits(task.seed, f"gold {done}", judge) % task.gold_every
    if not left or items < done * task.gold_every + place:
        return None
    return min(left, key=lambda item: fraction_bits(task.seed, "gold", f"{judge}/{item.id}"))
