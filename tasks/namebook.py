"""Draw given names: for the persons of a triple, as replacements, for ProsocialDialog's speakers.

The head of `names.tsv` gives their source. Kim et al. 2023 take the 1,000 most common for triples
(section 2.3) and for ProsocialDialog (appendix C), and 10,000 as replacements (section 3.1). They
do not give how names are drawn. Here triples draw by count, and the other two draw all alike. Names
that are words too ("Will") are never drawn.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import random
from collections.abc import Set
from pathlib import Path

from cosmo.engine.base.draws import fraction_bits

DEFAULT = Path(__file__).with_name("names.tsv")
COMMON = 1000


@dataclasses.dataclass(frozen=True)
class Namebook:
    """Names, the commonest first, with the number of people who have each."""

    names: tuple[str, ...] = dataclasses.field(repr=False)
    counts: tuple[int, ...] = dataclasses.field(repr=False)
    words: frozenset[str] = dataclasses.field(repr=False)  # names that are words or places too

    def __contains__(self, name: str) -> bool:
        return name in self._known

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        # A set, because every capitalised word of a corpus is looked up.
        return frozenset(self.names)

    @functools.cached_property
    def _given(self) -> list[tuple[str, int]]:
        """Return the names that are not words, with their counts."""
        pairs = zip(self.names, self.counts, strict=True)
        return [(name, count) for name, count in pairs if name not in self.words]

    @functools.cached_property
    def common(self) -> tuple[str, ...]:
        """Return the 1,000 most common names that are not words, the most common first."""
        # Words are left out before the cut, so that there are 1,000 names to draw from.
        return tuple(name for name, _ in self._given[:COMMON])

    @functools.cached_property
    def _sums(self) -> list[int]:
        return list(itertools.accumulate(count for _, count in self._given[:COMMON]))

    def people(self, record_id: str, seed: int, count: int = 3) -> tuple[str, ...]:
        """Draw different names for a triple's persons, by count; the same for the same id."""
        # The purpose is hashed too, so that persons and replacements are independent draws.
        generator = random.Random(fraction_bits(seed, "people", record_id))
        sums = self._sums
        chosen: list[str] = []
        while len(chosen) < count:
            name, _ = self._given[bisect.bisect_right(sums, generator.randrange(sums[-1]))]
            # Two persons of one name would become one.
            if name not in chosen:
                chosen.append(name)
        return tuple(chosen)

    def replacements(self, record_id: str, seed: int, count: int, avoid: Set[str]) -> list[str]:
        """Draw `count` different names that are not in `avoid`, each equally likely."""
        generator = random.Random(fraction_bits(seed, "replace", record_id))
        chosen: list[str] = []
        while len(chosen) < count:
            # Only random() keeps its sequence in all versions of Python.
            name, _ = self._given[int(generator.random() * len(self._given))]
            if name not in avoid and name not in chosen:
                chosen.append(name)
        return chosen


# Cached, because every record's key for duplicates asks for the list.
@functools.lru_cache(maxsize=4)
def load(path: str | Path = DEFAULT) -> Namebook:
    """Read names from a file: lines "name<TAB>count", "<TAB>word" after those that are words.

    Raises:
        ValueError: a line is of another form (file and line number), or there are too few names.
    """
    names, counts, words = [], [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#") or not line:
            continue
        name, count, *word = [*line.split("\t"), ""]
        if not name or not count.isdigit() or word[0] not in ("", "word"):
            raise ValueError(f"{path}:{number}: wanted name<TAB>count, got {line[:60]!r}")
        names.append(name)
        counts.append(int(count))
        if word[0]:
            words.append(name)
    # `replacements` draws until it has enough new names, which a short list may not have.
    if len(names) < 100:
        raise ValueError(f"{path}: {len(names)} names; a hundred at least are needed")
    return Namebook(tuple(names), tuple(counts), frozenset(words))
