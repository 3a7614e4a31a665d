"""A study that is being served: who holds which page, what was answered, what is stored.

Beside the answers file there is a journal of events (ANSWERS.events.jsonl): consent, pages given,
items skipped, feedback. A restart reads both, so nothing depends on the process.
"""

from __future__ import annotations

import calendar
import dataclasses
import fcntl
import logging
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.errors import UserError
from cosmo.tasks.record_files import read_lines
from data_pipeline.annotation import assignment, views
from data_pipeline.annotation.answers import (
    MAX_TEXT_CHARS,
    Answer,
    Answers,
    FieldError,
    append_answers,
    append_lines,
    check_answer,
    check_file,
    read_answers,
    write_quarantined,
)
from data_pipeline.annotation.assignment import DONE, Next
from data_pipeline.annotation.fields import built, plain
from data_pipeline.annotation.task_files import Item, Task

log = logging.getLogger("data_pipeline")

HOLD_SECONDS = 30 * 60.0
CONSENT, GIVEN, SKIPPED, FEEDBACK = "consent", "given", "skipped", "feedback"
# Outcomes of an answer that was sent.
STORED, ALREADY, OTHERWISE, FULL, NOT_GIVEN, FAULTY, TOO_FAST = (
    "stored", "already stored", "answered otherwise", "full", "not given", "faulty", "too fast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of the journal of events; `at` is in seconds since 1970."""

    task: str
    judge: str
    event: str
    at: float
    item: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Sent:
    """The outcome of an answer: one of the constants above, with the fault or seconds left."""

    outcome: str
    fault: str = ""
    key: str = ""
    wait: float = 0.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a judge is: answers given, and all that the judge may give."""

    done: int
    total: int


class Study:
    """A task, its answers on the disk, and the pages that judges hold. Safe for threads.

    One process at a time may have it open. Raises UserError for files that cannot be used.
    """

    def __init__(
        self,
        task: Task,
        answers: Any,
        *,
        hold_seconds: float = HOLD_SECONDS,
        per_judge: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.task, self.path = task, Path(answers)
        self.hold_seconds, self.per_judge, self.clock = hold_seconds, per_judge, clock
        self.events_path = Path(f"{answers}.events.jsonl")
        self._lock = threading.Lock()
        check_file(self.path)
        try:
            durable.make_folder(self.path.parent)
            self._file_lock = open(f"{answers}.lock", "a+")  # noqa: SIM115 held until `close`
            fcntl.flock(self._file_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{answers} is being served by another process: stop it, or give another file",
                setting="answers",
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write {answers}: {error.strerror}", setting="answers"
            ) from error
        try:
            self._read()
        except BaseException:
            self._file_lock.close()
            raise

    def _read(self) -> None:
        found = Answers(())
        if self.path.exists() and self.path.stat().st_size:
            found = read_answers(self.task, [self.path])
        self.quarantined = found.quarantined
        write_quarantined(f"{self.path}.quarantined.jsonl", found.quarantined)
        self.answers = list(found.kept)
        self.given: dict[tuple[str, str], float] = {}
        self.consented: set[str] = set()
        self.skipped: dict[str, set[str]] = {}
        self.bad_events = 0
        if self.events_path.exists():
            for _, line in read_lines(self.events_path):
                try:
                    event = built(Event, json_lines.value(line), "the event")
                except ValueError:  # a kill may cut the last one
                    self.bad_events += bool(line.strip())
                    continue
                if event.task == self.task.fingerprint:
                    self._take(event)
            append_lines(self.events_path, b"")  # ends a line that was cut
        self._own: dict[str, dict[str, Answer]] = {}
        for answer in self.answers:
            self._own.setdefault(answer.judge, {})[answer.item] = answer

    def close(self) -> None:
        """Let other processes open the study."""
        self._file_lock.close()

    def _take(self, event: Event) -> None:
        key = (event.judge, event.item)
        if event.event == CONSENT:
            self.consented.add(event.judge)
        elif event.event == GIVEN and event.item in self.task.by_id:
            self.given[key] = event.at
        elif event.event == SKIPPED:
            self.skipped.setdefault(event.judge, set()).add(event.item)

    def _note(self, judge: str, event: str, item: str = "", text: str = "", sync=True) -> None:
        made = Event(self.task.fingerprint, judge, event, self.clock(), item, text)
        line = json_lines.line(plain(made))
        if sync:
            append_lines(self.events_path, line)
        else:
            # Survives a kill. After a power loss the judge gets the item anew.
            try:
                with open(self.events_path, "ab", buffering=0) as file:
                    file.write(line)
            except OSError as error:
                problem = f"cannot write {self.events_path}: {error.strerror}"
                raise UserError(problem, setting="answers") from error
        self._take(made)

    def _held(self) -> Mapping[str, Collection[str]]:
        """Return {item: judges} of pages that are open, unanswered, and not too old."""
        now, held = self.clock(), {}
        for (judge, item), at in self.given.items():
            answered = item in self._own.get(judge, ())
            if not answered and item not in self.skipped.get(judge, ()) and self._is_young(at, now):
                held.setdefault(item, set()).add(judge)
        return held

    def _is_young(self, at: float, now: float) -> bool:
        return now - at < self.hold_seconds

    def next(self, judge: str) -> Next:
        """Return the judge's next item, which the judge then holds for `hold_seconds`."""
        with self._lock:
            return self._next(judge)

    def _next(self, judge: str) -> Next:
        held, skipped = self._held(), self.skipped.get(judge, set())
        if self.per_judge is not None and self._items_done(judge) >= self.per_judge:
            # The gold items at the end are of use to nobody.
            return Next(None, reason=DONE)
        found = assignment.assign(self.task, self.answers, judge, held, skipped)
        if found.item is not None and judge not in held.get(found.item.id, ()):
            self._note(judge, GIVEN, found.item.id, sync=False)
        return found

    def _items_done(self, judge: str) -> int:
        return sum(self.task.by_id[item].role == "item" for item in self._own.get(judge, ()))

    def progress(self, judge: str) -> Progress:
        """Return how far a judge is. The total shrinks as others answer items."""
        with self._lock:
            done = len(self._own.get(judge, ()))
            skipped = self.skipped.get(judge, set())
            if self.per_judge is not None and self._items_done(judge) >= self.per_judge:
                return Progress(done, done)
            left = assignment.remaining(
                self.task, self.answers, judge, self._held(), skipped, self.per_judge
            )
            return Progress(done, done + left)

    def seconds_left(self, judge: str, item: str) -> float:
        """Return how long the judge still has to look at a page before it can be sent."""
        waited = self.clock() - self.given.get((judge, item), self.clock())
        return max(self.task.min_seconds - max(waited, 0.0), 0.0)

    def agree(self, judge: str) -> None:
        """Store the judge's consent."""
        with self._lock:
            if judge not in self.consented:
                self._note(judge, CONSENT, text=self.task.page.consent)

    def feedback(self, judge: str, text: str, item: str = "") -> None:
        """Store what a judge wrote about the study."""
        text = text.strip()[:MAX_TEXT_CHARS]
        if text:
            with self._lock:
                self._note(judge, FEEDBACK, item, text)

    def skip(self, judge: str, name: str) -> bool:
        """Store that the judge does not want an item; return whether it can be skipped."""
        item = self.task.by_id.get(name)
        if item is None or item.role == "qualification":
            return False
        with self._lock:
            if (judge, name) not in self.given or name in self._own.get(judge, ()):
                return False
            if name not in self.skipped.get(judge, ()):
                self._note(judge, SKIPPED, name)
            return True

    def send(self, judge: str, name: str, form: Mapping[str, str]) -> Sent:
        """Check an answer and put it on the disk; return the outcome.

        Raises UserError if it cannot be written: then it is not stored.
        """
        item = self.task.by_id.get(name)
        with self._lock:
            if item is None or judge not in self.consented or (judge, name) not in self.given:
                return Sent(NOT_GIVEN)
            given = views.form_answers(self.task.page, item, form)
            before = self._own.get(judge, {}).get(name)
            if before is not None:
                return Sent(ALREADY if before.answers == given else OTHERWISE)
            if not self._has_room(judge, item):
                return Sent(FULL)
            now = self.clock()
            seconds = max(now - self.given[judge, name], 0.0)
            answer = Answer(
                self.task.fingerprint, name, judge, given,
                max(round(seconds, 1), self.task.min_seconds),
                time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
                assignment.shown_order(self.task, item, judge),
            )  # fmt: skip
            try:
                check_answer(self.task, answer)
            except FieldError as fault:
                return Sent(FAULTY, fault.expected, fault.key)
            if wait := self.seconds_left(judge, name):
                return Sent(TOO_FAST, wait=wait)
            append_answers(self.path, [answer])
            self.answers.append(answer)
            self._own.setdefault(judge, {})[name] = answer
            return Sent(STORED)

    def _has_room(self, judge: str, item: Item) -> bool:
        """Return whether an answer still counts. A page that is held always has room."""
        if item.role != "item" or self._is_young(self.given[judge, item.id], self.clock()):
            return True
        votes = sum(a.item == item.id and not a.by_model for a in self.answers)
        others = {*self._held().get(item.id, ())} - {judge}
        return votes + len(others) < self.task.judges_per_item

    def status(self, names: Collection[str] = ()) -> dict[str, Any]:
        """Return the state of the study for its operator, as JSON values; no answer is in it."""
        with self._lock:
            task, now = self.task, self.clock()
            items = task.of_role("item")
            votes = Counter(a.item for a in self.answers if not a.by_model)
            counted = {item.id: min(votes[item.id], task.judges_per_item) for item in items}
            wanted = len(items) * task.judges_per_item
            held = self._held()
            recent = sum(now - _seconds(a.time) < 3600 for a in self.answers if a.time)
            people = sorted({*names, *(a.judge for a in self.answers if not a.by_model)})
            return {
                "task": task.fingerprint,
                "page": task.page.name,
                "process": os.getpid(),
                "items": len(items),
                "judges_per_item": task.judges_per_item,
                "wanted": wanted,
                "answered": sum(counted.values()),
                "missing": wanted - sum(counted.values()),
                "items_complete": sum(n >= task.judges_per_item for n in counted.values()),
                "items_begun": sum(0 < n < task.judges_per_item for n in counted.values()),
                "pages_open": sum(map(len, held.values())),
                "answers_last_hour": recent,
                "lines_set_aside": len(self.quarantined),
                "judges": [self._of_judge(name, held, now) for name in people],
            }

    def _of_judge(self, name: str, held: Mapping[str, Collection[str]], now: float) -> dict:
        own = list(self._own.get(name, {}).values())
        seconds = [a.seconds for a in own if a.seconds is not None]
        times = sorted(_seconds(a.time) for a in own if a.time)
        gold = assignment.right_share(self.task, own, "gold")
        tests = assignment.right_share(self.task, own, "qualification")
        # A pause is no work: answers an hour follow from the time spent on pages.
        spent = sum(seconds)
        return {
            "judge": name,
            "consented": name in self.consented,
            "answered": len(own),
            "skipped": len(self.skipped.get(name, ())),
            "open": sorted(item for item, judges in held.items() if name in judges),
            "gold_right": gold[0],
            "gold_answered": gold[1],
            "qualification_right": tests[0],
            "qualification_answered": tests[1],
            "median_seconds": round(statistics.median(seconds), 1) if seconds else None,
            "answers_per_hour": round(3600 * len(seconds) / spent, 1) if spent else None,
            "minutes_since_last": round((now - times[-1]) / 60, 1) if times else None,
        }


def _seconds(text: str) -> float:
    """Return the seconds since 1970 of a time of an answer; 0 for a text that is none."""
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0
