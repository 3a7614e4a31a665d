"""Build a ProsocialDialog from situations: a model drafts, people write, validate and label.

Each start goes as far as it can, and names the task files that wait for people. Their answers go
into OUTPUT/answers, under the task's name (several files: NAME-1.jsonl, NAME-2.jsonl ...). The same
command then continues. Every answer of the model is journaled before it is used.

In --output: tasks/, answers/, answers_quarantined/, steps/ (what each step made), journal/,
rejected.jsonl. At the end also data/ (train, validation, test in the hub's format),
provenance.jsonl and report.json. README.md has the numbers beside the paper's and a data
statement; croissant.json has the same for programs.

Exit codes: 0 done; 1 an error; 3 a cap is reached; 4 people have to answer; 130 stopped by Ctrl-C,
143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import DataError, UserError
from cosmo.engine.base.folders import only_writer
from cosmo.engine.base.tables import text_table
from data_pipeline.annotation import pages
from data_pipeline.annotation.ask import Asked, ask_all
from data_pipeline.annotation.commands.common import read_items
from data_pipeline.calls import flags, secrets
from data_pipeline.calls.journal import Journal
from data_pipeline.calls.requests import Stage
from data_pipeline.prosocial import (
    card,
    make,
    people,
    prompts,
    rows,
    situations,
    statistics,
    survey,
)
from data_pipeline.prosocial.store import Outcome, Store, reasons, rejection

log = logging.getLogger("data_pipeline")

PEOPLE_WAIT = 4  # the exit code
SCRIPTED = "scripted-"  # how the names of scripted workers begin

FLAGS = """
--situations FILE!  of `prosocial situations`
--output DIR!  the folder of this run
--prompts FILE  prompts of your own
--rules FILE  rules of thumb for situations without any: lines of id and rots, or id and prediction
--asked_rules N=3  asked of the model for a situation that has none then
--rounds N=2  of proofreading and response
--validations N=2  of three workers each
--leave_out_unanswered  quarantine what has no answer yet, and continue with the rest
people:
--seed N=0  of the order of items
--min_seconds S=0.0  an answer that took less is set aside
--consent TEXT  in place of the pages' own sentence
--survey FILE  who the workers are, for the card: a table, or JSON lines
--qualification DIR  PAGE.jsonl of items with known answers, which a worker has to pass first
--qualification_pass SHARE=0.8  of right answers to these
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `prosocial make`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)
    flags.add_server(parser.add_argument_group("server"))
    flags.add_limits(parser.add_argument_group("limits"))


def run_make(args: argparse.Namespace) -> int:
    """Go as far as answers allow; return the exit code."""
    flags.check(args, least={"rounds": 1, "validations": 0, "asked_rules": 0})
    found = situations.read(args.situations)
    if args.rules:
        found = situations.with_rules(found, args.rules)
    texts = prompts.load(args.prompts)
    settings = make.Settings(
        texts,
        people.Settings(
            args.seed,
            args.min_seconds,
            args.consent or "",
            args.qualification_pass,
            _qualification(args.qualification),
        ),
        args.rounds,
        args.validations,
        args.asked_rules,
        args.leave_out_unanswered,
    )
    # Now, because a mistake in it should not show after weeks of work.
    asked = survey.count(args.survey) if args.survey else {}
    store, server = Store(Path(args.output)), flags.server(args)
    allowance = flags.allowance(args)
    durable.make_folder(store.folder)

    def ask(stages: Mapping[str, Callable[[], Stage]]) -> Asked:
        journal = store.folder / "journal"
        return ask_all(stages, server, allowance, journal, args.form, args.tries)

    with only_writer(store.folder, "output"):
        about = {
            "situations": _digest(found),
            "model": server.model,
            "body": secrets.body(server.extra_body),
            "prompts": texts.version,
            "rounds": args.rounds,
            "validations": args.validations,
            "asked_rules": args.asked_rules,
            "seed": args.seed,
        }
        store.settle(about)
        outcome, waiting = make.make(store, found, settings, ask)
        lost = [*_unreadable(args.situations), *outcome.rejected]
        write_atomic(store.folder / "rejected.jsonl", json_lines.lines(lost))
        if waiting is not None:
            return _wait(args, waiting, len(lost))
        _finish(args, store, about, outcome, lost, asked)
    return 0


