"""Draw the papers' figures from stored JSON or the papers' numbers: `python -m tools.figures`.

FILE is one of these, recognised by its fields:
  report.json of `annotate report`       figures 2 and 3 of SODA, 5 and 6 of ProsocialDialog
  JSON of `tools.emotions --json`        figure 3 of ProsocialDialog
  JSON of `tools.dataset_stats --json`   figure 4 of ProsocialDialog

--paper=5 and --paper=6 draw these figures of ProsocialDialog from the published numbers. Head to
heads come in light and dark. Pictures go to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import command_line, durable, json_lines
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.tasks.paper_tables import PROSOCIAL
from data_pipeline.annotation import plots
from tools import emotions, papers, plot_labels

_PARTS = ("first", "tie", "second")


def draw(file: Path, folder: Path) -> list[Path]:
    """Draw what a file of JSON holds; return the PNGs. Raises DataError for another file."""
    try:
        made = json_lines.value(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError.at(
            file, None, "no JSON", got=str(error), expected="a report", remedy="Correct the path."
        ) from error
    name = re.sub(r"[^\w.-]", "_", file.stem)
    if isinstance(made, dict) and {"people", "models", "systems"} <= made.keys():
        found = plots.draw(made, folder)
    elif isinstance(made, dict) and made and all(map(_has_groups, made.values())):
        found = [folder / f"{name}.png"]
        emotions.plot(made, found[0])
    else:
        rows = made if isinstance(made, list) else []
        labelled = [one for one in rows if isinstance(one, dict) and one.get("safety")]
        found = [folder / f"{name}_{number}.png" for number in range(len(labelled))]
        for one, path in zip(labelled, found, strict=True):
            title = f"Safety labels of {Path(one['path']).name}"
            plot_labels.plot(one["safety"], path, title=title)
    if not found:
        raise DataError.at(
            file, None, "nothing to draw", got=shown(made),
            expected="a head to head, emotions, or safety labels",
            remedy="Give the JSON of `annotate report`, `tools.emotions` or `tools.dataset_stats`.",
        )  # fmt: skip
    return found


def _has_groups(value: Any) -> bool:
    return isinstance(value, dict) and {"groups", "emotions"} <= value.keys()


def draw_published(number: str, folder: Path) -> list[Path]:
    """Draw figure 5 or 6 of ProsocialDialog from the paper's numbers; return the PNGs."""
    found = []
    for pair in papers.find(f"prosocial.figure.{number}").only:
        file = re.sub(r"\W+", "_", pair)
        found += plots.draw_questions(
            published_questions(pair), pair.split(" : "), "people (paper)", file, folder
        )
    return found


def published_questions(pair: str) -> dict[str, Mapping[str, Any]]:
    """Return the published shares of two systems, by question, as a report has them."""
    table = PROSOCIAL["steering"]
    made = {}
    for question, *percents in zip(table["columns"], *table[pair], strict=True):
        shares = {part: one / 100 for part, one in zip(_PARTS, percents, strict=True)}
        made[question] = {"shares": shares}
    return made


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path)
    parser.add_argument("--paper", choices=("5", "6"), help="a figure of published numbers")
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    args = parser.parse_args(argv)
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Draw; return the exit code."""
    if not args.files and args.paper is None:
        raise UserError("give a FILE or --paper")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed: pip install -e '.[plot]'")
    durable.make_folder(args.output)
    found = draw_published(args.paper, args.output) if args.paper else []
    for file in args.files:
        found += draw(file, args.output)
    print("\n".join(map(str, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
