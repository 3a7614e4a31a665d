"""Score safety guards on labelled dialogues, side by side: `python -m canary eval --against=URL`.

A side is a guard that answers over HTTP (`Remote`) or a local Canary (`Local`). Every side judges
the same dialogues. Verdicts are kept in an output folder, so that a command that was stopped
continues, and a later command adds a side.
"""

import asyncio
import dataclasses
import hashlib
import logging
import os
import random
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from canary import evaluation, guard_styles, reading
from canary.guard_styles import AnswerError, Verdict
from canary.labeller import Labeller
from cosmo.engine.base import files, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError, shortened, shown
from cosmo.engine.base.retries import RetryPolicy, is_retryable, retry_after
from cosmo.engine.base.work_units import WorkUnits
from cosmo.tasks import readers
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import files_for_split
from cosmo.tasks.record_files import read_records
from cosmo.tasks.safety import LABELS

log = logging.getLogger("canary")

SAVE_SECONDS = 3.0  # between two savings of verdicts: a kill costs those made since
RETRIES = RetryPolicy(tries=6)
MAX_PAUSE_SECONDS = 300.0  # that a server may ask for
MAX_FAILED_IN_A_ROW = 10  # dialogues without an answer, after which a guard counts as gone
REFUSED = (401, 403, 404)  # no dialogue can be judged
MAX_RAW_CHARS = 2000  # of a bad answer that are kept
TWO = ("safe", "unsafe")


@dataclasses.dataclass(frozen=True)
class Question:
    """A dialogue and the gold answer about its last turn: one of LABELS, or of TWO."""

    id: str
    turns: tuple[str, ...]
    gold: str


class Unanswered(Exception):  # noqa: N818, no error of this program
    """A guard gave no answer after all tries."""


class Side(Protocol):
    """A guard under test."""

    name: str  # of its row in tables and of its files

    def about(self) -> dict[str, Any]:
        """Return what its verdicts depend on, as JSON values."""

    async def judge(self, turns: Sequence[str]) -> tuple[Verdict, float]:
        """Return (verdict, seconds). Raises AnswerError, Unanswered and UserError."""

    async def aclose(self) -> None:
        """Release what it holds."""


def read_questions(path: str, split: str) -> tuple[str, list[Question]]:
    """Return (the corpus, its questions) of ProsocialDialog, ToxiChat or lines {turns, label}.

    In our lines `label` is one of the five, "safe" or "unsafe". Raises DataError.
    """
    corpus = corpus_of(path, split)
    if corpus == "toxichat":
        found = readers.read_toxichat(path, split)
        return corpus, [Question(one.id, one.turns, TWO[one.offensive]) for one in found]
    if corpus == "turns":
        return corpus, list(_own_lines(path, split))
    cases = evaluation.cases(path, split)
    return corpus, [Question(case.id, case.turns, case.gold.label) for case in cases]


def corpus_of(path: str, split: str) -> str:
    """Return "toxichat", "turns" or "prosocial" by the first record under `path`."""
    for file in files_for_split(path, split):
        with files.opened(file, text=False) as stream:
            head = stream.read(1 << 20).split(b"\n", 1)[0]
        try:
            row = json_lines.value(head)
        except ValueError:
            return "prosocial"  # whose reader names what is wrong
        fields = row.keys() if isinstance(row, dict) else ()
        if "reddit_thread" in fields:
            return "toxichat"
        return "turns" if {"turns", "label"} <= set(fields) else "prosocial"
    return "prosocial"


def _own_lines(path: str, split: str) -> Iterator[Question]:
    number = 0
    for file in files_for_split(path, split):
        for place, row in read_records(file):
            yield _own_line(row, place, number)
            number += 1


def _own_line(row: Any, place: Place, number: int) -> Question:
    if not isinstance(row, Mapping):
        raise place.error("not a record", shown(row), "an object {turns, label}")
    if row.get("label") not in (*LABELS, *TWO):
        expected = f"one of {(*LABELS, *TWO)}"
        raise place.error("field 'label' has an unknown value", shown(row.get("label")), expected)
    try:
        turns = reading.checked(row.get("turns"))
    except ValueError as error:
        raise place.error(str(error), shown(row.get("turns")), "a list of texts") from error
    name = row.get("id")
    return Question(str(number) if name is None else str(name), turns, row["label"])


