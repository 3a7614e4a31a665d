"""Draw the figures of the documentation, each in light and dark: `make figures`.

The numbers are in docs/figures/NAME.json, with the command that they come from. The drawings go to
docs/images/NAME-light.svg and NAME-dark.svg. A page that shows one gives it an alternative text.
`terminal` is a recording of `tools.terminal`, which draws it.
"""

import argparse
import io
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.scale.chips import CHIPS, parse_topology
from tools import plot_labels, terminal

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "figures"
# Colours of text, of boxes, and of two kinds of data (Okabe and Ito's, for the colour blind).
THEMES = {
    "light": {"ink": "#1b1f24", "box": "#eef2f6", "first": "#0072b2", "second": "#d55e00"},
    "dark": {"ink": "#e6e9ed", "box": "#2b323b", "first": "#56b4e9", "second": "#e69f00"},
}


def quickstart(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the quickstart's losses beside the unigram model's."""
    axes.plot(*zip(*numbers["training"], strict=True), color=theme["ink"], alpha=0.5)
    axes.plot(*zip(*numbers["validation"], strict=True), color=theme["first"], marker="o", lw=2)
    axes.axhline(numbers["unigram"], color=theme["second"], ls="--")
    step, loss = numbers["validation"][-1]
    axes.annotate(f"validation {loss:.2f}", (step, loss), (0, 8), textcoords="offset points",
                  ha="right", color=theme["first"])  # fmt: skip
    axes.annotate(f"unigram model {numbers['unigram']:.2f}", (step, numbers["unigram"]), (0, 5),
                  textcoords="offset points", ha="right", color=theme["second"])  # fmt: skip
    step, loss = numbers["training"][2]
    axes.annotate("training", (step, loss), (6, 2), textcoords="offset points", alpha=0.7)
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))


def co3_funnel(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the share of dialogues that is left after each filter of CO3, in the paper."""
    left, names, shares = 100.0, ["conversations"], [100.0]
    for name, dropped in numbers["dropped_percent"].items():
        left *= 1 - dropped / 100
        names.append(name)
        shares.append(left)
    # Rounded percentages: their product must still be the paper's own total.
    assert math.isclose(left, numbers["kept_percent"], abs_tol=0.1)
    bars = axes.barh(names, shares, color=[theme["second"], *[theme["first"]] * (len(names) - 1)])
    axes.bar_label(bars, [f"{share:.1f}%" for share in shares], padding=4, color=theme["ink"])
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="left after the filter, % of conversations")


