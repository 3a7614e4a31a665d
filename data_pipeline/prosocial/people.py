"""Make the tasks that people answer, and put their answers into the dialogues.

Kim et al. 2022, sections 3.2 and 3.3, appendices A.3 and A.4. A round of writing is proofreading
(page P2), then rules of thumb and a response (P1); validation is page P4, safety page P3. The pages
are those of `annotation`.

Choices that the paper does not give: a reported dialogue is proofread as a whole. Rows 0 and 1 both
have the rules of the first round. Workers appear as keyed hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo.engine.base.errors import DataError
from data_pipeline.annotation import pages
from data_pipeline.annotation.answers import Answer
from data_pipeline.annotation.task_files import Item, Task
from data_pipeline.prosocial.situations import MAX_CANDIDATES

Record = dict[str, Any]
JUDGES = {"proofreading": 1, "rots": 1, "validation": 3, "safety": 3}
# The page's answers, and the votes of the published rows.
VOTES = {"casual": "casual", "caution": "needs caution", "intervention": "needs intervention"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all tasks; `min_seconds` and `consent` are those of each page."""

    seed: int = 0
    min_seconds: float = 0.0
    consent: str = ""
    qualification_pass: float = 0.8
    # Items with known answers that a worker has to pass first, by page.
    qualification: Mapping[str, tuple[Item, ...]] = dataclasses.field(default_factory=dict)


def task(name: str, page: str, records: Sequence[Record], settings: Settings) -> Task:
    """Return the task of a step: an item for each dialogue."""
    made = pages.load(page)
    if settings.consent:
        made = dataclasses.replace(made, consent=settings.consent)
    tests = tuple(settings.qualification.get(page, ()))
    items = tuple(
        Item(
            record["id"],
            context=tuple(record["turns"]),
            rots=tuple(shown_rules(record)) if page == "rots" else (),
            about={"source": record["source"]},
        )
        for record in records
    )
    return Task(
        made,
        (*tests, *items),
        seed=settings.seed,
        judges_per_item=JUDGES[page],
        min_seconds=settings.min_seconds,
        qualification_pass=settings.qualification_pass if tests else 0.0,
        preset=f"prosocial: {name}",
    )


def shown_rules(record: Record) -> list[str]:
    """Return the rules to choose from: those of the earlier round first, at most five."""
    earlier = [rule for done in record["rounds"] for rule in done.get("rots", ())]
    return list(dict.fromkeys([*earlier, *record["candidates"]]))[:MAX_CANDIDATES]


def pseudonym(judge: str, salt: str) -> str:
    """Return a worker's pseudonym: equal for equal names under one salt."""
    return hashlib.blake2b(judge.encode(), digest_size=6, key=salt.encode()[:64]).hexdigest()


def proofread(record: Record, answer: Answer, number: int, salt: str) -> Record:
    """Return the record with the edits of round `number`, counted from 1."""
    turns, edits = _edited(record["turns"], answer)
    about = {"number": number, "proofreader": _worker(answer, salt), "edits": edits}
    return {**record, "turns": turns, "rounds": [*record["rounds"], about]}


def respond(record: Record, answer: Answer, salt: str) -> Record:
    """Return the record with the response and the rules of thumb of its latest round."""
    given, shown = answer.answers, shown_rules(record)
    chosen = [shown[number - 1] for number in given.get("chosen_rules", ())]
    new: list[str] = []
    if given["rule"] == "new":
        new = _split(given["new_rule"])
    replaced: list[str] = []
    if given.get("rule_wrong"):
        replaced, chosen, new = chosen, [], _split(given["better_rule"])
    about = {
        **record["rounds"][-1],
        "writer": _worker(answer, salt),
        "shown": shown,
        "rule": given["rule"],
        "chosen": chosen,
        "new": new,
        **({"replaced": replaced} if replaced else {}),
        "rots": [*chosen, *new],
        "response": " ".join(given["response"].split()),
    }
    return {
        **record,
        "turns": [*record["turns"], about["response"]],
        "rounds": [*record["rounds"][:-1], about],
    }


def validated(record: Record, answers: Sequence[Answer], number: int, salt: str) -> Record:
    """Return the record with the reports of validation `number`."""
    reports = [
        {
            **_worker(answer, salt),
            "incoherent": sorted(answer.answers.get("incoherent", ())),
            "harsh": sorted(answer.answers.get("harsh", ())),
        }
        for answer in answers
    ]
    reported = any(one["incoherent"] or one["harsh"] for one in reports)
    about = {"number": number, "reports": reports, "reported": reported}
    return {**record, "validations": [*record["validations"], about]}


def repaired(record: Record, answer: Answer, salt: str) -> Record:
    """Return a reported record with the edits that answer its reports."""
    turns, edits = _edited(record["turns"], answer)
    about = {**record["validations"][-1], "proofreader": _worker(answer, salt), "edits": edits}
    return {**record, "turns": turns, "validations": [*record["validations"][:-1], about]}


def labelled(record: Record, answers: Sequence[Answer], salt: str) -> Record:
    """Return the record with three votes and reasons for each context."""
    votes = [
        [
            {
                **_worker(answer, salt),
                "vote": VOTES[answer.answers[f"label.{number}"]],
                "reason": " ".join(answer.answers[f"reason.{number}"].split()),
            }
            for answer in answers
        ]
        for number in range(1, len(record["turns"]) + 1, 2)
    ]
    return {**record, "votes": votes}


def by_item(task: Task, answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Return people's answers to each item, in the files' order, no more than the task wants."""
    found: dict[str, list[Answer]] = {item.id: [] for item in task.of_role("item")}
    for answer in answers:
        given = found.get(answer.item)
        if given is not None and not answer.by_model and len(given) < task.judges_per_item:
            given.append(answer)
    return found


def check_ends(record: Record) -> None:
    """Raise DataError unless a dialogue has pairs of utterances."""
    if len(record["turns"]) % 2 or not record["turns"]:
        raise DataError(f"{record['id']}: {len(record['turns'])} utterances, expected pairs")


def _edited(turns: Sequence[str], answer: Answer) -> tuple[list[str], list[dict[str, Any]]]:
    made, edits = list(turns), []
    for number, text in sorted(answer.answers["changes"].items(), key=lambda pair: int(pair[0])):
        place = int(number) - 1
        after = " ".join(text.split())
        edits.append({"utterance": place + 1, "before": made[place], "after": after})
        made[place] = after
    return made, edits


def _worker(answer: Answer, salt: str) -> dict[str, Any]:
    return {
        "worker": pseudonym(answer.judge, salt), "seconds": answer.seconds, "time": answer.time,
    }  # fmt: skip


def _split(text: str) -> list[str]:
    """Return the rules of a text that separates them with semicolons."""
    return [one for part in re.split(r"\s*;\s*", text) if (one := " ".join(part.split()))]
