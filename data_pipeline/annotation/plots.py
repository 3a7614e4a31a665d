"""Draw comparisons as the papers do: bars side by side, or with ties between; light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic

# First, tie, second: a blue, a grey and an orange that differ for colour-blind readers too.
_COLOURS = {"first": "#4477aa", "tie": "#bbbbbb", "second": "#ee8833"}
_STYLES = {"": "default", "_dark": "dark_background"}
_BAR = 0.38  # width, in questions


def draw(made: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the comparisons of people and of each model; return the PNGs. Needs the extra `plot`."""
    groups = {"people": made["people"]["questions"]} if made["people"] else {}
    groups |= {name: model["questions"] for name, model in made["models"].items()}
    written = []
    for name, questions in groups.items():
        shown = {q: one for q, one in questions.items() if one["kind"] == "comparison"}
        shown = {q: one for q, one in shown.items() if one["votes"]}
        if not shown:
            continue
        file = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        written += draw_questions(shown, made["systems"], name, file, folder)
    return written


def draw_questions(
    questions: Mapping[str, Any], systems: list[str], who: str, file: str, folder: Path
) -> list[Path]:
    """Draw one comparison in each style; return the PNGs.

    With ties the shares of each question are drawn, else its counts, votes and intervals.
    """
    written = []
    for suffix, style in _STYLES.items():
        written.append(folder / f"{file}{suffix}.png")
        _draw(questions, systems, who, style, written[-1])
    return written


def _draw(
    questions: Mapping[str, Any], systems: list[str], who: str, style: str, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws without a display, as on servers
    import matplotlib.pyplot as plt

    ties = any(one["shares"]["tie"] for one in questions.values())
    with plt.style.context(style):
        figure, axes = plt.subplots(figsize=(2 + 1.3 * len(questions), 4.2), layout="constrained")
        if ties:
            _stacked(axes, questions, systems)
        else:
            _grouped(axes, questions, systems)
        axes.set_title(f"Preferred by {who}")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        png = io.BytesIO()
        figure.savefig(png, dpi=130, format="png")
        plt.close(figure)  # pyplot keeps every figure until it is closed
    write_atomic(path, png.getvalue())


def _grouped(axes: Any, questions: Mapping[str, Any], systems: list[str]) -> None:
    """Draw votes as pairs of bars, as in figures 2 and 3 of the SODA paper, with intervals."""
    for place, (side, system) in enumerate(zip(("first", "second"), systems, strict=True)):
        heights = [one["counts"][side] for one in questions.values()]
        ends = [one["wilson"][side] for one in questions.values()]
        votes = [one["votes"] for one in questions.values()]
        below = [max(0.0, h - low * n) for h, (low, _), n in zip(heights, ends, votes, strict=True)]
        above = [max(0.0, top * n - h) for h, (_, top), n in zip(heights, ends, votes, strict=True)]
        where = [number + (place - 0.5) * _BAR for number in range(len(questions))]
        axes.bar(where, heights, _BAR, color=_COLOURS[side], label=system)
        axes.errorbar(where, heights, [below, above], fmt="none", ecolor="grey", capsize=3)
    axes.set_xticks(range(len(questions)), list(questions))
    axes.set_ylabel("votes")


def _stacked(axes: Any, questions: Mapping[str, Any], systems: list[str]) -> None:
    """Draw shares as bars of three parts, as in figures 5 and 6 of the ProsocialDialog paper."""
    names = {"first": systems[0], "tie": "tie", "second": systems[1]}
    left = [0.0] * len(questions)
    for side, name in names.items():
        widths = [100 * one["shares"][side] for one in questions.values()]
        axes.barh(range(len(questions)), widths, 0.7, left, color=_COLOURS[side], label=name)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 6:  # a narrower part has no room for its number
                axes.text(start + width / 2, row, f"{width:.1f}", ha="center", va="center",
                          color="black")  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(questions)), list(questions))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of votes")
