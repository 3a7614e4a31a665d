"""Write the sample corpus: small, invented dialogues in the formats of SODA and ProsocialDialog.

The corpus exists so that a tiny model can be trained in minutes and be seen to learn.  It comes
from the grammars in `sample_corpus_*.toml`; the same seed always gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.sample_corpus.sample_corpus_grammar import (
    GrammarError,
    draw_dialogue,
    draw_slots,
    expand,
    load_grammar,
    parse_script,
)

SODA_SIZES = {"train": 600, "validation": 80, "test": 40}
PROSOCIAL_SIZES = {"train": 340, "validation": 50, "test": 25}
_SODA_SPLIT_NAMES = {"train": "train", "validation": "valid", "test": "test"}
_MAX_TURNS = 10
_CASUAL_SHARE = 0.12
_CAUTION_LABELS = (
    "__casual__",
    "__possibly_needs_caution__",
    "__probably_needs_caution__",
    "__needs_caution__",
)


def _literal(head: str, relation: str, tail: str, name: str) -> str:
    """The sentence that a commonsense triple reads as."""
    patterns = {
        "xReact": "{head}. Now {name} feels {tail}.",
        "xWant": "{head}. Now {name} wants {tail}.",
        "xIntent": "{head} because {name} wants {tail}.",
        "xAttr": "{name} is {tail}. {head}.",
        "xEffect": "{head}. As a result, {name} {tail}.",
    }
    if relation not in patterns:
        raise GrammarError(f"no literal form for the relation {relation!r}")
    return patterns[relation].format(head=head, name=name, tail=tail)


def soda_row(entry: dict, rng: random.Random) -> dict:
    """One dialogue of a topic, with every field of SODA but `original_index` and `split`."""
    slots = draw_slots(entry["slots"], rng)
    narrative = expand(rng.choice(entry["narrative"]), slots, rng)
    lines = draw_dialogue(parse_script(entry["script"]), slots, rng)
    role = expand(entry["other"], slots, rng) if "other" in entry else ""
    pair = [slots["X"], role or slots["Y"]]
    if entry.get("first") == "Y":
        pair.reverse()

    variables = {**slots, "his": "PersonX's", "X": "PersonX", "Y": "PersonY"}
    head_text = expand(entry["head"], variables, rng)
    relation, _, tail = rng.choice(entry["tails"]).partition(": ")
    tail_text = expand(tail, variables, rng)
    tail_text = tail_text[0].lower() + tail_text[1:] if tail[0].islower() else tail_text
    names = {"PersonX": slots["X"], "PersonY": role or slots["Y"], "PersonZ": slots["Z"]}

    def named(text: str) -> str:
        return re.sub("Person[XYZ]", lambda match: names[match.group()], text)

    uses_third = "PersonZ" in entry["head"]
    return {
        "head": head_text,
        "relation": relation,
        "tail": tail_text,
        "literal": _literal(named(head_text), relation, named(tail_text), slots["X"]),
        "narrative": narrative,
        "dialogue": lines,
        "speakers": [pair[turn % 2] for turn in range(len(lines))],
        "PersonX": slots["X"],
        "PersonY": "" if role else slots["Y"],
        "PersonZ": slots["Z"] if uses_third else "",
    }


def _cycle(entries: list[dict], rng: random.Random) -> Iterable[dict]:
    """Entries without end, each round in a new order, so that every split holds every topic."""
    pool = [entry for entry in entries for _ in range(entry.get("weight", 1))]
    while True:
        yield from rng.sample(pool, len(pool))


def make_soda(seed: int) -> dict[str, list[dict]]:
    """All SODA-shaped rows, by split; no dialogue occurs twice."""
    entries = load_grammar("topics_")
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[dict]] = {}
    for split, size in SODA_SIZES.items():
        rng = random.Random(f"soda/{split}/{seed}")
        rows = splits[split] = []
        for entry in _cycle(entries, rng):
            if len(rows) == size:
                break
            row = soda_row(entry, rng)
            # Long walks are drawn again by the next round rather than cut in mid-conversation.
            if tuple(row["dialogue"]) in seen or len(row["dialogue"]) > _MAX_TURNS:
                continue
            row |= {"original_index": len(seen), "split": _SODA_SPLIT_NAMES[split]}
            for field in ("head", "pmi_head", "relation_tail", "pmi_relation_tail"):
                row[field + "_answer"] = "Yes"
            seen.add(tuple(row["dialogue"]))
            rows.append(row)
    return splits


def to_you(text: str) -> str:
    """A slot's value as the listener says it: "my brother" becomes "your brother"."""
    return re.sub(r"\bmy\b", "your", text)


def to_me(text: str) -> str:
    """Advice as the one who takes it says it: "you are" becomes "I am"."""
    text = re.sub(r"\byou are\b", "I am", text)
    return re.sub(r"\byou\b", "I", re.sub(r"\byour\b", "my", text))


def label_for(votes: list[str]) -> str:
    """The published rule: one vote for intervention decides, else votes for caution are counted."""
    if "needs intervention" in votes:
        return "__needs_intervention__"
    return _CAUTION_LABELS[votes.count("needs caution")]


