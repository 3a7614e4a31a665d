"""Make the texts of ToxiChat's two tasks: the stance and the offence of a dialogue's last turn.

Baheti et al. 2021 classify both with DialoGPT. Here a T5 reads the turns and writes one word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmo.tasks.formatting import Example
from cosmo.tasks.readers import TOXICHAT_STANCES, read_toxichat

STANCE, OFFENSE = "toxichat_stance", "toxichat_offense"
SAFE, OFFENSIVE = "safe", "offensive"
# The words that a model chooses from, by task.
WORDS = {STANCE: TOXICHAT_STANCES, OFFENSE: (SAFE, OFFENSIVE)}


def stance_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield the turns up to each labelled one, and its stance to the turn before it.

    Utterances of people and of chatbots count. Raises DataError, see `read_toxichat`.
    """
    for one in read_toxichat(path, split):
        if one.stance is not None:
            yield Example(one.id, "", "", one.turns, one.stance)


def offense_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield the turns up to each one, and "offensive" or "safe". Raises DataError."""
    for one in read_toxichat(path, split):
        yield Example(one.id, "", "", one.turns, WORDS[OFFENSE][one.offensive])
