"""Small casual corpora in their publishers' formats, from the topics of the SODA sample.

DailyDialog is lines of tokenised text, EmpatheticDialogues a csv whose commas in text are written
`_comma_`, BlendedSkillTalk and Wizard of Wikipedia JSON lists, Topical-Chat one JSON object,
PersonaChat numbered lines in lower case. Every file is a function of the seed.
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
PROST_SIZES = {"train": 32, "valid": 8, "test": 8}  # of those that only Prost reads
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


def _dialogues(
    corpus: str, split: str, seed: int, sizes: dict[str, int] = SIZES
) -> list[tuple[dict, list[str]]]:
    """(topic, utterances) of one split; a topic comes again only after all the others."""
    rng = random.Random(f"{corpus}/{split}/{seed}")
    entries = load_grammar("topics_")
    if corpus == "empathetic_dialogues":
        entries = [entry for entry in entries if _emotion(entry)]
    drawn: list[tuple[dict, list[str]]] = []
    while len(drawn) < sizes[split]:
        for entry in rng.sample(entries, len(entries)):
            slots = draw_slots(entry["slots"], rng)
            drawn.append((entry, draw_dialogue(parse_script(entry["script"]), slots, rng)))
    return drawn[: sizes[split]]


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
    for entry, utterances in _dialogues("blended_skill_talk", split, seed):
        personas = rng.sample(_PERSONAS, 4)
        first, second, *rest = utterances
        dataset = rng.choice(_DATASETS)
        records.append(
            {
                "personas": [personas[:2], personas[2:]],
                "context_dataset": dataset,
                "additional_context": _title(entry) if dataset == _DATASETS[2] else "",
                "free_turker_utterance": first,
                "guided_turker_utterance": second,
                "dialog": [[turn % 2, text] for turn, text in enumerate(rest)],
            }
        )
    return json.dumps(records, indent=1) + "\n"


def _title(entry: dict) -> str:
    """The topic of an entry in words, as an article's title."""
    return entry["name"].replace("_", " ").capitalize()


def _topical_chat(split: str, seed: int) -> str:
    rng = random.Random(f"topical/{split}/{seed}")
    conversations = {}
    drawn = _dialogues("topical_chat", split, seed, PROST_SIZES)
    for number, (_, utterances) in enumerate(drawn):
        content = [
            {
                "message": text,
                "agent": f"agent_{1 + turn % 2}",
                "sentiment": rng.choice(("Neutral", "Happy", "Curious to dive deeper")),
                "knowledge_source": ["Personal Knowledge"],
                "turn_rating": rng.choice(("Passable", "Good", "Excellent")),
            }
            for turn, text in enumerate(utterances)
        ]
        conversations[f"t_sample-{split}-{number}"] = {
            "article_url": "",
            "config": rng.choice("ABCD"),
            "content": content,
            "conversation_rating": {"agent_1": "Good", "agent_2": "Good"},
        }
    return json.dumps(conversations, indent=1) + "\n"


def _persona_chat(split: str, seed: int) -> str:
    """Each dialogue from the side of its second speaker or, every other one, of its first."""
    rng = random.Random(f"persona_chat/{split}/{seed}")
    lines = []
    drawn = _dialogues("persona_chat", split, seed, PROST_SIZES)
    for number, (_, utterances) in enumerate(drawn):
        texts = [re.sub(r"([,.!?])", r" \1", text).lower() for text in utterances]
        if number % 2:
            texts = ["__SILENCE__", *texts]
        pairs = [texts[i : i + 2] for i in range(0, len(texts) - 1, 2)]
        personas = rng.sample(_PERSONAS, 4)
        rows = [f"your persona: {persona.lower()}" for persona in personas]
        for said, answer in pairs:
            others = rng.sample(sorted({text for _, text in pairs} - {answer}), 1)
            rows.append(f"{said}\t{answer}\t\t{'|'.join([*others, answer])}")
        lines.extend(f"{place} {row}\n" for place, row in enumerate(rows, start=1))
    return "".join(lines)


def _wizard_of_wikipedia(split: str, seed: int) -> str:
    rng = random.Random(f"wizard/{split}/{seed}")
    records = []
    for entry, utterances in _dialogues("wizard_of_wikipedia", split, seed, PROST_SIZES):
        speakers = ["0_Wizard", "1_Apprentice"]
        if rng.random() < 0.5:
            speakers = ["0_Apprentice", "1_Wizard"]
        title = _title(entry)
        dialog = []
        for turn, text in enumerate(utterances):
            said = {"speaker": speakers[turn % 2], "text": text}
            said |= {"retrieved_passages": [], "retrieved_topics": []}
            if said["speaker"].endswith("Wizard"):
                said |= {"checked_sentence": {}, "checked_passage": {}}
            dialog.append(said)
        records.append(
            {
                "chosen_topic": title,
                "persona": rng.choice(_PERSONAS).lower(),
                "wizard_eval": 5,
                "dialog": dialog,
                "chosen_topic_passage": [f"{title} is a topic of this invented sample."],
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
    for split, size in PROST_SIZES.items():
        # Validation and test are published by how frequent their entities are, and by whether
        # training has their topics.
        frequent, seen = ("", "") if split == "train" else ("_freq", "_random_split")
        files |= {
            f"topical_chat/{split}{frequent}.json": (_topical_chat(split, seed), size),
            f"wizard_of_wikipedia/{split}{seen}.json": (_wizard_of_wikipedia(split, seed), size),
        }
        if split != "test":  # ConvAI2's was never published
            name = f"persona_chat/{split}_self_original.txt"
            files[name] = (_persona_chat(split, seed), size)
    return files