class Local:
    """A Canary on this machine's devices, through a `Labeller`."""

    def __init__(self, labeller: Labeller, name: str, checkpoint: str, dtype: str):
        self.name = name
        self._labeller, self._about = labeller, {"checkpoint": checkpoint, "dtype": dtype}

    def about(self) -> dict[str, Any]:
        """Return what its verdicts depend on."""
        return self._about

    async def judge(self, turns: Sequence[str]) -> tuple[Verdict, float]:
        """Return (verdict, seconds)."""
        began = time.monotonic()
        chirp = await self._labeller.label(turns, rots=False)
        return Verdict(probabilities=chirp.probabilities), time.monotonic() - began

    async def aclose(self) -> None:
        """Stop the labeller's thread."""
        self._labeller.close()


class Remote:
    """A guard that answers over HTTP in one of `guard_styles.STYLES`.

    `key_variable` names the environment variable with its key. Raises UserError for an address
    that is none, and without the openai library.
    """

    def __init__(
        self,
        url: str,
        model: str,
        style: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        name: str | None = None,
        retries: RetryPolicy = RETRIES,
    ):
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise UserError(f"{error}: pip install 'cosmo-dialogue[guards]'") from error
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{shortened(url)} is no address of a guard; give its API's, such as "
                "http://127.0.0.1:8000/v1",
                setting="against",
            )
        # Without user, password and query, which may hold secrets.
        port = f":{parts.port}" if parts.port else ""
        self.address = f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"
        self.model, self.style = model, style
        self.name = name or model
        self._form = guard_styles.STYLES[style]
        self._retries, self._timeout = retries, timeout
        self._openai, self._response = openai, httpx2.Response
        # The tries are ours: a pause that the server asks for holds all calls, not one.
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get(key_variable, "").strip() or "none",
            timeout=timeout,
            max_retries=0,
        )
        self._paused_until = 0.0
        self._random = random.Random(0)

    def about(self) -> dict[str, Any]:
        """Return what its verdicts depend on."""
        return {"address": self.address, "model": self.model, "style": self.style}

    async def judge(self, turns: Sequence[str]) -> tuple[Verdict, float]:
        """Return (verdict, seconds of the calls that were answered)."""
        requests = self._form.requests(self.model, turns)
        # A guard with several requests is asked at once, and is as slow as the slowest.
        answered = await asyncio.gather(*map(self._post, requests))
        values = []
        for text, _ in answered:
            try:
                values.append(json_lines.value(text))
            except ValueError as error:
                raise AnswerError(f"{error}: {shown(text)}") from error
        return self._form.verdict(values), max(seconds for _, seconds in answered)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _post(self, request: guard_styles.Request) -> tuple[str, float]:
        """Return (the answer's text, its seconds). Raises Unanswered, AnswerError, UserError."""
        openai, reason = self._openai, ""
        for tried in range(1, self._retries.tries + 1):
            await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
            began, wait = time.monotonic(), None
            try:
                async with asyncio.timeout(self._timeout):  # the library's bounds each read
                    reply = await self._client.post(
                        request.path, body=request.body, cast_to=self._response
                    )
                return reply.text, time.monotonic() - began
            except openai.APIStatusError as error:
                status = error.status_code
                reason = f"status {status}: {' '.join(error.response.text.split())[:200]}"
                if status in REFUSED:
                    raise UserError(
                        f"{self.address}{request.path} refuses every call ({reason}); check the "
                        "address, the model's name, the style and the key",
                        setting=("against", "model", "style", "api_key_env"),
                    ) from error
                if not is_retryable(status):
                    raise AnswerError(reason) from error
                wait = retry_after(error.response.headers)
            except (openai.APIConnectionError, TimeoutError) as error:
                cause = error.__cause__ or error
                reason = f"no answer: {type(cause).__name__} {cause}".strip()
            if wait is not None:
                until = time.monotonic() + min(wait, MAX_PAUSE_SECONDS)
                self._paused_until = max(self._paused_until, until)
            elif tried < self._retries.tries:
                await asyncio.sleep(self._retries.wait(tried, self._random))
        raise Unanswered(reason)


