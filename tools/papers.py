"""List every table and figure of both papers: `python -m tools.papers`.

For each it prints the command that computes it here, the input, and its state. States: computed
(from what comes with the repository, maybe a sample), needs data, needs people, not done, drawing
(no results).

--table=soda.2, --figure=prosocial.5 and --text=soda.filters print one, with the paper's numbers.
--markdown prints docs/papers.md, which a test compares. `tools/papers.toml` has the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table
from cosmo.tasks import paper_tables

PAPERS = {
    "prosocial": "Kim et al. 2022, ProsocialDialog",
    "soda": "Kim et al. 2023, SODA",
}
KINDS = ("table", "figure", "text")
STATES = {
    "computed": "the command runs on what comes with the repository: a sample, if the paper has a "
    "corpus",
    "needs data": "the command exists; a corpus, a trained model or a paid model is missing here",
    "needs people": "the command exists; people, or a model in their place, must judge",
    "not done": "nothing here computes it",
    "drawing": "a picture without results",
}
_PROMPTS = Path(__file__).parents[1] / "data_pipeline" / "co3" / "prompts.toml"


@dataclasses.dataclass(frozen=True)
class Result:
    """One table, figure or number of a paper; `tools/papers.toml` describes the fields."""

    name: str
    title: str
    state: str
    command: str = ""
    input: str = ""
    note: str = ""
    numbers: str = ""
    columns: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    templates: str = ""

    @property
    def paper(self) -> str:
        """Return "prosocial" or "soda"."""
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        """Return "table", "figure" or "text"."""
        return self.name.split(".")[1]

    @property
    def number(self) -> str:
        """Return the number of a table or figure, or the name of a number of the text."""
        return self.name.split(".")[2]


def results() -> list[Result]:
    """Return all results, in the order of the file."""
    text = Path(__file__).with_name("papers.toml").read_text(encoding="utf-8")
    return [
        Result(
            name, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        )
        for name, given in tomllib.loads(text).items()
    ]  # fmt: skip


def numbers(result: Result) -> list[list[str]]:
    """Return the paper's numbers as rows of cells, the first row with the columns; [] for none."""
    if result.templates:
        relations = tomllib.loads(_PROMPTS.read_text(encoding="utf-8"))["relations"]
        return [
            ["", "template"],
            *([name, one[result.templates]] for name, one in relations.items()),
        ]
    if not result.numbers:
        return []
    found = paper_tables.table(result.numbers)
    columns = list(result.columns or found.get("columns", ()))
    if result.each:
        columns = [f"{column} {one}" for column in columns for one in result.each]
    rows = list(_rows(found, result))
    width = max(len(row) - 1 for row in rows)
    return [["", *columns], *(row + ["-"] * (width + 1 - len(row)) for row in rows)]


def _rows(found: Mapping[str, Any], result: Result) -> list[list[str]]:
    digits = _digits(found)

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    if result.rows:  # head to head without ties
        judged = found["rows"][slice(*result.rows)]
        return [
            [f"{corpus}: {name}", *map(cell, shares)]
            for corpus, *names, first, second in judged
            for name, shares in zip(names, (first, second), strict=True)
        ]
    rows = []
    for name, value in found.items():
        if name == "columns" or (result.only and name not in result.only):
            continue
        if not isinstance(value, list):
            rows.append([name, cell(value)])
        elif result.parts:
            rows += [
                [f"{name}: {part}", *map(cell, one)]
                for part, one in zip(result.parts, value, strict=True)
            ]
        else:
            rows.append([name, *map(cell, value)])
    return rows


def _digits(found: Any) -> int:
    """Return the most digits after the point that a number in a table has: as the paper prints."""
    if isinstance(found, float):
        return len(str(found).partition(".")[2])
    values = found.values() if isinstance(found, Mapping) else found
    return 0 if isinstance(found, int | str) else max(map(_digits, values), default=0)


