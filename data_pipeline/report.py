"""What a run tells at its end: report.json, a table for people, plots and the dataset's card."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline import statistics
from data_pipeline.outputs import write_atomic

log = logging.getLogger("data_pipeline")

# Stages before there is a conversation; the rest are filters, in percent of the conversations.
BEFORE = ("triples", "sentence", "narrative", "speaker", "dialogue", "error")


def count_outputs(folder: Path) -> tuple[statistics.Statistics, Counter]:
    """Statistics of soda.jsonl, and of rejected.jsonl how many (stage, reason)."""
    numbers = statistics.Statistics()
    reasons: Counter = Counter()
    with open(folder / "soda.jsonl", encoding="utf-8") as lines:
        for line in lines:
            numbers.add(json.loads(line))
    with open(folder / "rejected.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            reasons[row["stage"], row["reason"]] += 1
    return numbers, reasons


def calls_of(spent: dict[str, dict[str, dict[str, int]]], prices: tuple[float, float]) -> dict:
    """Calls, tokens and cost by stage, of the journal's sums. Prices are for a million tokens."""
    calls = {
        stage: {
            "answers": kinds.get("answer", {}).get("calls", 0),
            "failures": kinds.get("failure", {}).get("calls", 0),
            "prompt_tokens": kinds.get("answer", {}).get("prompt_tokens", 0),
            "completion_tokens": kinds.get("answer", {}).get("completion_tokens", 0),
        }
        for stage, kinds in spent.items()
    }
    for row in calls.values():
        used = (row["prompt_tokens"], row["completion_tokens"])
        row["cost"] = round(sum(n * p for n, p in zip(used, prices, strict=True)) / 1e6, 6)
    return calls


def build(
    about: dict[str, Any],
    numbers: statistics.Statistics,
    reasons: Counter,
    calls: dict[str, dict[str, Any]],
    this_start: dict[str, Any],
) -> dict[str, Any]:
    """The report as report.json has it."""
    rejected: dict[str, dict[str, int]] = {}
    for (stage, reason), number in sorted(reasons.items()):
        rejected.setdefault(stage, {})[reason] = number
    early = sum(n for (stage, reason), n in reasons.items() if _early(stage, reason))
    late = reasons.total() - early
    return {
        "about": about,
        "triples": numbers.dialogues + reasons.total(),
        "conversations": numbers.dialogues + late,
        "records": numbers.dialogues,
        "kept_percent": round(100 * numbers.dialogues / max(numbers.dialogues + late, 1), 1),
        "rejected": rejected,
        "corpus": numbers.table(),
        "calls": calls,
        "tokens": {
            name: sum(row[f"{name}_tokens"] for row in calls.values())
            for name in ("prompt", "completion")
        },
        "cost": round(sum(row["cost"] for row in calls.values()), 6),
        "this_start": this_start,
    }


def _early(stage: str, reason: str) -> bool:
    return stage in BEFORE or reason.startswith("failed: ")


def table(report: dict[str, Any]) -> str:
    """The report for people, as text."""
    lines = [
        f"{report['triples']} triples, {report['conversations']} conversations, "
        f"{report['records']} records ({report['kept_percent']}% of the conversations)",
        "",
        f"{'rejected':<58}{'number':>9}{'percent':>9}",
    ]
    for stage, reasons in report["rejected"].items():
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
            early = _early(stage, reason)
            whole = report["triples"] if early else report["conversations"]
            of = "of triples" if early else "of conversations"
            share = 100 * number / max(whole, 1)
            lines.append(f"  {stage + ': ' + reason:<56}{number:>9}{share:>8.1f}% {of}")
    corpus = report["corpus"]
    lines += ["", "  #Dialog  Avg. #Turns  Avg. Utt. Length  Lexical Diversity"]
    lines.append(
        f"  {corpus['dialogues']:>7}  {corpus['turns']:>11}  {corpus['utterance_length']:>16}  "
        f"{corpus['lexical_diversity']:>17}"
    )
    lines += ["", f"  common: {', '.join(corpus['common_keywords'])}"]
    for name, row in corpus["relations"].items():
        lines.append(f"  {name:<8} {row['percent']:>5}%  {', '.join(row['keywords'])}")
    names = ("answers", "failures", "prompt_tokens", "completion_tokens", "cost")
    lines += ["", f"  {'calls':<22}" + "".join(f"{name.replace('_', ' '):>19}" for name in names)]
    for stage, row in report["calls"].items():
        lines.append(f"  {stage:<22}" + "".join(f"{row[name]:>19}" for name in names))
    tokens = report["tokens"]
    lines += ["", f"tokens {tokens['prompt']} in, {tokens['completion']} out"]
    lines[-1] += f"; cost {report['cost']:.4f}" if report["cost"] else ""
    start = {"retries": {}, **report["this_start"]}
    if "calls" in start:
        lines += [
            f"this start: {start['seconds']} s, {start['calls']} calls, "
            f"{start['calls_per_second']}/s, {start['most_at_once']} at once at most; "
            f"{start['replayed']} answers from the journal"
        ]
    lines += [f"  {what}: {number}" for what, number in start["retries"].items()]
    return "\n".join(lines)


