"""Make a ProsocialDialog step by step: every start goes as far as answers of people allow.

| step | who answers |
| --- | --- |
| 01-draft | the model: u1 to u3, candidate rules |
| 02-round1-proofreading, 03-round1-rots | a person each, pages P2 and P1: u4 |
| 04-round2-model, 05-round2-proofreading, 06-round2-rots | model, persons: u5 and u6 |
| 07-validation1, 08-repair1, 09-validation2, 10-repair2 | three persons, page P4; one, page P2 |
| 11-safety | three persons, page P3 |

A step that people answer writes `tasks/NAME.jsonl`, and reads `answers/NAME*.jsonl`. It ends the
start if answers are missing. A dialogue that lacks an answer is quarantined with its reason.

Choices that the paper does not give: a dialogue whose model has no further utterance ends after
four. The repair after each validation is proofreading of the reported dialogues.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cosmo.engine.base import durable
from cosmo.engine.base.errors import DataError
from data_pipeline.annotation.answers import Answer, read_answers, write_quarantined
from data_pipeline.annotation.ask import Asked
from data_pipeline.annotation.task_files import Task, read_task, write_task
from data_pipeline.calls.requests import Stage
from data_pipeline.co3.prompts import Prompts
from data_pipeline.prosocial import draft, people
from data_pipeline.prosocial.people import Record
from data_pipeline.prosocial.situations import Situation
from data_pipeline.prosocial.store import Outcome, Store, rejection

log = logging.getLogger("data_pipeline")

# Asks the model: {name: start of a stage} -> results and rejections.
Ask = Callable[[Mapping[str, Callable[[], Stage]]], Asked]
FAILED = ("failed: ", "error: ")  # reasons that another start may mend


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run. `leave_out` quarantines what has no answer instead of waiting for it."""

    prompts: Prompts
    people: people.Settings = people.Settings()
    rounds: int = 2
    validations: int = 2
    rules: int = 3
    leave_out: bool = False


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A step that has to wait: for people (a task file, answers missing), or for the model."""

    step: str
    missing: int = 0
    items: int = 0
    task: Path | None = None
    answers: Path | None = None
    exit_code: int = 0
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its name, who answers, and of which page."""

    name: str
    kind: str  # draft, model, proofreading, rots, validation, repair or safety
    number: int = 0  # of its round, or of its validation

    @property
    def page(self) -> str:
        """Return the page that people answer, "" if the model does."""
        pages = {"repair": "proofreading", "draft": "", "model": ""}
        return pages.get(self.kind, self.kind)


def steps(rounds: int = 2, validations: int = 2) -> list[Step]:
    """Return the steps of a run in their order."""
    kinds = [("draft", "draft", 0)]
    for number in range(1, rounds + 1):
        kinds += [(f"round{number}-model", "model", number)] * (number > 1)
        kinds += [(f"round{number}-{kind}", kind, number) for kind in ("proofreading", "rots")]
    for number in range(1, validations + 1):
        kinds += [(f"{kind}{number}", kind, number) for kind in ("validation", "repair")]
    kinds.append(("safety", "safety", 0))
    return [Step(f"{n:02d}-{name}", *rest) for n, (name, *rest) in enumerate(kinds, 1)]


def make(
    store: Store, situations: Sequence[Situation], settings: Settings, ask: Ask
) -> tuple[Outcome, Waiting | None]:
    """Do every step that can be done. Return what there is, and what the run waits for.

    The dialogues of the outcome are complete if it waits for nothing.
    """
    salt = store.salt()
    records: tuple[Record, ...] = ()
    rejected: list[Record] = []
    for step in steps(settings.rounds, settings.validations):
        outcome = store.read(step.name)
        if outcome is None:
            if step.kind == "draft":
                made = _draft(step, situations, settings, ask)
            elif step.kind == "model":
                made = _continue(step, records, settings, ask)
            else:
                made = _people(step, records, settings, store, salt)
            if isinstance(made, Waiting):
                return Outcome(records, tuple(rejected)), made
            outcome = made
            store.write(step.name, outcome)
            log.info(
                "%s: %d dialogues, %d quarantined",
                step.name, len(outcome.records), len(outcome.rejected),
            )  # fmt: skip
        records = outcome.records
        rejected += outcome.rejected
    return Outcome(records, tuple(rejected)), None


def _draft(
    step: Step, situations: Sequence[Situation], settings: Settings, ask: Ask
) -> Outcome | Waiting:
    stages = {
        one.id: lambda one=one: draft.draft(one, settings.prompts, settings.rules)
        for one in situations
    }
    asked = ask(stages)
    if waiting := _unfinished(step, asked, settings):
        return waiting
    records = [asked.results[name] for name in stages if name in asked.results]
    lost = [asked.rejected[name] for name in stages if name in asked.rejected]
    return Outcome(
        tuple(records), tuple(rejection(one.id, one.stage, one.reason, one.record) for one in lost)
    )