def _wait(args: argparse.Namespace, waiting: make.Waiting, lost: int) -> int:
    """Report what a run waits for; return the exit code."""
    if waiting.task is None:
        log.warning("%s: %s. The same command resumes", waiting.step, waiting.why)
        return waiting.exit_code
    durable.make_folder(waiting.answers.parent)
    if not args.quiet:
        print(
            f"{waiting.step} waits for people: {waiting.missing} answers to {waiting.items} items\n"
            f"  task     {waiting.task}\n  answers  {waiting.answers}\n"
            f"{lost} quarantined so far. With the answers there, the same command continues."
        )
    return PEOPLE_WAIT


def _finish(
    args: argparse.Namespace,
    store: Store,
    about: dict[str, Any],
    outcome: Outcome,
    lost: list,
    asked: dict[str, str],
) -> None:
    """Write rows, provenance, report and card."""
    if not outcome.records:
        raise DataError.at(
            store.folder / "rejected.jsonl", None, "no dialogue is left",
            got=json.dumps(reasons(lost)), expected="at least one", setting="situations",
            remedy="Read the reasons.",
        )  # fmt: skip
    split = rows.by_split(outcome.records)
    durable.make_folder(store.folder / "data")
    for name, dialogues in split.items():
        flat = [row for _, of_dialogue in dialogues for row in of_dialogue]
        write_atomic(store.folder / "data" / f"{name}.jsonl", json_lines.lines(flat))
    dialogues = [one for of_split in split.values() for one in of_split]
    write_atomic(
        store.folder / "provenance.jsonl",
        json_lines.lines(rows.provenance(r, made[0]["dialogue_id"]) for r, made in dialogues),
    )
    numbers = statistics.count(dialogues)
    counts = _beside(args.situations, "filters.json") or {}
    left_out = reasons(lost)
    judges = store.judges()
    scripted = bool(judges) and all(name.startswith(SCRIPTED) for name in judges)
    shown = {**about, "scripted_workers": scripted}
    report = {
        "about": shown,
        **numbers,
        "filters": counts,
        "rejected": left_out,
        "calls": _calls(store),
        "survey": asked,
    }
    write_atomic(store.folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    text = card.card(shown, numbers, counts, left_out, dialogues[0][1], asked)
    write_atomic(store.folder / "README.md", text)
    card.write_croissant(store.folder, shown, scripted)
    if not args.quiet:
        print(text_table([["", "here", "paper"], *statistics.table(numbers)]))
        print(
            f"\n{store.folder}: data/, provenance.jsonl, rejected.jsonl ({len(lost)}), report.json,"
            " README.md, croissant.json"
        )


def _calls(store: Store) -> dict[str, Any]:
    """Return calls and tokens of all starts, by stage and kind."""
    if not (store.folder / "journal").exists():
        return {}
    with Journal(store.folder / "journal") as journal:
        return journal.spent()


def _digest(found: list[situations.Situation]) -> str:
    """Return a name for the situations: their number and a hash of them."""
    text = json.dumps([[one.id, one.split, one.text, *one.rots] for one in found])
    return f"{len(found)} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _beside(path: str, name: str) -> Any:
    """Return the JSON file beside the situations, None if there is none."""
    file = Path(path).with_name(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _unreadable(path: str) -> list[dict[str, Any]]:
    """Return the rows that `prosocial situations` quarantined, as lines of rejected.jsonl."""
    file = Path(path).with_name("quarantined.jsonl")
    if not file.exists():
        return []
    found = map(json_lines.value, file.read_bytes().splitlines())
    return [
        rejection(one["id"], "situations", one["reason"].split(": got")[0], one) for one in found
    ]


def _qualification(folder: str | None) -> dict[str, tuple]:
    """Return the items of each page that a folder has; UserError for a file of no page."""
    if not folder:
        return {}
    files = sorted(Path(folder).glob("*.jsonl"))
    unknown = [file.name for file in files if file.stem not in pages.names()]
    if unknown or not files:
        raise UserError(
            f"--qualification={folder}: {unknown[0] if unknown else 'no file'}; give PAGE.jsonl of "
            f"{', '.join(people.JUDGES)}"
        )
    return {file.stem: tuple(read_items(file, "qualification")) for file in files}
