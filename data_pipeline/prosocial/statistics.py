"""Count a finished corpus as the paper does, beside its numbers (Kim et al. 2022)."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cosmo.tasks.dialogues import ProsocialTurn
from cosmo.tasks.metrics.diversity import mtld, words
from cosmo.tasks.safety import LABELS, VOTES, lacks_rots
from data_pipeline.prosocial.people import Record
from data_pipeline.prosocial.situations import PAPER

log = logging.getLogger("data_pipeline")

Rows = Sequence[Mapping[str, Any]]
# Sections 3.2 to 3.4, appendices A.3 to A.5, table 1.
PAPERS = {
    "dialogues": "58k",
    "utterances": "331k",
    "utterances a dialogue": "5.7",
    "words an utterance": "20.0",
    "MTLD": "60.2",
    "rules of thumb": "217,321",
    "different rules": "160,296",
    "words a rule": "9.5",
    "new rules, of those used": "60%",
    "edits a dialogue, round 1": "1.1",
    "edits a dialogue, round 2": "1.7",
    "reported in validation 1": "13.9%",
    "reported in validation 2": "3.5%",
    "votes": "497k",
    "alpha of the votes (nominal)": "0.49",
    "intervention followed by casual": "0",
    "share of Social Chemistry": "62%",
    "share of SBIC": "21%",
    "share of ETHICS": "17%",
}


def count(dialogues: Sequence[tuple[Record, Rows]]) -> dict[str, Any]:
    """Return the numbers of a corpus as JSON values: `ours` has the names of PAPERS."""
    rows = [row for _, of_dialogue in dialogues for row in of_dialogue]
    records = [record for record, _ in dialogues]
    turns = [turn for record in records for turn in record["turns"]]
    diverse = [mtld(words(" ".join(record["turns"]))) for record in records]
    rots = [rot for row in rows for rot in row["rots"] or ()]
    rounds = [one for record in records for one in record["rounds"] if "rots" in one]
    new, chosen = (sum(len(one[kind]) for one in rounds) for kind in ("new", "chosen"))
    sources = Counter(record["source"] for record in records)
    votes = [Counter(row["safety_annotations"]) for row in rows]
    falls = _falls(dialogues)
    if falls:
        log.warning(
            "%d contexts that need intervention are followed by a casual one, which the paper did "
            "not find: the first in %s",
            len(falls), falls[0],
        )  # fmt: skip
    ours = {
        "dialogues": len(records),
        "utterances": len(turns),
        "utterances a dialogue": _mean(len(turns), len(records)),
        "words an utterance": _mean(sum(len(turn.split()) for turn in turns), len(turns)),
        "MTLD": _mean(
            sum(x for x in diverse if x is not None), sum(x is not None for x in diverse)
        ),
        "rules of thumb": len(rots),
        "different rules": len(set(rots)),
        "words a rule": _mean(sum(len(rot.split()) for rot in rots), len(rots)),
        "new rules, of those used": _share(new, new + chosen),
        **{f"edits a dialogue, round {n}": _edits(records, n) for n in _numbers(records, "rounds")},
        **{
            f"reported in validation {n}": _reported(records, n)
            for n in _numbers(records, "validations")
        },
        "votes": sum(map(Counter.total, votes)),
        "alpha of the votes (nominal)": _alpha(votes),
        "intervention followed by casual": len(falls),
        "share of Social Chemistry": _share(sources["socialchemistry"], len(records)),
        "share of SBIC": _share(sources["sbic"], len(records)),
        "share of ETHICS": _share(sources["ethics_amt"], len(records)),
    }
    return {
        "ours": ours,
        "labels_by_turn": _by_turn(dialogues),
        "splits": dict(Counter(record["split"] for record in records)),
        "rows": len(rows),
        "rows_that_lack_rots": sum(_lacks(row) for row in rows),
        "ended_after_four": sum(len(record["turns"]) < 6 for record in records),
        "candidates_by": dict(Counter(record["candidates_by"] for record in records)),
        "rules_by_kind": dict(Counter(one["rule"] for one in rounds)),
        "workers": len(workers(records)),
    }


def table(made: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows (number, ours, the paper's) of a table."""
    return [
        [name, _shown(value, name), PAPERS.get(name, "-")] for name, value in made["ours"].items()
    ]


