"""Small casual corpora in their publishers' formats, from the topics of the SODA sample.

DailyDialog is lines of tokenised text, EmpatheticDialogues a csv whose commas in text are written
`_comma_`, BlendedSkillTalk a JSON list. Every file is a function of the seed.
"""

from __future__ import annotations

import json
import random
import re

from tests.sample_corpus.sample_corpus_grammar import (
    draw_dialogue,
    draw_slots,
    load_grammar,
    parse_script,
)

SIZES = {"train": 48, "valid": 12, "test": 12}  # dialogues a corpus
_PERSONAS = (
    "I have two cats.",
    "I love to cook for my friends.",
    "I work in a bakery.",
    "I grew up in a small town.",
    "I ride my bike to work.",
    "My favorite color is green.",
    "I play the violin.",
    "I am learning to swim.",
    "I collect old maps.",
    "I have three brothers.",
    "I drink too much tea.",
    "I would like to see the sea.",
    "I read before I go to sleep.",
    "My garden is full of roses.",
    "I teach math at a school.",
    "I never eat breakfast.",
)
_DATASETS = ("convai2", "empathetic_dialogues", "wizard_of_wikipedia")


def _dialogues(corpus: str, split: str, seed: int) -> list[tuple[dict, list[str]]]:
    """(topic, utterances) of one split; a topic comes again only after all the others."""
    rng = random.Random(f"{corpus}/{split}/{seed}")
    entries = load_grammar("topics_")
    if corpus == "empathetic_dialogues":
        entries = [entry for entry in entries if _emotion(entry)]
    drawn: list[tuple[dict, list[str]]] = []
    while len(drawn) < SIZES[split]:
        for entry in rng.sample(entries, len(entries)):
            slots = draw_slots(entry["slots"], rng)
            drawn.append((entry, draw_dialogue(parse_script(entry["script"]), slots, rng)))
    return drawn[: SIZES[split]]


def _emotion(entry: dict) -> str:
    """The feeling that a topic's triples name, in one word; "" if they name none."""
    feelings = [tail.removeprefix("xReact: ") for tail in entry["tails"] if "xReact: " in tail]
    return feelings[0] if feelings and re.fullmatch("[a-z]+", feelings[0]) else ""


def _daily_dialog(split: str, seed: int) -> str:
    lines = []
    for _, utterances in _dialogues("dailydialog", split, seed):
        spaced = (re.sub(r"([,.!?])", r" \1", text) for text in utterances)
        lines.append("".join(f"{text} __eou__ " for text in spaced).rstrip() + "\n")
    return "".join(lines)


def _empathetic_dialogues(split: str, seed: int) -> str:
    lines = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"]
    for number, (entry, utterances) in enumerate(_dialogues("empathetic_dialogues", split, seed)):
        texts = [text.replace(",", "_comma_") for text in utterances]
        for index, text in enumerate(texts):
            start = f"hit:{number}_conv:{2 * number},{index + 1},{_emotion(entry)},{texts[0]}"
            lines.append(f"{start},{2 * number + index % 2},{text},5|5|5_5|5|5,\n")
    return "".join(lines)


def _blended_skill_talk(split: str, seed: int) -> str:
    rng = random.Random(f"personas/{split}/{seed}")
    records = []
    for _, utterances in _dialogues("blended_skill_talk", split, seed):
        personas = rng.sample(_PERSONAS, 4)
        first, second, *rest = utterances
        records.append(
            {
                "personas": [personas[:2], personas[2:]],
                "context_dataset": rng.choice(_DATASETS),
                "additional_context": "",
                "free_turker_utterance": first,
                "guided_turker_utterance": second,
                "dialog": [[turn % 2, text] for turn, text in enumerate(rest)],
            }
        )
    return json.dumps(records, indent=1) + "\n"


def casual_files(seed: int) -> dict[str, tuple[str, int]]:
    """Path below the sample's folder -> (content, dialogues)."""
    files = {}
    for split, size in SIZES.items():
        name = {"valid": "validation"}.get(split, split)
        files |= {
            f"dailydialog/dialogues_{name}.txt": (_daily_dialog(split, seed), size),
            f"empathetic_dialogues/{split}.csv": (_empathetic_dialogues(split, seed), size),
            f"blended_skill_talk/{split}.json": (_blended_skill_talk(split, seed), size),
        }
    return files
