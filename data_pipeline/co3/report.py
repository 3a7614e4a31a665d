"""Write the report of a run: report.json, a table for people, plots, and the card."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import replacing, write_atomic
from cosmo.engine.base.tables import text_table
from cosmo.tasks import paper_tables
from data_pipeline.calls.limits import BYTES_PER_TOKEN
from data_pipeline.co3 import postprocess, prompts, statistics
from data_pipeline.co3.card import card, write_croissant
from data_pipeline.co3.reasons import explained
from data_pipeline.co3.triples import SODA_RATIOS

log = logging.getLogger("data_pipeline")

# Stages before there is a conversation; the rest are filters, in percent of the conversations.
BEFORE = ("read", "triples", "sentence", "narrative", "speaker", "dialogue", "error")
# All stages of rejections, in the order that a triple goes through them.
_ORDER = (*BEFORE[:-1], "continuation", *postprocess.FILTERS, *prompts.STAGES, "dedup", "error")


def count_outputs(folder: Path) -> tuple[statistics.Statistics, Counter]:
    """Return the statistics of soda.jsonl, and the counts of (stage, reason) in rejected.jsonl."""
    numbers = statistics.Statistics()
    with (folder / "soda.jsonl").open("rb") as lines:
        for row in map(json.loads, lines):
            numbers.add(row)
    return numbers, count_reasons(folder / "rejected.jsonl")


def count_reasons(path: Any) -> Counter:
    """Return the counts of (stage, reason) in a file rejected.jsonl."""
    with path.open("rb") as lines:
        return Counter((row["stage"], row["reason"]) for row in map(json.loads, lines))


def calls_of(spent: dict[str, dict[str, dict[str, int]]], prices: tuple[float, float]) -> dict:
    """Return calls, tokens and cost by stage from the journal's sums; prices: a million tokens.

    `estimated_tokens` and `estimated_cost` are the most that failures may have been billed for.
    """
    calls = {}
    names = ("prompt_tokens", "completion_tokens")
    for stage, kinds in spent.items():
        used, failed = kinds.get("answer", {}), kinds.get("failure", {})
        row = {"answers": used.get("calls", 0), "failures": failed.get("calls", 0)}
        row |= {name: used.get(name, 0) for name in names}
        row["estimated_tokens"] = sum(failed.get(name, 0) for name in names)
        for cost, kind in (("cost", used), ("estimated_cost", failed)):
            amount = sum(kind.get(name, 0) * p for name, p in zip(names, prices, strict=True))
            # Prices are for a million tokens, and six places show a single one at a price of 1.
            row[cost] = round(amount / 1e6, 6)
        calls[stage] = row
    return calls


def build(
    about: dict[str, Any],
    numbers: statistics.Statistics,
    reasons: Counter,
    calls: dict[str, dict[str, Any]],
    this_start: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of report.json."""
    rejected: dict[str, dict[str, int]] = {}
    for (stage, reason), number in sorted(reasons.items(), key=_place):
        rejected.setdefault(stage, {})[reason] = number
    early = sum(n for (stage, reason), n in reasons.items() if _early(stage, reason))
    late = reasons.total() - early
    return {
        "about": about,
        "triples": numbers.dialogues + reasons.total(),
        "conversations": numbers.dialogues + late,
        "records": numbers.dialogues,
        # A run that made no conversation has kept 0 percent of them.
        "kept_percent": round(100 * numbers.dialogues / max(numbers.dialogues + late, 1), 1),
        "rejected": rejected,
        "filters": _filters(rejected, numbers.dialogues + late),
        "corpus": numbers.table(),
        "calls": {name: calls[name] for name in sorted(calls, key=_call_place)},
        "tokens": {
            name: sum(row[f"{name}_tokens"] for row in calls.values())
            for name in ("prompt", "completion", "estimated")
        },
        "cost": round(sum(row["cost"] for row in calls.values()), 6),
        "estimated_cost": round(sum(row["estimated_cost"] for row in calls.values()), 6),
        "this_start": this_start,
    }


def _filters(rejected: dict[str, dict[str, int]], conversations: int) -> dict[str, dict]:
    """Return for each filter how many reach it and how many it drops, in the paper's order."""
    found, reached = {}, conversations
    for name in postprocess.FILTERS:
        reasons = rejected.get(name, {})
        dropped = sum(n for reason, n in reasons.items() if not _early(name, reason))
        percent = round(100 * dropped / max(reached, 1), 1)
        found[name] = {"reached": reached, "dropped": dropped, "percent_of_reached": percent}
        reached -= dropped
    return found


def _place(item: tuple[tuple[str, str], int]) -> tuple:
    """Sort (stage, reason) by the stage's place in the pipeline, the most frequent first."""
    (stage, reason), number = item
    # Stages that this version does not know go last.
    place = _ORDER.index(stage) if stage in _ORDER else len(_ORDER)
    return place, stage, -number, reason


