"""Report what judges chose: every number as JSON values. People and models are never added up."""

from __future__ import annotations

import statistics as python_statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cosmo.engine.base.errors import DataError
from cosmo.tasks import safety
from cosmo.tasks.metrics.agreement import alpha
from cosmo.tasks.metrics.intervals import wilson
from data_pipeline.annotation import screening, statistics
from data_pipeline.annotation.answers import Answer, Answers, utterance_numbers
from data_pipeline.annotation.assignment import right_share
from data_pipeline.annotation.pages import SCALES, Question
from data_pipeline.annotation.task_files import Task, fields

SIDES = ("first", "tie", "second")
# Choices of the page `safety` -> the votes that ProsocialDialog has.
SAFETY_VOTES = dict(zip(("casual", "caution", "intervention"), safety.VOTES, strict=True))

Unit = tuple[str, int]  # an item, and an utterance or 0


class Vote(NamedTuple):
    """A judge's vote: `value` is a choice's id, or in a comparison its number, above 0: second.

    `shown` is that number as the judge saw it, above 0 for B.
    """

    judge: str
    value: Any
    shown: float = 0.0


Votes = Mapping[Unit, Sequence[Vote]]


def votes_of(task: Task, answers: Sequence[Answer], question: Question) -> dict[Unit, list[Vote]]:
    """Return the votes on a question by unit: an item, or an utterance where each is asked about.

    Comparisons are turned back, so that a number above 0 is for the second system, whatever was
    shown as B. Marked utterances are votes True or False on each utterance. Gold and qualification
    items are left out.
    """
    numbers = {choice.id: choice.value for choice in question.choices}
    found: dict[Unit, list[Vote]] = {}
    for answer in answers:
        item = task.by_id[answer.item]
        if item.role != "item":
            continue
        if question.kind == "utterances":
            marked = answer.answers.get(question.id, [])
            for number in utterance_numbers(question, item):
                vote = Vote(answer.judge, number in marked)
                found.setdefault((item.id, number), []).append(vote)
            continue
        for key, value in answer.answers.items():
            name, _, utterance = key.partition(".")
            if name != question.id:
                continue
            shown = 0.0
            if question.compares:
                shown = numbers[value]
                value = -shown if answer.order == (1, 0) else shown
            unit = (item.id, int(utterance or 0))
            found.setdefault(unit, []).append(Vote(answer.judge, value, shown))
    return found


def side(value: float) -> str:
    """Return the side of a comparison's number: first, tie or second."""
    return SIDES[(value > 0) - (value < 0) + 1]


def build(
    task: Task,
    answers: Answers,
    seed: int = 0,
    details: bool = True,
    min_gold: float | None = None,
) -> dict[str, Any]:
    """Return the whole report as JSON values; shares are 0 to 1.

    Without `details` only the questions of people are counted. With `min_gold` people are left out
    as `screening.screen` does: `screening` names them, and `before` has all answers' questions.
    Raises DataError if no answer to an item can be used.
    """
    if min_gold is not None:
        screened = screening.screen(task, answers, min_gold)
        before = build(task, answers, seed, details=False)["people"]
        made = build(task, screened.answers, seed, details)
        made["screening"] = {**screened.report, "before": before}
        return made
    if not any(task.by_id[answer.item].role == "item" for answer in answers.kept):
        raise DataError.at(
            "the answers", None, "nothing to report",
            got=f"{len(answers.kept)} usable answers to gold or qualification items, "
            f"{len(answers.quarantined)} lines set aside"
            + (f" (the first: {answers.quarantined[0].reason})" if answers.quarantined else ""),
            expected="at least one answer to an item", remedy="Collect answers first.",
            setting="answers",
        )  # fmt: skip
    people, models = answers.people(), answers.models()
    items = task.of_role("item")
    votes = Counter(a.item for a in people if task.by_id[a.item].role == "item")
    made = {
        "task": task.fingerprint,
        "page": task.page.name,
        "preset": task.preset,
        "systems": list(task.systems),
        "items": len(items),
        "judges_per_item": task.judges_per_item,
        "quarantined": dict(Counter(_short(q.reason) for q in answers.quarantined)),
        "shared_names": list(answers.shared_names),
        "similar_names": [list(names) for names in answers.similar_names],
        "people": None,
        "models": {},
    }
    if people:
        made["people"] = {
            "judges": len({answer.judge for answer in people}),
            "answers": len(people),
            "items_without_answer": [i.id for i in items if not votes[i.id]],
            "items_with_too_few": sum(0 < votes[i.id] < task.judges_per_item for i in items),
            "questions": _questions(task, people, seed),
        }
        if details:
            made["people"] |= {
                "seconds": _seconds(people),
                "by_judge": judges(task, people),
                "predicted": _predicted(task, people),
                "safety_labels": _safety_labels(task, people),
            }
    for name, given in sorted(models.items()) if details else ():
        made["models"][name] = {
            "answers": len(given),
            "questions": _questions(task, given, seed),
            "by_order": _position(task, given),
            "agreement_with_people": _agreement(task, given, people),
            "gold": _gold(task, given),
        }
    return made


