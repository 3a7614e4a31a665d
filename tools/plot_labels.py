"""Draw ProsocialDialog's safety labels, like figure 4 of Kim et al. 2022.

On the left are their shares among all contexts. In the middle are those of each turn, with the flow
to the next. On the right are the transitions as a matrix.
"""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosmo.engine.base.atomic import write_atomic
from tools.corpus_stats import all_transitions

# From calm to alarm. They darken with severity, so that they differ in grey too.
COLOURS = ("#a8d5ba", "#fbe7a1", "#f8bd6b", "#e8793a", "#a61e22")
NAMES = ("casual", "possibly\nneeds caution", "probably\nneeds caution", "needs\ncaution",
          "needs\nintervention")  # fmt: skip
_BAR = 0.34  # width, in turns
_LEGIBLE = 0.04  # of the bar's height: a smaller part has no room for its number
_TURNS = 6  # drawn; published dialogues have three


def plot(safety: Mapping[str, Any], output: pathlib.Path, title: str) -> None:
    """Draw `safety` (`corpus_stats.Labels.result`) to the PNG `output`; needs the extra `plot`."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display, as on servers
    import matplotlib.pyplot as plt

    turns = safety["by_turn"][:_TURNS]
    figure, (overall, flow, heat) = plt.subplots(
        1,
        3,
        figsize=(8.5 + 1.7 * len(turns), 5.4),
        layout="constrained",
        width_ratios=[0.75, 1.7 * max(len(turns), 2), 4],
    )
    bars(overall, [safety["overall"]], [0])
    overall.set_xticks([0], [f"all\n{sum(safety['overall']):,} contexts"])
    bars(flow, [x["counts"] for x in turns], range(len(turns)))
    flows(flow, turns, {x["turn"]: x["counts"] for x in safety["transitions"]})
    flow.set_xticks(
        range(len(turns)), [f"turn {x['turn']}\n{sum(x['counts']):,} contexts" for x in turns]
    )
    for axes, name in ((overall, "Overall"), (flow, "By turn, and what became of them")):
        axes.set(ylim=(0, 1), title=name)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    _heat(heat, all_transitions(safety))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    figure.legend(
        handles[::-1],
        [name.replace("\n", " ") for name in NAMES][::-1],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png")
    plt.close(figure)
    write_atomic(output, png.getvalue())


def bars(axes: Any, counts: Sequence[Sequence[int]], places: Sequence[int]) -> None:
    """Draw a bar of height 1 for each list of counts (by label), its parts with percentages."""
    for place, row in zip(places, counts, strict=True):
        bottom, total = 0.0, max(sum(row), 1)
        for label, count in enumerate(row):
            height = count / total
            axes.bar(place, height, _BAR, bottom, color=COLOURS[label], zorder=2,
                     edgecolor="white", linewidth=0.8)  # fmt: skip
            if height >= _LEGIBLE:
                axes.text(place, bottom + height / 2, f"{100 * height:.0f}%", zorder=3,
                          ha="center", va="center", color=_ink(COLOURS[label]))  # fmt: skip
            bottom += height


def flows(axes: Any, turns: Sequence[Mapping[str, Any]], steps: Mapping[int, Any]) -> None:
    """Draw bands from each bar's parts to the next one's, as wide as their share of either bar."""
    # Dialogues that end after a turn have no band on its right.
    smooth = np.linspace(0, 1, 40)
    curve = smooth * smooth * (3 - 2 * smooth)
    for place, (one, two) in enumerate(itertools.pairwise(turns)):
        if one["turn"] not in steps or two["turn"] != one["turn"] + 1:
            continue
        counts = np.array(steps[one["turn"]])  # [from, to]
        heights = [np.array(x["counts"]) / max(sum(x["counts"]), 1) for x in (one, two)]
        left, right = (np.concatenate([[0], h.cumsum()[:-1]]) for h in heights)
        # Bands leave a part from its lower end upwards.
        for start in range(5):
            for end in range(5):
                width = counts[start, end] / np.array([sum(one["counts"]), sum(two["counts"])])
                if not counts[start, end]:
                    continue
                low = left[start] + (right[end] - left[start]) * curve
                high = low + width[0] + (width[1] - width[0]) * curve
                x = place + _BAR / 2 + (1 - _BAR) * smooth
                axes.fill_between(x, low, high, color=COLOURS[start], alpha=0.55, linewidth=0)
                left[start] += width[0]
                right[end] += width[1]


def _heat(axes: Any, counts: np.ndarray) -> None:
    """Draw transitions: shares of each row, with the counts."""
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1.25, aspect="auto", origin="lower")
    for i in range(5):
        for j in range(5):
            said = f"{100 * shares[i, j]:.0f}%\n{counts[i, j]:,}" if totals[i] else "-"
            axes.text(j, i, said, ha="center", va="center", fontsize=9,
                      color="white" if shares[i, j] > 0.6 else "black")  # fmt: skip
    axes.set_xticks(range(5), NAMES, fontsize=8)
    axes.set_yticks(range(5), NAMES, fontsize=8)
    axes.set(title="From one turn's label to the next's, % of each row", xlabel="next turn",
             ylabel="a turn")  # fmt: skip
    for side, ticks in (("y", axes.get_yticklabels()), ("x", axes.get_xticklabels())):
        for label, tick in enumerate(ticks):
            tick.set_bbox(dict(facecolor=COLOURS[label], edgecolor="none", pad=2, alpha=0.9))
            tick.set_color(_ink(COLOURS[label]))
            tick.set_va("center" if side == "y" else "top")
    axes.tick_params(length=0, pad=7)


def _ink(colour: str) -> str:
    """Return black or white, whichever is easier to read on `colour`."""
    # By the luma of ITU-R BT.601.
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
