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


def fails(right: int, total: int, least: float) -> bool:
    """Return whether a share of right answers is below `least`; without answers it is not."""
    # Divided, because 0.07 * 100 is above 7.
    return total > 0 and right / total < least


def assign(
    task: Task,
    answers: Sequence[Answer],
    judge: str,
    held: Mapping[str, Collection[str]] = {},
    skipped: Collection[str] = (),
) -> Next:
    """Return what `judge` gets next. `held` {item: judges} are pages open now, unanswered.

    `skipped` are items that the judge does not want: they are not given.

    Qualification comes first. An item goes to as many people as the task wants, to nobody
    twice. Gold items stand at seeded places among the others. A page that the judge holds is
    given again.
    """
    own = [answer for answer in answers if answer.judge == judge]
    seen = {answer.item for answer in own}
    for item in task.items:
        if item.id not in seen and item.id not in skipped and judge in held.get(item.id, ()):
            return _given(task, item, judge)
    tests = task.of_role("qualification")
    left = [item for item in tests if item.id not in seen]
    if left:
        return _given(task, left[0], judge)
    right, total = right_share(task, own, "qualification")
    if fails(right, total, task.qualification_pass):
        return Next(None, reason=NOT_QUALIFIED)
    if gold := _gold(task, own, {*seen, *skipped}, judge):
        return _given(task, gold, judge)
    open_, taken = _open_items(task, answers, judge, held, {*seen, *skipped})
    if not open_:
        return Next(None, reason=TAKEN if taken else DONE)

    # Begun items first, so that a study that ends early has whole items. Then a seeded order of the
    # judge's own, so that no item is always judged last.
    def rank(one: tuple[int, Item]) -> tuple[int, int]:
        return -one[0], fraction_bits(task.seed, "assign", f"{judge}/{one[1].id}")

    return _given(task, min(open_, key=rank)[1], judge)


def remaining(
    task: Task,
    answers: Sequence[Answer],
    judge: str,
    held: Mapping[str, Collection[str]] = {},
    skipped: Collection[str] = (),
    most: int | None = None,
) -> int:
    """Return how many items `judge` would get from now on, if nobody else answered.

    `most` limits the answers of a judge to items that are neither gold nor qualification.
    """
    own = [answer for answer in answers if answer.judge == judge]
    seen = {answer.item for answer in own}
    tests = sum(item.id not in seen for item in task.of_role("qualification"))
    items = len(_open_items(task, answers, judge, held, {*seen, *skipped})[0])
    done = sum(task.by_id[answer.item].role == "item" for answer in own)
    if most is not None:
        items = min(items, max(most - done, 0))
    golds = task.of_role("gold") if task.gold_every else []
    answered = sum(item.id in seen for item in golds)
    usable = answered + sum(item.id not in seen and item.id not in skipped for item in golds)
    due = answered
    while due < usable and done + items >= _gold_place(task, due, judge):
        due += 1
    return tests + items + due - answered


def _open_items(
    task: Task,
    answers: Sequence[Answer],
    judge: str,
    held: Mapping[str, Collection[str]],
    without: Collection[str],
) -> tuple[list[tuple[int, Item]], bool]:
    """Return (votes and pages of others, item) for each item with room; whether others hold one."""
    votes = Counter(answer.item for answer in answers if not answer.by_model)
    open_, taken = [], False
    for item in task.of_role("item"):
        holding = len([name for name in held.get(item.id, ()) if name != judge])
        if item.id in without or votes[item.id] >= task.judges_per_item:
            continue
        if votes[item.id] + holding >= task.judges_per_item:
            taken = True
            continue
        open_.append((votes[item.id] + holding, item))
    return open_, taken


def _given(task: Task, item: Item, judge: str) -> Next:
    return Next(item, shown_order(task, item, judge))


def _gold(task: Task, own: Sequence[Answer], without: set[str], judge: str) -> Item | None:
    """Return the gold item that is due, if any: one at a seeded place of each block of items."""
    if not task.gold_every:
        return None
    answered = {answer.item for answer in own}
    golds = task.of_role("gold")
    done = sum(item.id in answered for item in golds)
    left = [item for item in golds if item.id not in without]
    items = sum(task.by_id[answer.item].role == "item" for answer in own)
    if not left or items < _gold_place(task, done, judge):
        return None
    return min(left, key=lambda item: fraction_bits(task.seed, "gold", f"{judge}/{item.id}"))


def _gold_place(task: Task, number: int, judge: str) -> int:
    """Return after how many items the judge's gold item `number` (from 0) is due."""
    place = fraction_bits(task.seed, f"gold {number}", judge) % task.gold_every
    return number * task.gold_every + place