def _call_place(stage: str) -> int:
    return prompts.STAGES.index(stage) if stage in prompts.STAGES else len(prompts.STAGES)


def _early(stage: str, reason: str) -> bool:
    # A call that failed at the server is no fault of a conversation.
    return stage in BEFORE or reason.startswith("failed: ")


def table(report: dict[str, Any]) -> str:
    """Return the report as text for people."""
    corpus, tokens = report["corpus"], report["tokens"]
    blocks = [
        f"{report['triples']:,} triples, {report['conversations']:,} conversations, "
        f"{report['records']:,} records ({report['kept_percent']}% of the conversations)"
    ]
    rows = [("rejected", "number", "percent", "")]
    for stage, reasons in report["rejected"].items():
        for reason, number in reasons.items():
            # Rejections before there is a conversation are a share of the triples.
            of = "triples" if _early(stage, reason) else "conversations"
            share = 100 * number / max(report[of], 1)
            rows.append((f"  {stage}: {reason}", f"{number:,}", f"{share:.1f}%", f"of {of}"))
    dropped = report["about"].get("dropped") or {}
    if dropped:
        rows.append(("dropped before the sample was drawn", "", "", ""))
        rows += [(f"  triples: {reason}", f"{n:,}", "", "") for reason, n in dropped.items()]
    blocks.append(text_table(rows, left=(0, 3)))
    paper = paper_tables.SODA["filters"]
    all_of_them = max(report["conversations"], 1)
    rows = [("filter", "reached", "dropped", "of reached", "paper", "of all")]
    for name, row in report["filters"].items():
        of_all = f"{100 * row['dropped'] / all_of_them:.1f}%"
        counts = (f"{row['reached']:,}", f"{row['dropped']:,}", f"{row['percent_of_reached']}%")
        rows.append((f"  {name}", *counts, f"{paper[name]}%", of_all))
    # The paper counts no duplicates, which are dropped after its filters.
    kept = report["conversations"] - sum(row["dropped"] for row in report["filters"].values())
    share = f"{100 * kept / all_of_them:.1f}%"
    rows.append(("  passed all", f"{kept:,}", "", "", f"{paper['kept']}%", share))
    blocks.append(text_table(rows))
    reasons = [reason for by_reason in report["rejected"].values() for reason in by_reason]
    if meanings := explained([*reasons, *dropped]):
        lines = [f"  {reason}: {meaning}" for reason, meaning in meanings]
        blocks.append("\n".join(["meaning of the reasons", *lines]))
    names = ("dialogues", "turns", "utterance_length", "lexical_diversity")
    columns = ("#Dialog", "Avg. #Turns", "Avg. Utt. Length", "Lexical Diversity")  # table 2's
    splits = ", ".join(f"{name} {number:,}" for name, number in corpus["splits"].items())
    numbers = text_table([columns, [str(corpus[name]) for name in names]], left=(), indent=2)
    blocks.append(f"{numbers}\n  splits: {splits}")
    rows = [
        ("relation", "share", "keywords"),
        ("  all", "100%", ", ".join(corpus["common_keywords"])),
    ]
    for name, row in corpus["relations"].items():
        rows.append((f"  {name}", f"{row['percent']}%", ", ".join(row["keywords"])))
    blocks.append(text_table(rows, left=(0, 2)))
    if report["calls"]:
        names = ["answers", "failures", "prompt_tokens", "completion_tokens"]
        rows = [["calls", *(name.replace("_", " ") for name in names)]]
        rows += [[f"  {stage}", *(f"{row[n]:,}" for n in names)]
                 for stage, row in report["calls"].items()]  # fmt: skip
        # Without prices all costs are 0.
        if report["cost"]:
            costs = (f"{row['cost']:,.4f}" for row in report["calls"].values())
            rows = [[*row, cost] for row, cost in zip(rows, ("cost", *costs), strict=True)]
        blocks.append(text_table(rows))
    lines = [f"tokens {tokens['prompt']:,} in, {tokens['completion']:,} out"]
    lines[-1] += f"; cost {report['cost']:.4f}" if report["cost"] else ""
    if tokens["estimated"]:
        costs = f"; cost {report['estimated_cost']:.4f}" if report["estimated_cost"] else ""
        lines.append(
            "estimated maximum for answers that were lost or could not be read: "
            f"{tokens['estimated']:,} tokens{costs}"
        )
    # Reports of `postprocess` and `merge` have no start.
    start = {"retries": {}, **report["this_start"]}
    if "calls" in start:
        lines.append(
            f"this start: {start['seconds']} s, {start['calls']:,} calls, "
            f"{start['calls_per_second']}/s, {start['most_at_once']} at once at most; "
            f"{start['replayed']} answers from the journal"
        )
    lines += [f"  {what}: {number}" for what, number in start["retries"].items()]
    if number := start.get("estimated_answers"):
        lines.append(
            f"  {number:,} answers without a possible count of tokens (usage): "
            f"{BYTES_PER_TOKEN} bytes of text are counted as one"
        )
    if (calls := start.get("concurrency", {})).get("decreases"):
        lines.append(
            f"  concurrency lowered {calls['decreases']} times by 429 and 503, to {calls['least']} "
            f"at least; {calls['at_the_end']} at the end"
        )
    return "\n\n".join([*blocks, "\n".join(lines)])


