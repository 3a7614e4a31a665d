"""Count the triples of SODA as its paper does: `python -m tools.soda_stats PATH`.

PATH is SODA (a file, or a folder of splits), or soda.jsonl of `data_pipeline co3`. Printed beside
the paper's numbers:
- dialogues of xReact triples, and the different tails of these (section 3.2)
- dialogues that hold the whole triple, its head, its relation and tail, by the model's answers
  (appendix B.1): ranked by probability, and by pointwise mutual information (PMI)

With --commonsense_items=FILE it draws --items dialogues by seed as items of the page `commonsense`,
with the model's answers. People answer them (`data_pipeline annotate make --page=commonsense
--input=FILE`, then `export`), and `annotate report` prints table 10: precision and recall of the
model by people's majority.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import command_line, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.base.tables import text_table
from cosmo.tasks import namebook, readers
from cosmo.tasks.files import files_for_split
from cosmo.tasks.paper_tables import SODA
from cosmo.tasks.record_files import read_records
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import prompts, sentences
from data_pipeline.co3.triples import Triple

# Question of the page -> fields of SODA's rows: the answer, and that by PMI.
ANSWERS = {
    "head": ("head_answer", "pmi_head_answer"),
    "relation_tail": ("relation_tail_answer", "pmi_relation_tail_answer"),
}
_NEEDED = ("relation", "tail", *(name for pair in ANSWERS.values() for name in pair))
_COLUMNS = (
    *("head", "relation", "tail", "literal", "narrative", "dialogue", "speakers"),
    *("PersonX", "PersonY", "PersonZ", "head_answer", "pmi_head_answer"),
    *("relation_tail_answer", "pmi_relation_tail_answer"),
)


def rows(path: Any, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (id, row) of SODA. Raises DataError for a row without a triple or an answer."""
    number = 0
    for file in files_for_split(path, split):
        for place, row in read_records(file, _COLUMNS):
            name = f"soda-{split}-{number}"
            readers.soda_dialogue(row, place, name)  # checks the fields of a dialogue
            for field in _NEEDED:
                if not isinstance(row.get(field), str):
                    problem = f"field {field!r} is no text"
                    raise place.error(problem, shown(row.get(field)), "a row of SODA as published")
            yield name, row
            number += 1


class Counts:
    """Running counts over rows of SODA."""

    def __init__(self) -> None:
        self.dialogues = 0
        self.tails: Counter[str] = Counter()  # of xReact
        self.held: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row."""
        self.dialogues += 1
        if row["relation"] == "xReact":
            self.tails[" ".join(row["tail"].lower().split())] += 1
        for place, way in enumerate(("", "/pmi")):
            yes = {name: row[pair[place]] == "Yes" for name, pair in ANSWERS.items()}
            for name, found in {**yes, "triple": all(yes.values())}.items():
                self.held[f"{name}{way}"] += found

    def result(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        names = [f"{name}{way}" for way in ("", "/pmi") for name in ("triple", *ANSWERS)]
        return {
            "dialogues": self.dialogues,
            "reactions": {
                "dialogues": sum(self.tails.values()),
                "tails": len(self.tails),
                "common": dict(self.tails.most_common(10)),
            },
            "held": {name: self.held[name] for name in names},
        }


def item(name: str, row: Mapping[str, Any], words: Any, names: Any) -> dict[str, Any] | None:
    """Return a row as an item of the page `commonsense`, None if its triple makes no question."""
    persons = tuple(row.get(f"Person{p}") or "" for p in "XYZ")
    triple = Triple(name, row["head"], row["relation"], row["tail"], 0, names=persons)
    made = sentences.sentence(triple, words, names, 0)
    if isinstance(made, Rejected):
        return None
    first = row["speakers"][0]
    sides = ["left" if speaker == first else "right" for speaker in row["speakers"]]
    return {
        "id": name,
        "narrative": row["narrative"],
        "context": list(row["dialogue"]),
        "speakers": sides,
        "texts": {
            "head": words.head_question(made.head),
            "relation_tail": words.question(row["relation"], **made.fields()),
        },
        "predicted": {
            f"{question}{way}": row[field]
            for question, pair in ANSWERS.items()
            for way, field in zip(("", "/pmi"), pair, strict=True)
            if row[field]
        },
    }


def text(made: Mapping[str, Any]) -> str:
    """Return the counts beside the paper's."""
    total = made["dialogues"]
    paper = SODA["reactions"]
    reactions = [
        ["", "here", "paper"],
        ["dialogues of xReact", f"{made['reactions']['dialogues']:,}",
         paper["dialogues of xReact"]],
        ["different tails", f"{made['reactions']['tails']:,}", paper["different tails"]],
    ]  # fmt: skip
    published = {
        "triple": SODA["triple_held"]["whole triple"],
        "head": SODA["triple_held"]["head"],
        "relation_tail": SODA["triple_held"]["relation and tail"],
    }
    held = [["the dialogue holds its ..., %", "here", "dialogues", "paper", "dialogues"]]
    for name, count in made["held"].items():
        shares = published.get(name, ["-", "-"])
        said = name.replace("relation_tail", "relation and tail").replace("/pmi", ", by PMI")
        share = f"{100 * count / total:.1f}" if total else "-"
        held.append([said, share, f"{count:,}", *map(str, shares)])
    tails = ", ".join(f"{tail} {count:,}" for tail, count in made["reactions"]["common"].items())
    return "\n\n".join(
        [f"{total:,} dialogues", text_table(reactions), f"tails: {tails}", text_table(held)]
    )


def main(argv: list[str] | None = None) -> int:
    """Count and print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.soda_stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="SODA")
    parser.add_argument("--split", default="train", help="of a folder (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--commonsense_items", metavar="FILE", type=Path, help="see above")
    parser.add_argument("--items", type=int, default=100, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the items (%(default)s)")
    args = parser.parse_args(argv)
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Count and print; return the exit code."""
    if args.items < 1:
        raise UserError(f"--items={args.items}: give 1 or more")
    counts, words, names = Counts(), prompts.load(), namebook.load()

    def usable() -> Iterator[tuple[int, str, dict[str, Any]]]:
        for name, row in rows(args.path, args.split):
            counts.add(row)
            if args.commonsense_items:
                made = item(name, row, words, names)
                if made is not None:
                    yield fraction_bits(args.seed, "sample", name), name, made

    drawn = heapq.nsmallest(args.items, usable(), key=lambda one: one[:2])
    if not counts.dialogues:
        raise UserError(f"{args.path}: no row of SODA to count: correct the path or --split")
    if args.commonsense_items:
        if len(drawn) < args.items:
            raise UserError(f"only {len(drawn)} of {args.items} items can be drawn: give fewer")
        write_atomic(args.commonsense_items, json_lines.lines([one for *_, one in drawn]))
    made = counts.result()
    print(json.dumps(made, indent=1) if args.json else text(made))
    if args.commonsense_items:
        print(f"{args.commonsense_items}: {len(drawn):,} items", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