def _short(reason: str) -> str:
    # Reasons quote the line; those of one kind are counted together.
    return reason.partition(": got")[0].partition(" (")[0]


def _questions(task: Task, answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """Return the numbers of each question, and Holm's correction over the comparisons."""
    made = {q.id: _question(task, answers, q, seed) for q in task.page.questions}
    compared = [name for name, one in made.items() if one["kind"] == "comparison"]
    tests = [made[name]["tests"] for name in compared if made[name]["votes"]]
    for name in ("sign_test_items", "sign_test_items_ties_halved"):
        corrected = statistics.holm([test[name] for test in tests])
        for test, p in zip(tests, corrected, strict=True):
            test[f"{name}_holm"] = p
    return made


def _question(task: Task, answers: Sequence[Answer], question: Question, seed: int) -> dict:
    if question.kind in ("text", "checkbox", "edits", "several"):
        return _written(task, answers, question)
    votes = votes_of(task, answers, question)
    if question.compares:
        return _comparison(question, votes, seed)
    names = [c.id for c in question.choices] or [False, True]
    counts = Counter(vote.value for given in votes.values() for vote in given)
    total = sum(counts.values())
    best = Counter(statistics.majority(v.value for v in given) for given in votes.values())
    made = {
        "kind": "marks" if question.kind == "utterances" else "choice",
        "votes": total,
        "counts": {str(name): counts[name] for name in names},
        "shares": {str(name): _share(counts[name], total) for name in names},
        "wilson": {str(name): wilson(counts[name], total) for name in names},
        "majority": {str(name): best[name] for name in names} | {"none": best[None]},
        "alpha": _alphas(question, votes),
    }
    if question.kind == "utterances":
        # A report by one judge sends a dialogue back.
        dialogues: dict[str, bool] = {}
        for (item, _), given in votes.items():
            dialogues[item] = dialogues.get(item, False) or any(vote.value for vote in given)
        reported = sum(dialogues.values())
        made["items_reported"] = {"count": reported, "share": _share(reported, len(dialogues))}
    return made


def _comparison(question: Question, votes: Votes, seed: int) -> dict[str, Any]:
    counts = Counter(side(vote.value) for given in votes.values() for vote in given)
    first, ties, second = (counts[name] for name in SIDES)
    total = first + ties + second
    best = Counter(statistics.majority(side(v.value) for v in given) for given in votes.values())
    # An item without a majority is as good as a tie.
    undecided = best["tie"] + best[None]
    per_item = [Counter(side(vote.value) for vote in given) for given in votes.values()]
    z, one_z = statistics.two_proportion_z(second, first, total), None
    if first + second:
        one_z = statistics.one_sample_z(second, first)
    halves = statistics.halved(best["first"], undecided, best["second"])
    return {
        "kind": "comparison",
        "votes": total,
        "counts": {name: counts[name] for name in SIDES},
        "shares": {name: _share(counts[name], total) for name in SIDES},
        "wilson": {name: wilson(counts[name], total) for name in SIDES},
        "choices": _choice_counts(question, votes),
        # The second system's, against the first.
        "win_rate": {
            "ties_out": _share(second, first + second),
            "ties_out_wilson": wilson(second, first + second),
            "ties_halved": _share(second + ties / 2, total),
            "ties_halved_wilson": wilson(second + ties / 2, total),
        },
        "majority": {**{name: best[name] for name in SIDES}, "none": best[None]},
        "alpha": _alphas(question, votes),
        "position": _shown(vote for given in votes.values() for vote in given),
        "tests": {
            "paper_z": z,
            "paper_p": None if z is None else statistics.p_of_z(z),
            "one_sample_z": one_z,
            "one_sample_p": None if one_z is None else statistics.p_of_z(one_z),
            "sign_test_votes": statistics.sign_test(first, second),
            "sign_test_items": statistics.sign_test(best["first"], best["second"]),
            "sign_test_items_ties_halved": statistics.sign_test(*halves),
            "bootstrap": statistics.bootstrap(
                [c["first"] for c in per_item],
                [c["second"] for c in per_item],
                [c.total() for c in per_item],
                seed,
            ),
        },
        "power": {
            "smallest_effect": statistics.smallest_effect(total) if total else None,
            "votes_for_0.17": statistics.votes_for_effect(0.17),
        },
    }


def _choice_counts(question: Question, votes: Votes) -> dict[str, int]:
    """Return the votes by choice, turned so that A is the first system."""
    counts = Counter(vote.value for given in votes.values() for vote in given)
    return {choice.id: counts[choice.value] for choice in question.choices}


def _alphas(question: Question, votes: Votes) -> dict[str, float | None]:
    """Return Krippendorff's alpha at the question's scale and those below it.

    Nominal counts sides of a comparison: a slight and a definite preference for one are equal.
    """
    made = {}
    for level in SCALES[: SCALES.index(question.scale) + 1]:
        fine = level != "nominal" and question.choices
        numbers = {choice.id: choice.value for choice in question.choices}

        def value(vote: Vote, fine: Any = fine, numbers: Any = numbers) -> Any:
            if question.compares:
                return vote.value if fine else side(vote.value)
            return numbers[vote.value] if fine else vote.value

        rows = [Counter(value(vote) for vote in given) for given in votes.values()]
        values = sorted({v for row in rows for v in row})
        table = [[row[v] for v in values] for row in rows]
        domain = values if level == "interval" else None
        made[level] = alpha(table, level, domain) if len(values) > 1 else None
    return made


def _written(task: Task, answers: Sequence[Answer], question: Question) -> dict[str, Any]:
    """Return how often a text, a box, edits or rules were given, and how much of them."""
    given = [
        answer.answers[field.key]
        for answer in answers
        if task.by_id[answer.item].role == "item"
        for field in fields(task.page, task.by_id[answer.item])
        if field.question.id == question.id and field.key in answer.answers
    ]
    made: dict[str, Any] = {"kind": question.kind, "given": len(given)}
    if question.kind == "checkbox":
        made["checked"] = sum(given)
    elif given:
        made["mean_length"] = sum(map(len, given)) / len(given)  # characters, utterances or rules
    return made


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _shown(votes: Any) -> dict[str, Any]:
    """Return how often A and B, as shown, were preferred: even without a position bias."""
    counts = Counter(side(vote.shown) for vote in votes)
    a, b = counts["first"], counts["second"]
    return {"a": a, "b": b, "share_a": _share(a, a + b), "wilson": wilson(a, a + b),
            "p": statistics.sign_test(a, b)}  # fmt: skip


def _seconds(answers: Sequence[Answer]) -> dict[str, float] | None:
    times = [a.seconds for a in answers if a.seconds is not None]
    if not times:
        return None
    return {"answers": len(times), "median": python_statistics.median(times),
            "mean": python_statistics.fmean(times), "total": sum(times)}  # fmt: skip


def _gold(task: Task, answers: Sequence[Answer]) -> dict[str, Any]:
    made = {}
    for role in ("gold", "qualification"):
        right, total = right_share(task, answers, role)
        made[role] = {"right": right, "total": total, "share": _share(right, total)}
    return made


def judges(task: Task, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return for each judge: answers, agreement with the others' majority, gold, times, position.

    The majority is that of the other judges of a unit; units where they have none do not count.
    """
    agreed, judged = Counter(), Counter()
    shown: dict[str, list[Vote]] = {}
    for question in task.page.questions:
        if question.kind not in ("choice", "utterances"):
            continue
        for given in votes_of(task, answers, question).values():
            values = [side(v.value) if question.compares else v.value for v in given]
            for place, vote in enumerate(given):
                if question.compares:
                    shown.setdefault(vote.judge, []).append(vote)
                others = statistics.majority(values[:place] + values[place + 1 :])
                if others is not None:
                    judged[vote.judge] += 1
                    agreed[vote.judge] += values[place] == others
    by_judge: dict[str, list[Answer]] = {}
    for answer in answers:
        by_judge.setdefault(answer.judge, []).append(answer)
    return {
        name: {
            "answers": len(own),
            "agreement": {"agreed": agreed[name], "of": judged[name],
                          "share": _share(agreed[name], judged[name])},
            **_gold(task, own),
            "seconds": _seconds(own),
            "position": _shown(shown.get(name, ())),
        }
        for name, own in sorted(by_judge.items())
    }  # fmt: skip


def _position(task: Task, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how often a model chose the same system in both orders, and its position bias."""
    made = {}
    for question in task.page.questions:
        if not question.compares:
            continue
        votes = votes_of(task, answers, question)
        pairs = [tuple(side(v.value) for v in given) for given in votes.values() if len(given) == 2]
        made[question.id] = {
            **_shown(vote for given in votes.values() for vote in given),
            "both_orders": len(pairs),
            "consistent": _share(sum(one == two for one, two in pairs), len(pairs)),
        }
    return made


def _agreement(task: Task, model: Sequence[Answer], people: Sequence[Answer]) -> dict[str, Any]:
    """Return how often the model's majority is the people's, on units where both have one."""
    made = {}
    for question in task.page.questions:
        if question.kind not in ("choice", "utterances"):
            continue
        both = [votes_of(task, answers, question) for answers in (model, people)]
        best = [
            {
                unit: statistics.majority(
                    side(v.value) if question.compares else v.value for v in given
                )
                for unit, given in votes.items()
            }
            for votes in both
        ]
        pairs = [
            (best[0][unit], best[1][unit])
            for unit in best[0]
            if best[0][unit] is not None and best[1].get(unit) is not None
        ]
        same = sum(one == two for one, two in pairs)
        made[question.id] = {
            "units": len(pairs),
            "share": _share(same, len(pairs)),
            "wilson": wilson(same, len(pairs)),
            "kappa": statistics.kappa(pairs),
        }
        labels = [choice.id for choice in question.choices]
        if question.kind == "choice" and not question.compares and pairs:
            golds, found = [two for _, two in pairs], [one for one, _ in pairs]
            made[question.id]["classes"] = statistics.classified(golds, found, labels)
    return made


def _predicted(task: Task, people: Sequence[Answer]) -> dict[str, Any]:
    """Return precision, recall and F1 of the items' predicted answers; people's majority is gold.

    A key of `predicted` is a question, or a question and a name for the way of asking: `head/pmi`.
    """
    made = {}
    ways = dict.fromkeys(way for item in task.items for way in item.predicted)
    for way in ways:
        name = way.partition("/")[0]
        if name not in {q.id for q in task.page.questions if q.kind == "choice"}:
            continue
        question = task.page.question(name)
        labels = [choice.id for choice in question.choices]
        golds, found = [], []
        for (item, _), given in votes_of(task, people, question).items():
            gold = statistics.majority(vote.value for vote in given)
            answer = str(task.by_id[item].predicted.get(way, "")).lower()
            # Without a majority there is no gold.
            if gold is not None and answer in labels:
                golds.append(gold)
                found.append(answer)
        if golds:
            made[way] = statistics.classified(golds, found, labels)
    return made


def _safety_labels(task: Task, people: Sequence[Answer]) -> dict[str, int] | None:
    """Return the labels of contexts with exactly three votes, on the page `safety` alone."""
    if task.page.name != "safety":
        return None
    counts = Counter(
        safety.aggregate([SAFETY_VOTES[vote.value] for vote in given])
        for given in votes_of(task, people, task.page.question("label")).values()
        if len(given) == 3
    )
    return {label: counts[label] for label in safety.LABELS}