def _plot_rejected(panel: Any, rejected: dict[str, dict[str, int]]) -> None:
    """Draw the 15 largest reasons in the pipeline's order; gray: before a conversation."""
    reasons = [
        (f"{stage}: {reason}", number, "tab:gray" if _early(stage, reason) else "tab:red")
        for stage, rows in rejected.items()
        for reason, number in rows.items()
    ]
    # With all that are as frequent as the fifteenth.
    least = sorted((number for _, number, _ in reasons), reverse=True)[:15][-1:]
    reasons = [reason for reason in reasons if reason[1] >= least[0]]
    names, numbers, colors = zip(*reasons, strict=True) if reasons else ((), (), ())
    bars = panel.barh(names, numbers, color=colors)
    panel.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    panel.margins(x=0.15)  # room for the numbers
    panel.invert_yaxis()
    panel.set(title="left out (gray: before there was a conversation)", xlabel="triples")
    panel.xaxis.set_major_formatter("{x:,.0f}")


def _plot_calls(panel: Any, calls: dict[str, dict[str, Any]], cost: float) -> None:
    """Draw the tokens by stage, and at the end of each bar their cost, if any."""
    from matplotlib.ticker import EngFormatter

    left = [0] * len(calls)
    for name, color in (("prompt_tokens", "tab:gray"), ("completion_tokens", "tab:orange")):
        values = [row[name] for row in calls.values()]
        label = name.replace("_", " ")
        bars = panel.barh(list(calls), values, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, values, strict=True)]
    if cost:
        panel.bar_label(bars, [f"{row['cost']:.2f}" for row in calls.values()], padding=2)
        panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.set(title="tokens by stage" + (f", cost {cost:.2f}" if cost else ""), xlabel="tokens")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 25k: long numbers run together
    panel.legend()


def plots(report: dict[str, Any], path: Path) -> bool:
    """Draw rejections, turns, relations and tokens as a PNG; return False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    # Servers have no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _plot_rejected(panels[0][0], report["rejected"])
    corpus = report["corpus"]
    turns = corpus["turns_histogram"]
    # JSON's keys are texts.
    panels[0][1].bar([int(n) for n in turns], list(turns.values()), color="tab:blue")
    panels[0][1].set(title="turns of a dialogue", xlabel="turns", ylabel="dialogues")
    panels[0][1].locator_params(axis="x", integer=True)
    names = list(SODA_RATIOS)
    found = [corpus["relations"].get(name, {"percent": 0})["percent"] for name in names]
    # Table 3's shares are rounded, and add up to 101.
    total = sum(SODA_RATIOS.values())
    published = [100 * SODA_RATIOS[name] / total for name in names]
    places = range(len(names))
    panels[1][0].bar([p - 0.2 for p in places], found, 0.4, label="here", color="tab:green")
    beside = [p + 0.2 for p in places]
    panels[1][0].bar(beside, published, 0.4, label="published SODA", color="lightgray")
    panels[1][0].set_xticks(list(places), names)
    panels[1][0].set(title="relations", ylabel="percent of the dialogues")
    panels[1][0].margins(y=0.15)  # room for the legend
    panels[1][0].legend(ncols=2, loc="upper left")
    _plot_calls(panels[1][1], report["calls"], report["cost"])
    filled = (report["rejected"], turns, corpus["relations"], report["calls"])
    for panel, rows in zip(panels.flat, filled, strict=True):
        # An empty panel would look like a count of 0.
        panel.set_visible(bool(rows))
    with replacing(path) as partial, partial.open("wb") as file:
        figure.savefig(file, dpi=110, format="png")
    # pyplot keeps each open figure in memory.
    plt.close(figure)
    return True


def write(folder: Path, report: dict[str, Any], *, plot: bool = True) -> None:
    """Write report.json, .txt, .png (if `plot`), README.md and croissant.json to `folder`."""
    write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(folder / "report.txt", table(report) + "\n")
    with (folder / "soda.jsonl").open("rb") as lines:
        first = next((json.loads(line) for line in lines), None)
    write_atomic(folder / "README.md", card(report, first))
    write_croissant(folder, report)
    (folder / "report.png").unlink(missing_ok=True)  # an older one would show other numbers
    if plot and not plots(report, folder / "report.png"):
        log.info("no report.png: matplotlib is not installed (extra plot)")