def label_flow(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the safety labels of each turn, and what they become at the next."""
    turns = numbers["by_turn"]
    plot_labels.bars(axes, [turn["counts"] for turn in turns], range(len(turns)))
    plot_labels.flows(axes, turns, {x["turn"]: x["counts"] for x in numbers["transitions"]})
    axes.set_xticks(range(len(turns)), [f"turn {turn['turn']}" for turn in turns])
    axes.set(ylim=(0, 1), yticks=[])
    names = [name.replace("\n", " ") for name in plot_labels.NAMES]
    for place, (name, colour) in enumerate(zip(names, plot_labels.COLOURS, strict=True)):
        axes.text(len(turns) - 0.7, 0.1 + 0.2 * place, f"■ {name}", color=theme["ink"])
        axes.text(len(turns) - 0.7, 0.1 + 0.2 * place, "■", color=colour)
    axes.set_xlim(-0.3, len(turns) + 0.6)


def guard_cost(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the milliseconds that Canary's guard adds before the first character of an answer."""
    rows = numbers["rows"]
    names = [row["turn"] for row in rows]
    axes.barh(names, [row["p95"] for row in rows], 0.6, color=theme["box"], edgecolor=theme["ink"],
              label="p95")  # fmt: skip
    bars = axes.barh(names, [row["p50"] for row in rows], 0.35, color=theme["first"], label="p50")
    for row, bar in zip(rows, bars, strict=True):
        axes.annotate(f"{row['p50']} ms, p95 {row['p95']} ms",
                      (row["p95"], bar.get_y() + bar.get_height() / 2), (6, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds added before the first character", xlim=(0, 1050))
    axes.legend(loc="upper right", frameon=False)


def plan_roofline(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the least time of a step on TPU slices: of products, of collectives, and the bound."""
    names, rows = [], numbers["rows"]
    for place, row in enumerate(rows):
        chip = CHIPS[parse_topology(row["slice"])[0]]
        products = row["tflop"] * 1e12 / chip.matmul_flops
        collectives = row["collectives_gb"] * 1e9 / chip.link_bytes_per_second
        first = place == 0
        axes.barh(place, row["bound_seconds"], 0.8, color=theme["box"], edgecolor=theme["ink"],
                  label="bound: the longest, memory included" if first else None)  # fmt: skip
        axes.barh(place - 0.18, products, 0.3, color=theme["first"],
                  label="products at the chip's peak" if first else None)  # fmt: skip
        axes.barh(place + 0.18, collectives, 0.3, color=theme["second"],
                  label="collectives at the links' peak" if first else None)  # fmt: skip
        names.append(f"{row['recipe']} {row['slice']}")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step, at least")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, frameon=False, fontsize=8)


def architecture(axes: Any, numbers: dict, theme: dict) -> None:
    """Draw the rooms as boxes, and the flow of data as arrows between them."""
    width, height = 1.7, 0.62
    for box in numbers["boxes"]:
        x, y = box["at"]
        axes.add_patch(_patch(x, y, width, height, theme, box.get("stands_out", False)))
        axes.text(x, y + 0.1, box["name"], ha="center", va="center", weight="bold", fontsize=9)
        axes.text(x, y - 0.13, box["about"], ha="center", va="center", fontsize=7)
    places = {box["name"]: box["at"] for box in numbers["boxes"]}
    for one, two in numbers["arrows"]:
        (x0, y0), (x1, y1) = places[one], places[two]
        # From edge to edge: sideways along a row, else up or down.
        side = math.copysign(width / 2, x1 - x0) if y0 == y1 else 0
        up = math.copysign(height / 2, y1 - y0) if y0 != y1 else 0
        axes.annotate("", (x1 - side, y1 - up), (x0 + side, y0 + up),
                      arrowprops={"arrowstyle": "->", "color": theme["ink"]})  # fmt: skip
    axes.set(xlim=(-1, 9.6), ylim=(-0.5, 3.5))
    axes.set_axis_off()


def _patch(x: float, y: float, width: float, height: float, theme: dict, stands_out: bool) -> Any:
    from matplotlib.patches import FancyBboxPatch

    edge = theme["second"] if stands_out else theme["first"]
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    return FancyBboxPatch(corner, width, height, style, facecolor=theme["box"], edgecolor=edge)


# Name of a figure -> (its drawing, width and height in inches).
FIGURES: dict[str, tuple[Callable[[Any, dict, dict], None], tuple[float, float]]] = {
    "architecture": (architecture, (10, 4)),
    "quickstart-loss": (quickstart, (7, 3.4)),
    "label-flow": (label_flow, (7.5, 3.6)),
    "co3-funnel": (co3_funnel, (7, 3.2)),
    "guard-cost": (guard_cost, (7, 2.8)),
    "plan-roofline": (plan_roofline, (7.5, 4.2)),
}
TERMINAL = "terminal"


def draw(name: str, theme: str) -> str:
    """Return the SVG of a figure. The same numbers give the same text."""
    numbers = json.loads((NUMBERS / f"{name}.json").read_text())
    if name == TERMINAL:
        return terminal.draw(numbers, theme)
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    import matplotlib.pyplot as plt

    drawing, size = FIGURES[name]
    colours = THEMES[theme]
    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
        colours["ink"],
    )
    # Text stays text: it is searched, read aloud and set in the reader's own font.
    fixed = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**ink, **fixed, **spines, "axes.facecolor": "none"}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        drawing(axes, numbers, colours)
        svg = io.StringIO()
        about = {"Date": None, "Title": drawing.__doc__}
        figure.savefig(svg, format="svg", transparent=True, metadata=about)
        plt.close(figure)
    return "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"


def main() -> None:
    """Draw all figures, or those named."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs_figures", description=__doc__)
    names = [*FIGURES, TERMINAL]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    for name in args.names or names:
        for theme in THEMES:
            path = args.output / f"{name}-{theme}.svg"
            write_atomic(path, draw(name, theme).encode())
            print(path)


if __name__ == "__main__":
    main()