def find(wanted: str) -> Result:
    """Return a result by its name, such as "soda.table.2". Raises UserError."""
    by_name = {one.name: one for one in results()}
    if wanted not in by_name:
        paper, kind, _ = [*wanted.split("."), "", ""][:3]
        near = [one.number for one in by_name.values() if (one.paper, one.kind) == (paper, kind)]
        known = ", ".join(f"{paper}.{number}" for number in near) or " or ".join(
            f"{paper}.NUMBER" for paper in PAPERS
        )
        given = wanted.replace(f".{kind}.", ".").removesuffix(f".{kind}")
        raise UserError(f"--{kind}={given}: give one of {known}")
    return by_name[wanted]


def listing(found: Sequence[Result]) -> str:
    """Return all results as a table of text, with the number of each state below."""
    rows = [["", "state", "title", "command"]]
    rows += [
        [f"{one.paper} {one.kind} {one.number}", one.state, one.title, one.command or "-"]
        for one in found
    ]
    states = Counter(one.state for one in found)
    said = "; ".join(f"{state} {states[state]}" for state in STATES if states[state])
    return f"{text_table(rows, left=range(4))}\n\n{len(found)} results: {said}\n"


def one_text(one: Result) -> str:
    """Return all about one result: title, state, command, input, note, the paper's numbers."""
    lines = [f"{PAPERS[one.paper]}, {one.kind} {one.number}: {one.title}", f"state: {one.state}"]
    for name in ("command", "input", "note"):
        if getattr(one, name):
            lines.append(f"{name}: {getattr(one, name)}")
    rows = numbers(one)
    if rows:
        heading = "here" if one.templates else "in the paper"
        wordy = one.templates or any(len(cell) > 40 for row in rows[1:] for cell in row[1:])
        left = range(len(rows[0])) if wordy else (0,)
        lines += ["", f"{heading}:", text_table(rows, left=left)]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return docs/papers.md."""
    found = results()
    parts = [
        "# Every table and figure of the papers",
        "`python -m tools.papers` prints this list; `--table=soda.2`, `--figure=prosocial.5` or "
        "`--text=soda.filters` prints one with the paper's numbers, `--json` all. This page is "
        "made by `python -m tools.papers --markdown > docs/papers.md` from `tools/papers.toml`.",
        "| state | what it means | results |\n| --- | --- | --- |\n"
        + "\n".join(
            f"| {state} | {text} | {sum(one.state == state for one in found)} |"
            for state, text in STATES.items()
        ),
    ]
    for paper, title in PAPERS.items():
        rows = [
            "| result | what it shows | state | command | input |",
            "| --- | --- | --- | --- | --- |",
        ]
        for one in found:
            if one.paper == paper:
                label = f"{one.kind} {one.number}"
                shown = f"{one.title}. {one.note}" if one.note else one.title
                command = f"`{one.command}`" if one.command else "-"
                rows.append(f"| {label} | {shown} | {one.state} | {command} | {one.input or '-'} |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def as_json(found: Sequence[Result]) -> str:
    """Return results with the paper's numbers as JSON."""
    rows = [
        {
            **{k: getattr(one, k) for k in ("name", "title", "state", "command", "input", "note")},
            "numbers": numbers(one),
        }
        for one in found
    ]
    return json.dumps(rows, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Print what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.papers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="PAPER.NUMBER", help=f"one {kind}, with numbers")
    parser.add_argument("--state", choices=STATES, help="only results of this state")
    parser.add_argument("--json", action="store_true", help="print JSON, with the numbers")
    parser.add_argument("--markdown", action="store_true", help="print docs/papers.md")
    args = parser.parse_args(argv)
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Print; return the exit code."""
    wanted = [
        find(".".join((*value.split(".", 1)[:1], kind, *value.split(".", 1)[1:])))
        for kind in KINDS
        if (value := getattr(args, kind))
    ]
    if args.markdown:
        print(markdown(), end="")
        return 0
    found = wanted or [one for one in results() if args.state in (None, one.state)]
    if args.json:
        print(as_json(found), end="")
    elif wanted:
        print("\n".join(map(one_text, wanted)), end="")
    else:
        print(listing(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
