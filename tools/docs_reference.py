"""Print the reference pages that follow from the code: commands from their parsers, gin macros.

`make docs` calls it: the output is JSON, {name of a page: its Markdown}.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator

from canary.cli.program import PROGRAM as CANARY
from canary.prost.cli.program import PROGRAM as PROST
from cosmo.cli.program import PROGRAM as COSMO
from cosmo.engine.base import command_line
from data_pipeline.verbs import PROGRAM as DATA_PIPELINE

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = {"cosmo": COSMO, "canary": CANARY, "prost": PROST, "data_pipeline": DATA_PIPELINE}
# The files that set macros, and the heading of each.
MACROS = {
    "gin/defaults/common.gin": "Every verb",
    "gin/defaults/train.gin": "Training",
    "gin/defaults/eval.gin": "Evaluation",
    "gin/defaults/infer.gin": "Inference",
    "gin/runs/train.gin": "Folders of `train`",
    "gin/runs/eval.gin": "Folders of `eval`",
    "gin/runs/infer.gin": "Folders of `infer` and `chat`",
    "gin/runs/cache.gin": "`cache`",
    "gin/runs/plan.gin": "`plan`",
}
_MACRO = re.compile(r"([A-Z][A-Z0-9_]*) = (.*?)(?:  # (.*))?")
HELP_COLUMNS = "88"  # as wide as a code block of the website


def pages() -> dict[str, str]:
    """Return {name of a page: its Markdown}."""
    commands = {f"reference/{name}.md": commands_page(name) for name in PROGRAMS}
    return {**commands, "reference/macros.md": macros_page()}


def commands_page(name: str) -> str:
    """Return the help pages of a program and its verbs."""
    # argparse breaks the lines of a help page by this variable.
    os.environ["COLUMNS"] = HELP_COLUMNS
    program = PROGRAMS[name]
    _, by_verb = command_line.parser(program, program.verbs)
    text = [f"# Commands of {program.name}", f"{program.description} Generated from the parsers."]
    for verb, parser in by_verb.items():
        text += [f"## {program.name} {verb}", f"```text\n{parser.format_help().strip()}\n```"]
    return "\n\n".join(text) + "\n"


def macros_page() -> str:
    """Return the gin macros with their defaults and comments, a table for each group."""
    text = [
        "# Gin macros",
        "Override a macro with `--gin.NAME=VALUE`. `REQUIRED` has no default: an experiment file "
        "gives it. Generated from the files named here.",
    ]
    for path, title in MACROS.items():
        groups = list(macro_groups((ROOT / path).read_text()))
        if any(rows for _, rows in groups):
            text.append(f"## {title}\n\n[{path}](../../{path})")
        for comment, rows in groups:
            if rows:
                lines = [f"| `{name}` | `{value}` | {about} |" for name, value, about in rows]
                table = "\n".join(["| macro | default | |", "| --- | --- | --- |", *lines])
                text += [comment, table] if comment else [table]
    return "\n\n".join(text) + "\n"


def macro_groups(text: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield (comment, [(macro, default, its own comment)]) of a gin file, in order.

    A comment of whole lines that stands before macros begins a group.
    """
    comment: list[str] = []
    rows: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        found = _MACRO.fullmatch(line)
        if found:
            name, value, about = found.groups(default="")
            value = value.removeprefix("%gin.")
            rows.append((name, value.replace("|", "\\|"), _plain(about)))
        elif line.startswith("#"):
            if rows:
                yield _plain(" ".join(comment)), rows
                comment, rows = [], []
            comment.append(line.lstrip("# "))
        elif not rows:  # a comment on something other than a macro
            comment = []
    yield _plain(" ".join(comment)), rows


def _plain(comment: str) -> str:
    """Return a comment as Markdown: its marks of emphasis and tables are plain characters."""
    return re.sub(r"([*<|\[])", r"\\\1", comment)


if __name__ == "__main__":
    print(json.dumps(pages()))
