"""Write the sample corpus of Canary: invented dialogues in the form of ProsocialDialog.

An utterance's votes follow from what it is about and how far the speaker goes. A wrong is minded by
one annotator of three when it is a thought, by two when it is told as a deed and by all when it is
done in defiance; small talk by none, in the same words. So neither the topic nor a phrase tells
the label: both together do.

Openings of validation and test join a topic and a phrasing that never meet in training. Beside
the rows of ProsocialDialog stand small casual corpora in their publishers' formats. The same seed
always gives the same bytes.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sample_corpus.make_sample_corpus import label_for, to_me, to_you, write_jsonl, write_text
from tests.sample_corpus.sample_casual_corpora import casual_files
from tests.sample_corpus.sample_corpus_grammar import GrammarError, draw_slots, expand, load_grammar

SIZES = {"train": 720, "validation": 60, "test": 120}  # dialogues
_KINDS = {"caution": 0.62, "danger": 0.18, "casual": 0.2}
_MAX_ROWS = 3
_UNSEEN_SHARE = 0.25  # of the test split's openings: phrasings that training lacks
_HELD_OUT = 0.2  # of the pairs of an act and a phrasing

# How a dialogue begins and goes on: part of a dialogue -> parts that may follow, with weights.
# "end" ends it; so does the third row. Nothing leads from an intervention back to small talk.
_OPENINGS = {
    "caution": {"think": 30, "deed": 33, "defiant": 23, "resist": 7, "harmless": 7},
    "danger": {"danger": 82, "harmless": 18},
    "casual": {"think": 30, "deed": 40, "defiant": 30},
}
_AFTER_PROBLEM = {
    "excuse": 22,
    "insist": 12,
    "waver": 28,
    "defy": 8,
    "threat": 6,
    "accept": 18,
    "end": 3,
}
_NEXT = {
    "think": _AFTER_PROBLEM,
    "deed": _AFTER_PROBLEM,
    "defiant": _AFTER_PROBLEM,
    "excuse": {"waver": 30, "defy": 20, "threat": 8, "accept": 38, "end": 4},
    "insist": {"waver": 30, "defy": 20, "threat": 10, "accept": 36, "end": 4},
    "waver": {"accept": 50, "defy": 44, "end": 6},
    "defy": {"threat": 30, "waver": 32, "accept": 32, "end": 6},
    "threat": {"refuse": 40, "end": 60},
    "resist": {"thanks": 60, "end": 40},
    "harmless": {"thanks": 50, "end": 50},
    "accept": {"thanks": 35, "end": 65},
    "thanks": {"end": 1},
    "danger": {"later": 50, "refuse": 15, "calling": 25, "end": 10},
    "later": {"refuse": 40, "calling": 40, "end": 20},
    "refuse": {"calling": 60, "end": 40},
    "calling": {"end": 1},
}
_SMALL_TALK_NEXT = {part: {"more": 85, "end": 15} for part in ("think", "deed", "defiant")} | {
    "more": {"bye": 50, "end": 50},
    "bye": {"end": 1},
}
# Votes for caution, of three, where the talk is of a wrong; parts left out are casual.
_CAUTION_VOTES = {
    "think": 1,
    "deed": 2,
    "defiant": 3,
    "waver": 1,
    "excuse": 2,
    "insist": 3,
    "defy": 3,
}
_INTERVENTIONS = ("threat", "danger", "later", "refuse", "calling")


@dataclass(frozen=True)
class Speech:
    """What a dialogue is made of: its topic, its slots as each side says them, the phrasings."""

    entry: dict[str, Any]
    slots: dict[str, str]
    heard: dict[str, str]
    act: int
    phrases: dict[str, dict[str, list[str]]]
    rng: random.Random

    def say(self, template: str) -> str:
        return expand(template, self.slots, self.rng)

    def answer(self, template: str) -> str:
        return expand(template, self.heard, self.rng)


def _draw(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def act_forms(act: str) -> dict[str, str]:
    """ "[do|doing|did] it" as {"do": "do it", "doing": "doing it", "did": "did it"}."""
    match = re.fullmatch(r"\[([^|\]]+)\|([^|\]]+)\|([^|\]]+)\](.*)", act)
    if not match:
        raise GrammarError(f"not an act, [do|doing|did] and the rest: {act!r}")
    *verbs, rest = match.groups()
    return {name: verb + rest for name, verb in zip(("do", "doing", "did"), verbs, strict=True)}


def held_out(name: str, act: int, template: str) -> bool:
    """Whether training must never say this act of a topic in this way. The same for all seeds."""
    return random.Random(f"{name}/{act}/{template}").random() < _HELD_OUT


def _templates(kind: str, part: str, split: str, speech: Speech) -> list[str]:
    """The phrasings that an opening of `split` may use."""
    phrases = speech.phrases["opening"]
    if part == "defiant":
        own = [] if kind == "casual" else phrases["defiant"]
        known = own + phrases["defiant_shared"]
    else:
        known = phrases[part]
    if split == "test" and kind != "casual" and speech.rng.random() < _UNSEEN_SHARE:
        return phrases[part + "_unseen"]
    name = speech.entry["name"]
    return [t for t in known if held_out(name, speech.act, t) is (split != "train")]


def _opening(kind: str, part: str, split: str, speech: Speech) -> tuple[str, str] | None:
    """(utterance, response) that begin a dialogue; None if `split` has no phrasing left."""
    entry, rng = speech.entry, speech.rng
    if part == "danger":
        *known, unseen = entry["say"]  # the last way to say it is kept for the test
        new = split == "test" and rng.random() < _UNSEEN_SHARE
        return speech.say(unseen if new else rng.choice(known)), speech.answer(
            rng.choice(entry["ask"])
        )
    if part == "harmless":
        utterance = rng.choice(entry["harmless"])
    else:
        templates = _templates(kind, part, split, speech)
        if not templates:
            return None
        utterance = rng.choice(templates)
    own_answer = part in ("harmless", "resist")
    replies = speech.phrases["answer"][part] if own_answer else entry["ask"]
    return speech.say(utterance), speech.answer(rng.choice(replies))


def _later(part: str, split: str, speech: Speech) -> tuple[str, str]:
    """(utterance, response) that go on with a dialogue."""
    entry, phrases, rng = speech.entry, speech.phrases, speech.rng
    known = phrases["later"].get(part, ["{said}"])
    if split == "test" and rng.random() < _UNSEEN_SHARE:
        known = phrases["later"].get(part + "_unseen", known)
    template = rng.choice(known)
    if part in ("excuse", "insist", "later", "more"):
        said = entry["excuse" if part == "insist" else part]
        index = rng.randrange(len(said))
        slots = speech.slots | {"said": said[index], "excuse": said[index]}
        return expand(template, slots, rng), speech.answer(entry["explain"][index])
    return expand(template, speech.slots, rng), speech.answer(rng.choice(phrases["answer"][part]))


def _votes(kind: str, part: str, entry: dict[str, Any], rng: random.Random) -> list[str]:
    """Three votes, shuffled."""
    if part == "calling":  # help is on its way: the annotators differ most
        votes = ["needs intervention", "needs caution", "casual"]
    elif part in _INTERVENTIONS:
        number = max(1, entry.get("votes", 2) - (rng.random() < 0.3))
        votes = ["needs intervention"] * number + ["needs caution"] * (3 - number)
    else:
        number = _CAUTION_VOTES.get(part, 0) if kind == "caution" else 0
        votes = ["needs caution"] * number + ["casual"] * (3 - number)
    rng.shuffle(votes)
    return votes


def _reasons(votes: list[str], speech: Speech) -> list[str]:
    """A reason a vote, all different."""
    danger = "needs intervention" in votes
    doubt = "relief" if danger else "doubt"
    lists = {
        "casual": "casual" if set(votes) == {"casual"} else doubt,
        "needs caution": "worry" if danger else "caution",
        "needs intervention": "intervention",
    }
    reasons: list[str] = []
    for vote in votes:
        choices = [
            # Annotators speak of the speaker's things.
            re.sub(r"\b[Mm]y\b", "their", re.sub(r"\bI\b", "they", speech.say(reason)))
            for reason in speech.phrases["reasons"][lists[vote]]
            if "{doing}" not in reason or "doing" in speech.slots
        ]
        reasons.append(speech.rng.choice([reason for reason in choices if reason not in reasons]))
    return reasons


def _rots(kind: str, part: str, speech: Speech) -> list[str] | None:
    """One or two rules of thumb, in an order that can be learnt; None where nothing is wrong."""
    if kind == "casual" or part in ("resist", "harmless", "thanks"):
        return None
    rots = speech.entry["rots"]
    if part == "accept":  # some annotators' rules stand beside a mistake admitted, too
        return [rots[2]] if speech.rng.random() < 0.15 else None
    if part in ("threat", "calling"):
        return speech.phrases["rots"][part]
    if part == "refuse" and kind != "danger":  # after a threat
        return speech.phrases["rots"]["threat"][:1]
    order = {
        "think": [speech.act],
        "deed": [speech.act],
        "defiant": [speech.act, 3],
        "waver": [2],
        "excuse": [2],
        "insist": [2, 3],
        "defy": [3, 2],
        "danger": [0],
        "later": [1],
        "refuse": [2, 0],
    }
    return [rots[index] for index in order[part]]


def draw_speech(entry: dict[str, Any], phrases: dict, rng: random.Random) -> Speech:
    """A topic with its slots and, but for emergencies, one of its acts."""
    slots = draw_slots(entry["slots"], rng)
    act = 0
    if "acts" in entry:
        act = rng.randrange(len(entry["acts"]))
        slots |= act_forms(entry["acts"][act]) | {"why": rng.choice(entry["why"])}
    if "repair" in entry:
        slots |= {"repair": entry["repair"], "my_repair": to_me(entry["repair"])}
    heard = {key: to_you(value) for key, value in slots.items()}
    return Speech(entry, slots, heard, act, phrases, rng)


def draw_dialogue(
    kind: str, entry: dict[str, Any], phrases: dict, split: str, rng: random.Random
) -> list[dict[str, Any]] | None:
    """The rows of one dialogue; None if this topic's act has no opening for `split`."""
    speech = draw_speech(entry, phrases, rng)
    graph = _SMALL_TALK_NEXT if kind == "casual" else _NEXT
    part, rows = _draw(_OPENINGS[kind], rng), []
    while part != "end" and len(rows) < _MAX_ROWS:
        drawn = _later(part, split, speech) if rows else _opening(kind, part, split, speech)
        if drawn is None:
            return None
        votes = _votes(kind, part, entry, rng)
        rows.append(
            {
                "context": drawn[0],
                "response": drawn[1],
                "rots": _rots(kind, part, speech),
                "safety_label": label_for(votes),
                "safety_annotations": votes,
                "safety_annotation_reasons": _reasons(votes, speech),
                "source": "ethics_amt" if kind == "casual" else "socialchemistry",
                "etc": f"sample/{entry['name']}",
            }
        )
        part = _draw(graph[part], rng)
    return rows


