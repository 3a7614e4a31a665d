"""Count the columns of the paper's tables 2 and 3, and turns, over the rows of a corpus.

Statistics of parts add up, so that many processes can count: `Statistics.add`, `merge`, `table`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo.tasks.metrics.diversity import mtld, words

_WORD = re.compile(r"[a-z']+")
# Words of no topic. Names are left out by their capital.
_STOP_WORDS = """
a able about after again all also always am an and any anything are around as ask asked at away
back be because been before being best better big both but by came can come could day did didn
didn't do does doesn't doing don't done down each else end even ever every everyone feel feeling
feels felt few finally find first for from get gets getting go goes going good got had happy has
have having he he's her here hers herself him himself his how i if i'm in into is it it's its
itself just keep kept knew know known knows last let like little long look looked looking lot
made make makes making many may maybe me might mind more most much must my never new next no not
nothing now of off on once one only or other others our out over own people person put ready
really right said saw say see seen she she's should show since so some somebody someone
something soon started still such sure take taken takes taking talk tell than that that's the
their them then there they they're thing things think thinking thought time to together told too
took tried try trying turn two up us use used very walked want wanted wants was way we week well
went were what when where which while who why will with without won't work would year years you
your
"""
_STOP = frozenset(_STOP_WORDS.split())


@dataclasses.dataclass
class Statistics:
    """Sums over dialogues; `topics` counts, per relation, the narratives that have a word."""

    dialogues: int = 0
    utterances: int = 0
    words_said: int = 0
    diversity: float = 0.0  # sum of the dialogues' MTLD
    measured: int = 0  # dialogues that have one: in which a word occurs twice
    turns: Counter = dataclasses.field(default_factory=Counter)
    relations: Counter = dataclasses.field(default_factory=Counter)
    splits: Counter = dataclasses.field(default_factory=Counter)
    answers: Counter = dataclasses.field(default_factory=Counter)
    topics: dict[str, Counter] = dataclasses.field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of SODA's schema."""
        said = row["dialogue"]
        self.dialogues += 1
        self.utterances += len(said)
        self.words_said += sum(len(text.split()) for text in said)
        diversity = mtld(words(" ".join(said)))
        # A dialogue without a repeated word has none, and must not lower the mean.
        if diversity is not None:
            self.diversity += diversity
            self.measured += 1
        self.turns[len(said)] += 1
        self.relations[row["relation"]] += 1
        self.splits[row["split"]] += 1
        self.answers["head", row["head_answer"]] += 1
        # Empty where the model was not asked, as in rows without commonsense.
        self.answers["relation-tail", row["relation_tail_answer"]] += 1
        # A set: a word counts once for each narrative, however often it is repeated.
        topical = {word for word in row["narrative"].split() if not word[:1].isupper()}
        topical = {found[0] for word in topical if (found := _WORD.match(word))}
        self.topics.setdefault(row["relation"], Counter()).update(topical - _STOP)

    def merge(self, other: Statistics) -> Statistics:
        """Add another part's sums to these."""
        for field in dataclasses.fields(self):
            # A dict of counters has no sum.
            if field.name != "topics":
                mine = getattr(self, field.name)
                setattr(self, field.name, mine + getattr(other, field.name))
        for relation, counts in other.topics.items():
            self.topics.setdefault(relation, Counter()).update(counts)
        return self

    def table(self) -> dict[str, Any]:
        """Return the numbers of the report."""
        # A corpus without a dialogue has shares and means of 0.
        count = max(self.dialogues, 1)
        total = sum(self.topics.values(), Counter())
        # By the word too, so that equally frequent ones have one order.
        common = [word for word, _ in sorted(total.items(), key=lambda i: (-i[1], i[0]))[:10]]
        relations = {
            name: {
                "dialogues": number,
                "percent": round(100 * number / count, 1),
                "keywords": keywords(self.topics.get(name, Counter()), total, common),
            }
            for name, number in sorted(self.relations.items())
        }
        return {
            "dialogues": self.dialogues,
            "utterances": self.utterances,
            "turns": round(self.utterances / count, 2),
            "utterance_length": round(self.words_said / max(self.utterances, 1), 2),
            "lexical_diversity": round(self.diversity / max(self.measured, 1), 2),
            "turns_histogram": {str(n): self.turns[n] for n in sorted(self.turns)},
            "splits": {name: self.splits[name] for name in sorted(self.splits, key=_split_place)},
            "answers": {
                f"{what}: {answer or 'not asked'}": number
                for (what, answer), number in sorted(self.answers.items())
            },
            "common_keywords": common,
            "relations": relations,
        }


def _split_place(name: str) -> tuple[int, str]:
    known = ("train", "valid", "test")
    return known.index(name) if name in known else len(known), name


def keywords(
    counts: Counter, total: Counter, without: Sequence[str] = (), most: int = 10
) -> list[str]:
    """Return the words that are commoner here than elsewhere, by frequency times log of the ratio.

    `without` are words that are common everywhere, left out as in table 3. The paper asked ChatGPT
    for its keywords (footnote 10), so these differ from table 3's by their method.
    """
    # Never 0, because a relation may have no word that counts.
    here, everywhere = max(sum(counts.values()), 1), max(sum(total.values()), 1)

    def score(word: str) -> float:
        # Frequency too, because the ratio alone puts the rarest words first.
        share = counts[word] / here
        return share * math.log(share / (total[word] / everywhere))

    # A word of a single narrative is no topic of its relation.
    often = [word for word, number in counts.items() if number > 1 and word not in without]
    return sorted(often, key=lambda word: (-score(word), word))[:most]