def _continue(
    step: Step, records: Sequence[Record], settings: Settings, ask: Ask
) -> Outcome | Waiting:
    going = [record for record in records if _has_rounds(record, step.number - 1)]
    asked = ask(
        {r["id"]: lambda r=r: draft.continuation(r, settings.prompts) for r in going}
    )  # fmt: skip
    if waiting := _unfinished(step, asked, settings):
        return waiting
    made = []
    for record in records:
        if record["id"] in asked.results:
            said = asked.results[record["id"]]
            record = {**record, "turns": [*record["turns"], said]}
        elif record["id"] in asked.rejected:
            # The dialogue is whole without it, so it stays, and is marked.
            reason = asked.rejected[record["id"]].reason
            record = {**record, "marks": [*record["marks"], f"{step.name}: {reason}"]}
        made.append(record)
    return Outcome(tuple(made))


def _unfinished(step: Step, asked: Asked, settings: Settings) -> Waiting | None:
    """Return what a step of the model waits for: a raised cap, or calls that failed."""
    if asked.stopped:
        return Waiting(step.name, exit_code=asked.exit_code, why=asked.stopped)
    failed = [one for one in asked.rejected.values() if one.reason.startswith(FAILED)]
    if failed and not settings.leave_out:
        why = f"{len(failed)} of {len(failed) + len(asked.results)} have no answer of the server"
        return Waiting(step.name, exit_code=1, why=f"{why} ({failed[0].reason})")
    return None


def _has_rounds(record: Record, number: int) -> bool:
    """Return whether a dialogue has a response in each of its first `number` rounds."""
    return len(record["rounds"]) == number and len(record["turns"]) == 2 + 2 * number


def _people(
    step: Step, records: Sequence[Record], settings: Settings, store: Store, salt: str
) -> Outcome | Waiting:
    asked = [record for record in records if _is_asked(step, record)]
    if not asked:
        return Outcome(tuple(records))
    task = people.task(step.name, step.page, asked, settings.people)
    file = store.path("tasks", step.name)
    _write_once(file, task)
    answers = _answers(store, step.name, task)
    given = people.by_item(task, answers)
    short = [name for name, some in given.items() if len(some) < task.judges_per_item]
    if short and not settings.leave_out:
        missing = sum(task.judges_per_item - len(given[name]) for name in short)
        return Waiting(
            step.name, missing, len(short), file, store.path("answers", step.name)
        )  # fmt: skip
    made, lost = [], []
    for record in records:
        some = given.get(record["id"])
        if some is None:
            made.append(record)
        elif len(some) < task.judges_per_item:
            reason = f"answered by {len(some)} of {task.judges_per_item}" if some else _NOBODY
            lost.append(rejection(record["id"], step.name, reason, record))
        else:
            made.append(_with_answers(step, record, some, salt))
    return Outcome(tuple(made), tuple(lost))


_NOBODY = "answered by nobody"


def _is_asked(step: Step, record: Record) -> bool:
    """Return whether a step asks people about a dialogue."""
    if step.kind == "proofreading":
        # A dialogue whose model had no further utterance ends in an even number.
        return len(record["turns"]) == 1 + 2 * step.number
    if step.kind == "rots":
        return len(record["turns"]) == 1 + 2 * step.number
    if step.kind == "repair":
        return record["validations"][-1]["reported"]
    return True


def _with_answers(step: Step, record: Record, answers: list[Answer], salt: str) -> Record:
    if step.kind == "proofreading":
        return people.proofread(record, answers[0], step.number, salt)
    if step.kind == "rots":
        return people.respond(record, answers[0], salt)
    if step.kind == "repair":
        return people.repaired(record, answers[0], salt)
    if step.kind == "validation":
        return people.validated(record, answers, step.number, salt)
    return people.labelled(record, answers, salt)


def _write_once(file: Path, task: Task) -> None:
    """Write a task file, or check that the existing one is of the same task."""
    if not file.exists():
        durable.make_folder(file.parent)
        write_task(file, task)
        return
    found = read_task(file)
    if found.fingerprint != task.fingerprint:
        raise DataError.at(
            file, None, "the file is of another task", got=found.fingerprint,
            expected=task.fingerprint, setting="output",
            remedy="Give the settings of the earlier start, or move the file and its answers away.",
        )  # fmt: skip


def _answers(store: Store, name: str, task: Task) -> Sequence[Answer]:
    """Return the usable answers to a step; lines that cannot be used are set aside in a file."""
    folder = store.folder / "answers"
    aside = store.folder / "answers_quarantined" / f"{name}.jsonl"
    # A prefix, because several people may each hand in a file.
    files = sorted(path for path in folder.glob(f"{name}*.jsonl") if path.read_bytes().strip())
    if not files:
        return ()
    answers = read_answers(task, files)
    if answers.quarantined:
        durable.make_folder(aside.parent)
        log.warning(
            "%s: %d lines cannot be used: %s (%s)",
            name, len(answers.quarantined), aside, answers.quarantined[0].reason,
        )  # fmt: skip
    if answers.shared_names:
        log.warning("%s: a worker's name is in several files: %s", name, answers.shared_names[0])
    if answers.quarantined or aside.exists():
        write_quarantined(aside, answers.quarantined)
    return answers.people()