def judge(
    side: Side,
    questions: Sequence[Question],
    folder: Any,
    *,
    only_last: bool,
    concurrency: int,
    overwrite: bool = False,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Return a side's line for each question, in order; lines that `folder` has are not asked for.

    A line has id, num_turns and gold. A verdict adds seconds, graded, and either score and unsafe
    or probabilities. Without one, `bad` is the reason. With `only_last`
    the guard sees the last turn alone. `on_done` gets the number of lines made.

    Raises UserError if the guard refuses all calls or answers none; what was saved stays.
    """
    units = WorkUnits(str(folder), folder / f".{_file_name(side.name)}")
    settings = {
        **side.about(),
        "turns": "last" if only_last else "all",
        "questions": digest(questions),
    }
    if overwrite:
        units.remove()
    units.prepare()
    units.begin({"settings": settings})
    units.remove_partial_files()
    lines = asyncio.run(_Run(side, units, only_last, on_done).all(questions, concurrency))
    write_atomic(verdicts_path(folder, side.name), json_lines.lines(lines))
    return lines


def digest(questions: Sequence[Question]) -> str:
    """Return a checksum of the questions: verdicts on others cannot be compared."""
    found = hashlib.sha256()
    for one in questions:
        found.update(json_lines.line([one.id, one.turns, one.gold]))
    return found.hexdigest()


def verdicts_path(folder: Any, name: str) -> Any:
    """Return the file in `folder` with the verdicts of the side `name`."""
    return folder / f"{_file_name(name)}.jsonl"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "guard"


@dataclasses.dataclass
class _Run:
    side: Side
    units: WorkUnits
    only_last: bool
    on_done: Callable[[int], None]
    failed_in_a_row: int = 0
    unsaved: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    async def all(self, questions: Sequence[Question], concurrency: int) -> list[dict[str, Any]]:
        lines = self._saved()
        self.on_done(len(lines))
        left = ((n, question) for n, question in enumerate(questions) if n not in lines)

        async def work() -> None:
            for number, question in left:
                line = lines[number] = await self._line(question)
                # A dialogue without an answer is asked again when the command is given again.
                if not line.get("unanswered"):
                    self.unsaved[number] = line

        async def save() -> None:
            while True:
                await asyncio.sleep(SAVE_SECONDS)
                self._save()

        saving = asyncio.ensure_future(save())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            # One error is enough: the others follow from the same guard.
            raise errors.exceptions[0] from None
        finally:
            saving.cancel()
            self._save()
            await self.side.aclose()
        return [lines[number] for number in range(len(questions))]

    def _saved(self) -> dict[int, dict[str, Any]]:
        """Return the lines that earlier commands saved, by the question's number."""
        found = {}
        for path in self.units.folder.glob("verdicts-*.jsonl"):
            try:
                values = [json_lines.value(line) for line in path.read_bytes().splitlines()]
            except ValueError as error:
                raise UserError(
                    f"{path} is damaged ({error}); overwrite the output", setting="overwrite"
                ) from error
            found |= {value.pop("number"): value for value in values}
        return found

    def _save(self) -> None:
        """Write the lines that no file has yet into a file of their own."""
        if self.unsaved:
            lines = [{"number": number, **line} for number, line in self.unsaved.items()]
            path = self.units.folder / f"verdicts-{uuid.uuid4().hex}.jsonl"
            self.units.write(path, json_lines.lines(lines))
            self.unsaved = {}

    async def _line(self, question: Question) -> dict[str, Any]:
        line: dict[str, Any] = {
            "id": question.id,
            "num_turns": len(question.turns),
            "gold": question.gold,
        }
        turns = question.turns[-1:] if self.only_last else question.turns
        try:
            verdict, seconds = await self.side.judge(turns)
        except AnswerError as error:
            line["bad"] = str(error)[:MAX_RAW_CHARS]
        except Unanswered as error:
            line |= {"bad": str(error)[:MAX_RAW_CHARS], "unanswered": True}
        else:
            given = dataclasses.asdict(verdict).items()
            line |= {name: value for name, value in given if value is not None}
            line["seconds"] = round(seconds, 6)
        self._check_gone(line)
        self.on_done(1)
        return line

    def _check_gone(self, line: Mapping[str, Any]) -> None:
        """Raise UserError if so many dialogues in a row got no verdict that the guard is at fault.

        Bad answers count too, because a wrong style makes all answers bad.
        """
        self.failed_in_a_row = self.failed_in_a_row + 1 if "bad" in line else 0
        if self.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise UserError(
                f"{self.side.name} gave no verdict on {self.failed_in_a_row} dialogues in a row, "
                f"the last one: {shortened(line['bad'], 300)}. Check the guard and its style, then "
                "give the same command again: what is saved stays",
                setting=("against", "style"),
            )
