"""Make texts of GoEmotions (Demszky et al. 2020): a comment and a word for its emotion.

The corpus comes as `train.tsv`, `dev.tsv` and `test.tsv` without a header. Their columns are the
comment, the numbers of its emotions with commas between them, and its id. The numbers are places
in `emotions.txt`, which has the 27 emotions by alphabet, then neutral.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmo.engine.base.errors import shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import TABLES, files_for_split
from cosmo.tasks.formatting import Example
from cosmo.tasks.recognize import naming_other_corpus
from cosmo.tasks.record_files import read_lines, refuse_empty

TASK = "goemotions"
# GoEmotions' own groups by sentiment; neutral is in none.
GROUPS = {
    "positive": (
        "admiration", "amusement", "approval", "caring", "desire", "excitement", "gratitude", "joy",
        "love", "optimism", "pride", "relief",
    ),
    "ambiguous": ("confusion", "curiosity", "realization", "surprise"),
    "negative": (
        "anger", "annoyance", "disappointment", "disapproval", "disgust", "embarrassment", "fear",
        "grief", "nervousness", "remorse", "sadness",
    ),
}  # fmt: skip
NEUTRAL = "neutral"
EMOTIONS = tuple(sorted(name for names in GROUPS.values() for name in names))
LABELS = (*EMOTIONS, NEUTRAL)  # in the order of emotions.txt


def goemotions_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield each comment and its emotion; one with several emotions is an example for each.

    Ids are `goemotions-SPLIT-ROW-EMOTION`. Raises DataError for a missing path, a row of another
    form, and a number that is not an emotion's.
    """
    # A model that learns each of several emotions gives them equal probabilities, as it should.
    count = 0
    for file in files_for_split(path, split, TABLES):
        with naming_other_corpus(file, "GoEmotions"):
            for number, line in read_lines(file):
                if not line.strip():
                    continue
                text, labels = _row(line, Place(str(file), number))
                for label in labels:
                    yield Example(f"{TASK}-{split}-{count}-{label}", "", "", (text,), label)
                count += 1
    refuse_empty(path, split, count)


def _row(line: str, place: Place) -> tuple[str, list[str]]:
    """Return (comment, emotions) of a line. Quotes are characters: the files quote nothing."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 3:
        expected = "a comment, numbers of emotions and an id, with tabs between them"
        raise place.error(f"{len(fields)} columns", shown(line.strip()), expected)
    text, numbers, _ = fields
    if not text.strip():
        raise place.error("column 1, the comment, is empty", shown(text), "a text")
    known = {str(number): name for number, name in enumerate(LABELS)}
    labels = [known.get(one.strip(), "") for one in numbers.split(",")]
    if "" in labels or len(set(labels)) < len(labels):
        raise place.error(
            "column 2, the emotions", shown(numbers), f"different numbers of 0 to {len(LABELS) - 1}"
        )
    return text.strip(), labels
