"""Leave out the answers of people who fail the gold or the qualification items of a task."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from cosmo.engine.base.errors import UserError
from data_pipeline.annotation.answers import Answers
from data_pipeline.annotation.assignment import fails, right_share
from data_pipeline.annotation.task_files import Task


class Screened(NamedTuple):
    """The answers that stay, and what was left out as JSON values."""

    answers: Answers
    report: dict[str, Any]


def screen(task: Task, answers: Answers, min_gold: float) -> Screened:
    """Return the answers without those of people whose share of right gold answers is too low.

    People who failed the task's qualification are left out too. Who answered no such item stays,
    and is named. Models stay: their votes are apart. Raises UserError if there is nothing to
    measure, or nobody is left.
    """
    if not 0 <= min_gold <= 1:
        raise UserError(f"got {min_gold:g}: give a share from 0 to 1", setting="min_gold")
    passes = {"gold": min_gold, "qualification": task.qualification_pass}
    roles = {role: least for role, least in passes.items() if task.of_role(role)}
    if not roles:
        raise UserError(
            "the task has no gold and no qualification items, so nobody can be left out: leave out "
            "the flag, or make the next task with --gold=FILE",
            setting="min_gold",
        )
    by_judge: dict[str, list] = {}
    for answer in answers.people():
        by_judge.setdefault(answer.judge, []).append(answer)
    left_out, unmeasured = [], []
    for name, own in sorted(by_judge.items()):
        shares = {role: right_share(task, own, role) for role in roles}
        failed = [role for role, least in roles.items() if fails(*shares[role], least)]
        if failed:
            items = sum(task.by_id[answer.item].role == "item" for answer in own)
            counts = {role: {"right": r, "total": n} for role, (r, n) in shares.items()}
            left_out.append({"judge": name, "failed": failed, "answers": items, **counts})
        elif not any(total for _, total in shares.values()):
            unmeasured.append(name)
    names = {one["judge"] for one in left_out}
    if by_judge and len(names) == len(by_judge):
        raise UserError(
            f"nobody is left of {len(names)} judges, such as {left_out[0]['judge']!r}: give a "
            "smaller share, or correct the expected answers",
            setting="min_gold",
        )
    report = {
        "min_gold": min_gold,
        "qualification_pass": roles.get("qualification"),
        "left_out": left_out,
        "answers_left_out": sum(one["answers"] for one in left_out),
        "unmeasured": unmeasured,  # judges without an answer to such an item
    }
    kept = tuple(answer for answer in answers.kept if answer.judge not in names)
    return Screened(dataclasses.replace(answers, kept=kept), report)