def filters(counts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return the rows (source, filter, rows, situations, the paper's) of a table."""
    return [
        [
            source,
            step["left after"],
            f"{step['rows']:,}",
            f"{step['situations']:,}",
            PAPER[source] if number == len(steps) - 1 else "",
        ]
        for source, steps in counts.items()
        for number, step in enumerate(steps)
    ]


def labels(made: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows (turn, percent of each label) of a table."""
    return [
        [
            str(2 * number + 1),
            *(_shown(_share(one[label], sum(one.values())), "%") for label in LABELS),
        ]
        for number, one in enumerate(made["labels_by_turn"])
    ]


def workers(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Return what each worker did: the numbers that staged feedback is given on.

    `agreement` counts safety votes that most of the other workers gave too.
    """
    found: dict[str, dict[str, Any]] = {}

    def of(one: Mapping[str, Any]) -> dict[str, Any]:
        blank = {
            "items": 0, "seconds": 0.0, "timed": 0, "responses": 0, "response_words": 0,
            "proofread": 0, "edits": 0, "validated": 0, "reports": 0, "votes": 0, "agreement": 0,
        }  # fmt: skip
        return found.setdefault(one["worker"], blank)

    def item(one: Mapping[str, Any], **numbers: int) -> None:
        entry = of(one)
        entry["items"] += 1
        if one.get("seconds") is not None:
            entry["seconds"] += one["seconds"]
            entry["timed"] += 1
        for name, number in numbers.items():
            entry[name] += number

    for record in records:
        for done in (*record["rounds"], *record["validations"]):
            if "proofreader" in done:
                item(done["proofreader"], proofread=1, edits=len(done["edits"]))
            if "writer" in done:
                item(done["writer"], responses=1, response_words=len(done["response"].split()))
            for report in done.get("reports", ()):
                item(report, validated=1, reports=bool(report["incoherent"] or report["harsh"]))
        for number, votes in enumerate(record.get("votes", ())):
            for vote in votes:
                others = Counter(one["vote"] for one in votes if one is not vote)
                agrees = 2 * others[vote["vote"]] > others.total()
                if number == 0:
                    item(vote)
                entry = of(vote)
                entry["votes"] += 1
                entry["agreement"] += agrees
    return found


def _falls(dialogues: Iterable[tuple[Record, Rows]]) -> list[str]:
    return [
        record["id"]
        for record, rows in dialogues
        for one, two in itertools.pairwise(rows)
        if (one["safety_label"], two["safety_label"]) == (LABELS[-1], LABELS[0])
    ]


def _lacks(row: Mapping[str, Any]) -> bool:
    turn = ProsocialTurn("", "", tuple(row["rots"] or ()), row["safety_label"])
    return lacks_rots(turn)


def _by_turn(dialogues: Iterable[tuple[Record, Rows]]) -> list[dict[str, int]]:
    found: list[Counter] = []
    for _, rows in dialogues:
        for number, row in enumerate(rows):
            if number == len(found):
                found.append(Counter())
            found[number][row["safety_label"]] += 1
    return [{label: one[label] for label in LABELS} for one in found]


def _numbers(records: Iterable[Record], name: str) -> list[int]:
    return sorted({one["number"] for record in records for one in record[name]})


def _edits(records: Iterable[Record], number: int) -> float | None:
    edited = [
        len(one["edits"]) for record in records for one in record["rounds"]
        if one["number"] == number
    ]  # fmt: skip
    return _mean(sum(edited), len(edited))


def _reported(records: Iterable[Record], number: int) -> float | None:
    found = [
        one["reported"] for record in records for one in record["validations"]
        if one["number"] == number
    ]  # fmt: skip
    return _share(sum(found), len(found))


def _alpha(votes: Sequence[Counter]) -> float | None:
    if not votes:
        return None
    try:
        from cosmo.tasks.metrics.agreement import alpha

        value = alpha([[one[vote] for vote in VOTES] for one in votes], "nominal")
    except ImportError:  # the extra `stats` is not installed
        return None
    return None if value is None else round(value, 3)


def _mean(total: float, number: int) -> float | None:
    return round(total / number, 2) if number else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    if any(word in name for word in ("share", "reported", "new rules", "%")):
        return f"{100 * value:.1f}%"
    return f"{value:,}"
