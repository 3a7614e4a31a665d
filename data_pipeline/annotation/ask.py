"""Ask a model for many small things: journaled calls, results in memory, any start resumes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.progress import Progress
from cosmo.engine.base.retries import RetryPolicy
from data_pipeline.calls import run
from data_pipeline.calls.client import Client, Server, probe
from data_pipeline.calls.gateway import Gateway
from data_pipeline.calls.journal import Journal
from data_pipeline.calls.limits import Allowance, Limits
from data_pipeline.calls.outputs import Result
from data_pipeline.calls.requests import Rejected, Stage

log = logging.getLogger("data_pipeline")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Results by name, rejections by name, and why the run stopped early ("" if it did not)."""

    results: dict[str, Any]
    rejected: dict[str, Rejected]
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """Return the exit code of a run that stopped early: 128 and the signal, or 3 for a cap."""
        return {"": 0, "stopped by SIGINT": 130, "stopped by SIGTERM": 143}.get(self.stopped, 3)


class _Memory:
    """Results in memory, in place of the files of `outputs.Outputs`."""

    def __init__(self) -> None:
        self.next = 0
        self.lines: dict[int, dict[str, str]] = {}

    def add(self, number: int, result: Result) -> None:
        self.lines[number] = result.lines
        self.next += 1

    def save(self) -> None:
        """Do nothing: the journal holds every answer."""


def ask_all(
    stages: Mapping[str, Callable[[], Stage]],
    server: Server,
    allowance: Allowance,
    journal: Path,
    form: str = "auto",
    tries: int = 8,
) -> Asked:
    """Run the stages against a server; a stage returns a JSON value or `Rejected`.

    The same call answers from the journal what it has been answered before. Raises UserError.
    """
    # No stage asks: the server need not be there.
    if not stages:
        return Asked({}, {})
    return asyncio.run(_ask_all(stages, server, allowance, journal, form, tries))


async def _ask_all(
    stages: Mapping[str, Callable[[], Stage]],
    server: Server,
    allowance: Allowance,
    folder: Path,
    form: str,
    tries: int,
) -> Asked:
    outputs = _Memory()

    def result(value: Any, position: int) -> Result:
        return Result({"result": json.dumps(value)})

    with Journal(folder) as journal:
        async with Client(server, allowance.concurrency) as client:
            server = dataclasses.replace(server, form=await _form(client, folder, form))
            client.server = server
            limits = Limits(allowance, journal.tokens_spent())
            gateway = Gateway(client.post, server, journal, limits, RetryPolicy(tries=tries))
            progress = Progress(len(stages), unit="item")
            works = [
                run.Work(name, number, start, result)
                for number, (name, start) in enumerate(stages.items())
            ]
            try:
                stopped = await run.run(
                    iter(works), gateway, outputs, tick=lambda: progress.update(outputs.next)
                )
            finally:
                progress.finish()
    results, rejected = {}, {}
    for number, lines in outputs.lines.items():
        name = works[number].id
        if "result" in lines:
            results[name] = json.loads(lines["result"])
            continue
        row = json.loads(lines["rejected"])
        known = {k: v for k, v in row.items() if k not in ("position", "id", "stage", "reason")}
        rejected[name] = Rejected(name, row["stage"], row["reason"], known)
    if stopped:
        log.warning("%s; the same command resumes", stopped)
    return Asked(results, rejected, stopped or "")


async def _form(client: Client, folder: Path, form: str) -> str:
    """Return the server's form: as an earlier start found it, else asked."""
    file = folder / "form.json"
    about = {"address": client.server.address, "model": client.server.model}
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(file.read_text())
        if form in ("auto", known["form"]) and about.items() <= known.items():
            # Another form would ask, and pay for, everything anew.
            return known["form"]
    found = await probe(client, form)
    try:
        file.write_text(json.dumps({**about, "form": found}))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    return found
