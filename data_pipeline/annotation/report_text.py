"""Print a report as text: tables of votes, tests, judges and models, the papers' beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cosmo.engine.base.tables import text_table
from cosmo.tasks.paper_tables import PROSOCIAL, SODA
from data_pipeline.annotation.answers import MODEL

# Pages whose published tables have the same questions: the columns of the tables.
_COLUMNS = {
    "prosocial": ("prosocial", "engaged", "respectful", "coherent", "overall"),
    "responses": ("natural", "consistent", "specific", "overall"),
}


def text(made: Mapping[str, Any]) -> str:
    """Return the report as text."""
    parts = [_heading(made)]
    if "screening" in made:
        parts.append(_screening(made))
    if made["people"]:
        parts += _group("people", made, made["people"]["questions"])
        parts += _people(made["people"])
    for name, model in made["models"].items():
        parts += [f"{name} (a model: its votes are not people's)"]
        parts += _group(name, made, model["questions"])
        parts += _model(model)
    published = _published(made)
    return "\n\n".join([part for part in parts if part] + published) + "\n"


def _heading(made: Mapping[str, Any]) -> str:
    between = f": {made['systems'][0]} (first) and {made['systems'][1]}" if made["systems"] else ""
    lines = [f"{made['page']}{between}; {made['items']:,} items, task {made['task']}"]
    people = made["people"]
    if people:
        missing = people["items_without_answer"]
        lines.append(f"{people['judges']} judges, {people['answers']:,} answers")
        if missing or people["items_with_too_few"]:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            lines.append(
                f"{len(missing)} items have no answer{f' ({shown})' if missing else ''}, "
                f"{people['items_with_too_few']} fewer than {made['judges_per_item']}"
            )
        if people["judges"] == 1:
            lines.append("one judge only: there is no agreement to measure")
    for reason, number in made["quarantined"].items():
        lines.append(f"set aside: {number} x {reason}")
    for name in made["shared_names"]:
        lines.append(f"judge {name!r} stands in several files: counted as one person")
    for names in made["similar_names"]:
        lines.append(f"judges {', '.join(map(repr, names))} are counted as {len(names)} persons: "
                     "if they are one, give them one name")  # fmt: skip
    return "\n".join(lines)


def _screening(made: Mapping[str, Any]) -> str:
    """Return who was left out, and the shares of votes before and after."""
    found = made["screening"]
    lines = [
        f"left out: {len(found['left_out'])} judges with {found['answers_left_out']:,} answers to "
        f"items (below {_percent(found['min_gold'])}% right gold answers, or not qualified)"
    ]
    for one in found["left_out"]:
        shares = ", ".join(
            f"{role} {one[role]['right']}/{one[role]['total']} right" for role in one["failed"]
        )
        lines.append(f"  {one['judge']}: {one['answers']:,} answers, {shares}")
    if found["unmeasured"]:
        names = ", ".join(map(repr, found["unmeasured"]))
        lines.append(f"kept without a gold or qualification answer: {names}")
    before, after = found["before"], made["people"]
    if not (before and after):
        return "\n".join(lines)
    rows = [["shares of votes, %", "all judges", "votes", "without those left out", "votes"]]
    for name, one in before["questions"].items():
        if "shares" in one:
            cells = []
            for given in (one, after["questions"][name]):
                shares = (f"{_choice(key)} {_percent(x)}" for key, x in given["shares"].items())
                cells += [", ".join(shares), f"{given['votes']:,}"]
            rows.append([name, *cells])
    return "\n".join(lines) + ("\n\n" + text_table(rows) if len(rows) > 1 else "")


def _choice(name: str) -> str:
    return {"False": "not marked", "True": "marked"}.get(name, name)


def _group(name: str, made: Mapping[str, Any], questions: Mapping[str, Any]) -> list[str]:
    compared = {q: one for q, one in questions.items() if one["kind"] == "comparison"}
    chosen = {q: one for q, one in questions.items() if one["kind"] in ("choice", "marks")}
    written = {q: one for q, one in questions.items() if q not in compared and q not in chosen}
    parts = []
    if compared:
        parts += [_comparisons(compared), _tests(compared)]
    parts += [_choices(q, one) for q, one in chosen.items()]
    lines = []
    for question, one in written.items():
        if name.startswith(MODEL) and not one["given"]:
            continue  # models write no texts
        amount = f", {one['checked']} checked" if "checked" in one else ""
        if "mean_length" in one:
            unit = {"text": "characters", "edits": "utterances", "several": "rules"}[one["kind"]]
            amount = f", {one['mean_length']:.1f} {unit} on average"
        lines.append(f"{question}: {one['given']} given{amount}")
    return [*parts, "\n".join(lines)]


def _comparisons(questions: Mapping[str, Any]) -> str:
    rows = [["votes, %", "first", "tie", "second", "votes", "second wins (ties out), 95%",
             "ties halved", "items 1st/tie/2nd/none", "alpha"]]  # fmt: skip
    for name, one in questions.items():
        wins, best = one["win_rate"], one["majority"]
        rows.append([
            name,
            *(_percent(one["shares"][side]) for side in ("first", "tie", "second")),
            f"{one['votes']:,}",
            f"{_percent(wins['ties_out'])} {_interval(wins['ties_out_wilson'])}",
            _percent(wins["ties_halved"]),
            "/".join(str(best[side]) for side in ("first", "tie", "second", "none")),
            _alphas(one["alpha"]),
        ])  # fmt: skip
    return text_table(rows)


def _tests(questions: Mapping[str, Any]) -> str:
    rows = [["tests", "paper's z", "z, one sample", "sign test of items", "Holm", "ties halved",
             "Holm", "second - first, %, 95% by bootstrap", "A preferred, %"]]  # fmt: skip
    votes = 0
    for name, one in questions.items():
        tests, drawn = one["tests"], one["tests"]["bootstrap"]
        votes = max(votes, one["votes"])
        if not one["votes"]:
            rows.append([name, *["-"] * 8])
            continue
        low, high = 100 * drawn["low"], 100 * drawn["high"]
        rows.append([
            name,
            _number(tests["paper_z"]),
            _number(tests["one_sample_z"]),
            *(
                _p(tests[f"sign_test_items{ties}{holm}"])
                for ties in ("", "_ties_halved")
                for holm in ("", "_holm")
            ),
            f"{100 * drawn['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
            _percent(one["position"]["share_a"]),
        ])  # fmt: skip
    effect = next((q["power"]["smallest_effect"] for q in questions.values() if q["votes"]), None)
    note = (
        "alpha: Krippendorff's, n nominal, o ordinal, i interval. Tests above 0: the second.\n"
        "The paper's z takes the two shares for two samples: without ties it is 1.41 times too "
        "large. The tests of items are exact."
    )
    if effect is not None:
        note += (
            f"\nSmallest effect that {votes:,} votes detect (power and level 95%, the paper's "
            f"form): {effect:.3f}; 900 votes: 0.170."
        )
    return text_table(rows) + "\n" + note


def _choices(question: str, one: Mapping[str, Any]) -> str:
    rows = [[question, "votes", "%", "95%", "majority of items or utterances"]]
    for name, count in one["counts"].items():
        interval = _interval(one["wilson"][name])
        share = _percent(one["shares"][name])
        rows.append([_choice(name), f"{count:,}", share, interval, f"{one['majority'][name]:,}"])
    rows.append(["no majority", "", "", "", f"{one['majority']['none']:,}"])
    lines = [text_table(rows), f"alpha: {_alphas(one['alpha'])}"]
    if "items_reported" in one:
        reported = one["items_reported"]
        lines.append(
            f"reported by at least one judge: {reported['count']} items, "
            f"{_percent(reported['share'])}% (paper: 13.9% of dialogues went back after the first "
            "round, 3.5% after the second)"
        )
    return "\n".join(lines)


def _people(people: Mapping[str, Any]) -> list[str]:
    parts = []
    if people.get("safety_labels"):
        labels = people["safety_labels"]
        total = sum(labels.values())
        rows = [["label of three votes", "contexts", "%"]]
        rows += [[k.strip("_"), f"{n:,}", _percent(n / total if total else None)]
                 for k, n in labels.items()]  # fmt: skip
        parts.append(text_table(rows))
    for way, found in people.get("predicted", {}).items():
        parts.append(_classes(way, found))
    if "by_judge" in people:
        rows = [["judge", "answers", "with the others' majority, %", "gold", "qualification",
                 "median s", "A preferred, %"]]  # fmt: skip
        for name, one in people["by_judge"].items():
            seconds = one["seconds"]
            rows.append([
                name,
                f"{one['answers']:,}",
                _percent(one["agreement"]["share"]),
                *(f"{one[r]['right']}/{one[r]['total']}" for r in ("gold", "qualification")),
                f"{seconds['median']:.0f}" if seconds else "-",
                _percent(one["position"]["share_a"]),
            ])  # fmt: skip
        parts.append(text_table(rows))
    if people.get("seconds"):
        seconds = people["seconds"]
        parts.append(f"time per item: median {seconds['median']:.0f} s, mean {seconds['mean']:.0f} "
                     f"s, {seconds['total'] / 3600:.2f} hours in all")  # fmt: skip
    return parts


def _model(model: Mapping[str, Any]) -> list[str]:
    parts = []
    if model["by_order"]:
        rows = [["the model's position", "A preferred, %", "95%", "p", "same in both orders, %"]]
        for name, one in model["by_order"].items():
            rows.append([name, _percent(one["share_a"]), _interval(one["wilson"]), _p(one["p"]),
                         _percent(one["consistent"])])  # fmt: skip
        parts.append(text_table(rows))
    gold = model["gold"]["gold"]
    if gold["total"]:
        parts.append(f"gold: {gold['right']}/{gold['total']} right")
    if not any(one["units"] for one in model["agreement_with_people"].values()):
        return [*parts, "no item has a majority of people to compare it with"]
    rows = [["with people's majority", "items", "agree, %", "95%", "kappa"]]
    for name, one in model["agreement_with_people"].items():
        rows.append([name, f"{one['units']:,}", _percent(one["share"]), _interval(one["wilson"]),
                     _number(one["kappa"])])  # fmt: skip
    parts.append(text_table(rows))
    for name, one in model["agreement_with_people"].items():
        if "classes" in one:
            parts.append(_classes(name, one["classes"]))
    return parts


def _classes(name: str, found: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 in percent, as in table 10."""
    rows = [[f"{name}, %", "precision", "recall", "F1", "gold", "predicted"]]
    for label, row in found["labels"].items():
        shares = [_percent(row[key]) for key in ("precision", "recall", "f1")]
        rows.append([label, *shares, str(row["gold"]), str(row["predicted"])])
    overall = [_percent(found["overall"][key]) for key in ("precision", "recall", "f1")]
    rows.append(["overall, by gold", *overall, str(found["items"]), ""])
    return text_table(rows)


