"""Compute the numbers that papers give of a corpus: sizes, lengths, diversity, RoTs, labels."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosmo.engine.base.errors import DataError
from cosmo.tasks.metrics.agreement import alpha
from cosmo.tasks.metrics.diversity import mtld, words
from cosmo.tasks.safety import LABELS, VOTES, aggregate, lacks_rots
from tools.corpus_files import Labelled, Read

SHOWN = 5  # bad records that are quoted


@dataclass
class Labels:
    """Running counts of the safety labels, votes and sources in rows of ProsocialDialog."""

    rows: int = 0
    by_turn: Counter[tuple[int, str]] = field(default_factory=Counter)  # turn from 1, label
    steps: Counter[tuple[int, str, str]] = field(default_factory=Counter)  # turn, its label, next
    votes: Counter[tuple[int, ...]] = field(default_factory=Counter)  # of each of VOTES
    differ: int = 0  # rows whose votes make another label
    differing: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)  # dialogues
    lacking_rots: int = 0  # rows that need RoTs and have none
    casual_rots: int = 0  # casual rows that have some

    def add(self, rows: Sequence[Labelled]) -> list[DataError]:
        """Count the rows of one dialogue. Return the faults of their votes."""
        problems = []
        for row in rows:
            exchange = row.exchange
            self.rows += 1
            self.by_turn[row.turn, exchange.safety_label] += 1
            self.lacking_rots += lacks_rots(exchange)
            self.casual_rots += exchange.safety_label == LABELS[0] and bool(exchange.rots)
            if exchange.votes is not None:
                try:
                    label = aggregate(exchange.votes)
                except DataError as error:
                    place = f"{exchange.place.file}:{exchange.place.line}"
                    problems.append(DataError(f"{place}: field 'safety_annotations': {error}"))
                    continue
                self.votes[tuple(exchange.votes.count(vote) for vote in VOTES)] += 1
                if label != exchange.safety_label:
                    self.differ += 1
                    # A wrong rule would differ in every row: a few examples suffice.
                    if len(self.differing) < SHOWN:
                        place = f"{exchange.place.file}:{exchange.place.line}"
                        self.differing.append(f"{place}: {exchange.safety_label}, votes: {label}")
        for one, two in itertools.pairwise(rows):
            # A missing row between two leaves no transition.
            if two.turn == one.turn + 1:
                self.steps[one.turn, one.exchange.safety_label, two.exchange.safety_label] += 1
        self.sources[rows[0].source or "not said"] += 1
        return problems

    def result(self) -> dict[str, Any]:
        """Return everything as JSON values; rows and columns are in the order of LABELS."""
        turns = sorted({turn for turn, _ in self.by_turn})
        # Equal votes were counted together. The library takes a row for each unit.
        counts = (
            np.array(list(self.votes), int)
            .reshape(-1, len(VOTES))
            .repeat(list(self.votes.values()), axis=0)
        )
        return {
            "rows": self.rows,
            "labels": list(LABELS),
            "overall": [sum(self.by_turn[turn, label] for turn in turns) for label in LABELS],
            "by_turn": [
                {"turn": turn, "counts": [self.by_turn[turn, label] for label in LABELS]}
                for turn in turns
            ],
            "transitions": [
                {
                    "turn": turn,
                    "counts": [[self.steps[turn, one, two] for two in LABELS] for one in LABELS],
                }
                for turn in sorted({turn for turn, _, _ in self.steps})
            ],
            "votes": {
                "rows": len(counts),
                "alpha_nominal": alpha(counts, "nominal"),
                "alpha_ordinal": alpha(counts, "ordinal"),
                "label_differs": self.differ,
                "differing": self.differing,
            },
            "sources": dict(self.sources.most_common()),
            "rows_that_lack_rots": self.lacking_rots,
            "casual_rows_with_rots": self.casual_rots,
        }


@dataclass
class Corpus:
    """Running sums over the dialogues of a corpus; memory grows with the different RoTs alone."""

    dialogues: int = 0
    utterances: int = 0
    words: int = 0
    mtld: float = 0.0
    mtld_dialogues: int = 0
    incomplete: Counter[str] = field(default_factory=Counter)  # what is missing -> dialogues
    bad: int = 0
    quoted: list[str] = field(default_factory=list)
    rots: int = 0
    rot_words: int = 0
    different_rots: set[str] = field(default_factory=set)
    rot_dialogues: int = 0  # dialogues or parts of some that have rows
    rot_trigrams: int = 0
    different_trigrams: set[int] = field(default_factory=set)  # their hashes
    labels: Labels = field(default_factory=Labels)

    def add(self, read: Read | DataError) -> None:
        """Count a dialogue or a bad record."""
        if isinstance(read, DataError):
            self.bad += 1
            if len(self.quoted) < SHOWN:
                self.quoted.append(str(read))
            return
        if read.rows:
            for problem in self.labels.add(read.rows):
                self.add(problem)
            self.rot_dialogues += 1
            for row in read.rows:
                self._add_trigrams(row.exchange.rots)
                self.rots += len(row.exchange.rots)
                self.rot_words += sum(len(rot.split()) for rot in row.exchange.rots)
                # Their texts: 160,296 of the whole corpus fit in memory.
                self.different_rots.update(row.exchange.rots)
        if read.lacks:  # its rows count, but its length is not the corpus's
            self.incomplete[read.lacks] += 1
            return
        self.dialogues += 1
        self.utterances += len(read.utterances)
        # By white space, as the papers count.
        self.words += sum(len(text.split()) for text in read.utterances)
        diversity = mtld(words(" ".join(read.utterances)))
        if diversity is not None:
            self.mtld += diversity
            self.mtld_dialogues += 1

    def _add_trigrams(self, rots: Sequence[str]) -> None:
        for rot in rots:
            said = words(rot)
            found = list(zip(said, said[1:], said[2:], strict=False))
            self.rot_trigrams += len(found)
            # Hashes: 64 bits each, where the texts would take ten times as much memory.
            self.different_trigrams.update(map(hash, found))

    def result(self) -> dict[str, Any]:
        """Return everything as JSON values; a mean of nothing is None."""
        labelled = self.labels.rows > 0
        return {
            "dialogues": self.dialogues,
            "utterances": self.utterances,
            "average_turns": _mean(self.utterances, self.dialogues),
            "average_utterance_words": _mean(self.words, self.utterances),
            "mtld": _mean(self.mtld, self.mtld_dialogues),
            "mtld_dialogues": self.mtld_dialogues,
            "incomplete_dialogues": dict(self.incomplete),
            "bad_records": self.bad,
            "bad_records_quoted": self.quoted,
            "rots": {
                "total": self.rots,
                "unique": len(self.different_rots),
                "average_words": _mean(self.rot_words, self.rots),
                "per_dialogue": _mean(self.rots, self.rot_dialogues),
                "unique_3grams": _mean(len(self.different_trigrams), self.rot_trigrams),
            }
            if labelled
            else None,
            "safety": self.labels.result() if labelled else None,
        }


def all_transitions(safety: Mapping[str, Any]) -> np.ndarray:
    """Return how often a context labelled i came before one labelled j, at any turn: int [5, 5]."""
    return np.sum([np.zeros((5, 5), int), *(x["counts"] for x in safety["transitions"])], axis=0)


def _mean(total: float, number: int) -> float | None:
    return total / number if number else None