def _annotate(
    kind: str, votes: int, guidance: dict, fill: Callable[[str], str], rng: random.Random
) -> dict:
    """Label, votes and reasons of one context: `kind` is casual, caution, danger or casual_talk."""
    marked = {"caution": "needs caution", "danger": "needs intervention"}.get(kind, "casual")
    other = "needs caution" if kind == "danger" else "casual"
    annotations = [marked] * votes + [other] * (3 - votes)
    rng.shuffle(annotations)
    reason_lists = {
        "needs caution": "caution_reasons",
        "needs intervention": "danger_reasons",
        "casual": "doubt_reasons" if kind == "caution" else kind + "_reasons",
    }
    reasons: list[str] = []
    for annotation in annotations:
        choices = [fill(reason) for reason in guidance[reason_lists[annotation]]]
        reasons.append(rng.choice([reason for reason in choices if reason not in reasons]))
    return {
        "safety_label": label_for(annotations),
        "safety_annotations": annotations,
        "safety_annotation_reasons": reasons,
    }


def prosocial_dialogue(entry: dict, guidance: dict, rng: random.Random) -> list[dict]:
    """The rows of one dialogue about a problem, from the problem to (mostly) a good end."""
    slots = draw_slots(entry["slots"], rng)
    slots["my_repair"] = to_me(entry["repair"])
    slots |= {key: entry[key] for key in ("harm", "repair", "doing")}
    heard = {key: to_you(value) for key, value in slots.items() if key != "my_repair"}
    danger = bool(entry.get("intervene"))
    kind = "danger" if danger else "caution"
    later_votes = min(3, entry["votes"] + 1)  # an excuse weighs more than the deed
    # In order, not at random: a tiny model should be able to learn which rule comes when.
    rots = [expand(text, heard, rng) for text in entry["rots"]]

    def exchange(part: str) -> tuple[str, ...]:
        return rng.choice(parse_script(guidance[part])[0].alternatives)

    # Any first response fits any telling of the problem, but an excuse needs its own answer.
    excuse = rng.randrange(len(entry["excuse"]))
    plan = [(rng.choice(entry["say"]), rng.choice(entry["ask"]), kind, entry["votes"], rots[:1])]
    plan.append((entry["excuse"][excuse], entry["explain"][excuse], kind, later_votes, rots[1:]))
    if rng.random() < 0.3:
        pushback = exchange("pushback_danger" if danger else "pushback")
        plan.append((*pushback, kind, later_votes, rots[:1]))
    if rng.random() < 0.85:
        plan.append((*exchange("accept_danger" if danger else "accept"), "casual", 3, None))
        if rng.random() < 0.25:
            plan.append((*exchange("thanks"), "casual", 3, None))
    rows = []
    for context, response, row_kind, votes, row_rots in plan:
        row = {
            "context": expand(context, slots, rng),
            "response": expand(response, heard, rng),
            "rots": row_rots,
        }
        rows.append(
            row | _annotate(row_kind, votes, guidance, lambda t: expand(t, heard, rng), rng)
        )
    return rows


def casual_dialogue(entry: dict, guidance: dict, rng: random.Random) -> list[dict]:
    """The rows of one dialogue without any problem."""
    slots = draw_slots(entry["slots"], rng)
    lines = draw_dialogue(parse_script(entry["script"]), slots, rng)
    return [
        {"context": context, "response": response, "rots": None}
        | _annotate("casual_talk", 3, guidance, str, rng)
        for context, response in zip(lines[::2], lines[1::2], strict=True)
    ]


def make_prosocial(seed: int) -> dict[str, list[dict]]:
    """All ProsocialDialog-shaped rows, by split; no dialogue occurs twice."""
    problems = load_grammar("problems_")
    with (Path(__file__).parent / "sample_corpus_guidance.toml").open("rb") as file:
        guidance = tomllib.load(file)
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[dict]] = {}
    for split, size in PROSOCIAL_SIZES.items():
        rng = random.Random(f"prosocial/{split}/{seed}")
        troubles, talks = _cycle(problems, rng), _cycle(guidance["casual"], rng)
        rows = splits[split] = []
        number = 0
        while number < size:
            casual = rng.random() < _CASUAL_SHARE
            entry = next(talks if casual else troubles)
            dialogue = (casual_dialogue if casual else prosocial_dialogue)(entry, guidance, rng)
            key = tuple(text for row in dialogue for text in (row["context"], row["response"]))
            if key in seen:
                continue
            seen.add(key)
            for index, row in enumerate(dialogue):
                row |= {
                    "source": "ethics_amt" if casual else "socialchemistry",
                    "etc": f"sample/{entry['name']}",
                    "dialogue_id": number,
                    "response_id": index,
                    "episode_done": index == len(dialogue) - 1,
                }
            rows.extend(dialogue)
            number += 1
    return splits


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines; a reader sees the old file or the whole new one."""
    write_text(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text file; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are private to their owner
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Command line: write both corpora and say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sample_corpus.make_sample_corpus",
        description="Write the sample corpus: soda/ and prosocial/ with train, validation and "
        "test as JSON lines. The same seed gives the same bytes.",
        epilog="Example: python -m tests.sample_corpus.make_sample_corpus --output=tasks/sample",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="draws another corpus (default: 0)")
    options = parser.parse_args(arguments)
    try:
        for name, splits in (
            ("soda", make_soda(options.seed)),
            ("prosocial", make_prosocial(options.seed)),
        ):
            for split, rows in splits.items():
                path = Path(options.output) / name / f"{split}.jsonl"
                write_jsonl(path, rows)
                print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes")
    except (OSError, GrammarError, tomllib.TOMLDecodeError) as error:
        print(f"make_sample_corpus: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