def card(report: dict[str, Any]) -> str:
    """The dataset's README.md, with the columns of the paper's tables 2 and 3."""
    about, corpus = report["about"], report["corpus"]
    relations = "\n".join(
        f"| {name} ({row['percent']}%) | {', '.join(row['keywords'])} |"
        for name, row in corpus["relations"].items()
    )
    filters = "\n".join(
        f"| {stage}: {reason} | {number} |"
        for stage, reasons in report["rejected"].items()
        for reason, number in reasons.items()
    )
    settings = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    return f"""# Dialogues distilled with CO3

Social dialogues made by a language model from commonsense triples, with the method of Kim et al.
2023 (SODA). All text is machine-made: nobody said it, and it may be wrong or biased. `soda.jsonl`
has the published SODA's fields, `provenance.jsonl` how each record came about (line by line the
same), `rejected.jsonl` what was left out and why, `report.json` all numbers.

| | |
| --- | --- |
{settings}

| #Dialog | Avg. #Turns | Avg. Utt. Length | Lexical Diversity |
| --- | --- | --- | --- |
| {corpus["dialogues"]} | {corpus["turns"]} | {corpus["utterance_length"]} | \
{corpus["lexical_diversity"]} |

Lengths are words between spaces; lexical diversity is MTLD, averaged over dialogues.

| relation | keywords of its narratives |
| --- | --- |
| all | {", ".join(corpus["common_keywords"])} |
{relations}

| left out | number |
| --- | --- |
{filters}
"""


def plots(report: dict[str, Any], path: Path) -> bool:
    """Four panels as a PNG: rejections, turns, relations, tokens. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    reasons = [
        (f"{stage}: {reason}", number)
        for stage, rows in report["rejected"].items()
        for reason, number in rows.items()
    ]
    reasons = sorted(reasons, key=lambda item: item[1])[-15:]
    bars = panels[0][0].barh([r for r, _ in reasons], [n for _, n in reasons], color="tab:red")
    panels[0][0].bar_label(bars, fontsize=8)
    panels[0][0].set(title="left out", xlabel="triples")
    turns = report["corpus"]["turns_histogram"]
    panels[0][1].bar([int(n) for n in turns], list(turns.values()), color="tab:blue")
    panels[0][1].set(title="turns of a dialogue", xlabel="turns", ylabel="dialogues")
    relations = report["corpus"]["relations"]
    panels[1][0].bar(list(relations), [r["percent"] for r in relations.values()], color="tab:green")
    panels[1][0].set(title="relations", ylabel="percent of the dialogues")
    calls = report["calls"]
    down = [0] * len(calls)
    for name, color in (("prompt_tokens", "tab:gray"), ("completion_tokens", "tab:orange")):
        values = [row[name] for row in calls.values()]
        label = name.replace("_", " ")
        panels[1][1].barh(list(calls), values, left=down, label=label, color=color)
        down = [a + b for a, b in zip(down, values, strict=True)]
    cost = f", cost {report['cost']:.2f}" if report["cost"] else ""
    panels[1][1].set(title=f"tokens by stage{cost}", xlabel="tokens")
    panels[1][1].legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
    plt.close(figure)
    return True


def write(folder: Path, report: dict[str, Any], *, plot: bool = True) -> None:
    """Leave report.json, report.txt, report.png (if `plot`) and README.md in `folder`."""
    write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(folder / "report.txt", table(report) + "\n")
    write_atomic(folder / "README.md", card(report))
    if plot and not plots(report, folder / "report.png"):
        log.info("no report.png: matplotlib is not installed (extra plot)")
