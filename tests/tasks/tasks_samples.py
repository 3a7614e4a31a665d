"""Makers of small data for the task tests."""

from __future__ import annotations

import json
from pathlib import Path

_TEXT = (
    "hello there my friend how are you today I was thinking about our garden and the rain it's "
    "wrong to be rude when people ask for help Imagine you are Nora and speak to Ben Mr Lee "
    "helps in . 0 1 2 3 4 5 6 7 8 9"
)


def train_vocabulary(prefix: Path, **options) -> Path:
    """A tiny SentencePiece model with T5's special ids."""
    import sentencepiece

    words = _TEXT.split()
    sentences = [" ".join(words[i % 7 :: 1 + i % 3]) for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        **{
            "vocab_size": 90,
            "hard_vocab_limit": False,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "minloglevel": 2,
            **options,
        },
    )
    return prefix.with_suffix(".model")


def soda_row(number: int = 0, turns: int = 4) -> dict:
    """A SODA record with its three needed fields and a few of the others."""
    return {
        "head": "PersonX helps",
        "narrative": f"Nora helps Ben in garden {number}.",
        "dialogue": [f"hello my friend {number} {turn}" for turn in range(turns)],
        "speakers": [("Nora", "Ben")[turn % 2] for turn in range(turns)],
        "PersonX": "Nora",
        "original_index": number,
    }


def prosocial_row(dialogue_id: int, response_id: int, done: bool = False, **changes) -> dict:
    """A ProsocialDialog hub row."""
    return {
        "context": f"I was rude today {dialogue_id} {response_id}",
        "response": f"how are people today {dialogue_id} {response_id}",
        "rots": ["It's wrong to be rude."],
        "safety_label": "__needs_caution__",
        "dialogue_id": dialogue_id,
        "response_id": response_id,
        "episode_done": done,
        **changes,
    }


def write_lines(path: Path, rows: list[dict]) -> Path:
    """JSON lines at `path`, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