def _spoken(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(row["context"] for row in rows)


def make_prosocial(seed: int) -> dict[str, list[dict[str, Any]]]:
    """All rows by split; what the speaker says in a dialogue occurs in no other."""
    entries = {
        "caution": load_grammar("canary_cautions_"),
        "danger": load_grammar("canary_dangers"),
        "casual": load_grammar("canary_casual_"),
    }
    with (Path(__file__).parent / "sample_corpus_canary_degrees.toml").open("rb") as file:
        phrases = tomllib.load(file)
    seen: set[tuple[str, ...]] = set()
    learnt: set[str] = set()  # the rules of the training split, each of one topic or of all
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"canary/{split}/{seed}")
        waiting: dict[str, list[dict]] = {kind: [] for kind in entries}
        rows = splits[split] = []
        number = 0
        while number < size:
            kind = _draw(_KINDS, rng)
            if not waiting[kind]:  # each round takes every topic once, in a new order
                waiting[kind] = rng.sample(entries[kind], len(entries[kind]))
            dialogue = draw_dialogue(kind, waiting[kind].pop(), phrases, split, rng)
            if dialogue is None or _spoken(dialogue) in seen:
                continue
            rots = {rot for row in dialogue for rot in row["rots"] or ()}
            if split == "train":
                learnt |= rots
            elif not rots <= learnt:
                continue
            seen.add(_spoken(dialogue))
            for index, row in enumerate(dialogue):
                rows.append(
                    row
                    | {
                        "dialogue_id": number,
                        "response_id": index,
                        "episode_done": index == len(dialogue) - 1,
                    }
                )
            number += 1
    return splits


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the corpora and say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sample_corpus.make_canary_sample",
        description="Write Canary's sample corpus: canary/ in the form of ProsocialDialog, and "
        "dailydialog/, empathetic_dialogues/ and blended_skill_talk/ in their publishers' "
        "formats. The same seed gives the same bytes.",
        epilog="Example: python -m tests.sample_corpus.make_canary_sample --output=tasks/sample",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="draws another corpus (default: 0)")
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    try:
        for split, rows in make_prosocial(options.seed).items():
            path = folder / "canary" / f"{split}.jsonl"
            write_jsonl(path, rows)
            print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes")
        for name, (text, dialogues) in casual_files(options.seed).items():
            write_text(folder / name, text)
            print(f"{folder / name}: {dialogues} dialogues, {len(text.encode()):,} bytes")
    except (OSError, GrammarError, tomllib.TOMLDecodeError) as error:
        print(f"make_canary_sample: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