def _published(made: Mapping[str, Any]) -> list[str]:
    """Return the papers' tables of the page, with a row of ours where people have answered."""
    page = made["page"]
    if page == "commonsense":
        rows = [["table 10, P / R / F1, %", "yes", "no", "unknown", "overall"]]
        for name, values in SODA["commonsense"].items():
            rows.append([name, *(" / ".join(f"{v:.1f}" for v in three) for three in values)])
        return ["The paper's (Kim et al. 2023):\n" + text_table(rows)]
    if page not in _COLUMNS:
        return []
    columns = _COLUMNS[page]
    ours = made["people"] and made["people"]["questions"]
    named = f"ours: {' : '.join(made['systems'])}"
    if page == "responses":
        rows = [["first : second, %", *columns]]
        for corpus, first, second, left, right in SODA["head_to_head"]["rows"]:
            cells = [f"{a} : {b}" for a, b in zip(left, right, strict=True)]
            rows.append([f"{first} : {second} ({corpus})", *cells])
        sides: tuple[str, ...] = ("first", "second")
        title = "The paper's tables 5, 6, 7 and 11 (Kim et al. 2023), and ours:\n"
    else:
        rows = [["first / tie / second, %", *columns]]
        for name, three in PROSOCIAL["head_to_head"].items():
            if name != "columns":
                cells = [" / ".join(map(str, cell)) for cell in zip(*three, strict=True)]
                rows.append([f"{name} : Prost (RoT & Response)", *cells])
        for name, three in PROSOCIAL["steering"].items():
            if name != "columns":
                rows.append([name, *(" / ".join(map(str, c)) for c in zip(*three, strict=True))])
        sides = ("first", "tie", "second")
        title = "The paper's tables 4 and 9, figures 5 and 6 (Kim et al. 2022), and ours:\n"
    if ours:
        mark = " : " if page == "responses" else " / "
        cells = [mark.join(_percent(ours[q]["shares"][s]) for s in sides) if q in ours else "-"
                 for q in columns]  # fmt: skip
        rows.append([named, *cells])
    return [title + text_table(rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _alphas(alphas: Mapping[str, float | None]) -> str:
    """Return alphas with the first letters of their levels: `0.31 n, 0.44 o`."""
    known = [f"{value:.2f} {level[0]}" for level, value in alphas.items() if value is not None]
    return ", ".join(known) or "undefined"
