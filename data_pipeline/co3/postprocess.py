"""From a conversation to a row of SODA, asking nobody: filters, names, duplicates.

Kim et al. 2023, section 3.1. This part needs no model and may be run again, elsewhere, over records
that are there: after Canary has labelled them, or on a cluster (`data_pipeline.co3.beam`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import filters, namebook, names, prompts, schema
from data_pipeline.co3.schema import Record

# The filters by name, in the paper's order: what a report counts rejections under.
FILTERS = ("lexical", "turns", "speakers", "human", "canary", "moderation", "commonsense")
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made with. The defaults are the paper's, but for the moderation service.

    `canary` holds Canary's label of each record's id, where it was asked. `ask_human`,
    `ask_moderation` and `ask_commonsense` say whether the model, or the service, is asked.
    """

    seed: int = 0
    prompts: prompts.Prompts = dataclasses.field(default_factory=prompts.load)
    names: namebook.Namebook = dataclasses.field(default_factory=namebook.load)
    retries: int = 2
    wanted_turns: int = 6
    least_turns: int = 4
    most_turns: int = 20
    canary: Mapping[str, str] | None = None
    ask_human: bool = True
    ask_moderation: bool = False
    moderation_threshold: float = 0.5
    ask_commonsense: bool = True


def postprocess(record: Record, settings: Settings = Settings()) -> Record | Rejected:
    """The filters, and names replaced: what needs no model. A second time changes nothing."""
    return check(record, settings) or names.replace(record, settings.names, settings.seed)


def check(record: Record, settings: Settings = Settings()) -> Rejected | None:
    """The first filter, in the paper's order, that takes the record out; None: it stays."""
    for name, reason_of in _filters(settings):
        reason = reason_of(record)
        if reason:
            return rejection(Rejected(record.id, name, reason, {}), record)
    return None


def _filters(settings: Settings) -> Iterator[tuple[str, Callable[[Record], str | None]]]:
    least, most = settings.least_turns, settings.most_turns
    yield "lexical", filters.lexical
    yield "turns", functools.partial(filters.turn_count, least=least, most=most)
    yield "speakers", filters.speaker_count
    yield "human", functools.partial(filters.human_speakers, names=settings.names)
    yield "canary", functools.partial(filters.canary, labels=settings.canary)
    threshold = settings.moderation_threshold
    yield "moderation", functools.partial(filters.moderation, threshold=threshold)
    yield "commonsense", filters.head_event


def duplicate_key(record: Record) -> str:
    """Equal for dialogues that differ in names, case and punctuation at most."""
    people = set(" ".join((record.x, record.y, record.z, *record.speakers)).split())
    names_known = namebook.load()
    words = _WORD.findall("\n".join(record.dialogue))
    said = [word for word in words if word not in people and word not in names_known]
    text = " ".join(said).casefold()
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def first_of(records: Iterable[Record]) -> Record:
    """Of duplicates the one that stays: the first in the triples' file."""
    return min(records, key=lambda record: (record.original_index, record.id))


def duplicate(record: Record) -> Rejected:
    """The rejection of a record that says what another has said."""
    return rejection(Rejected(record.id, "dedup", "duplicate dialogue", {}), record)


def dedup(records: Iterable[Record]) -> Iterator[Record | Rejected]:
    """Exact duplicates taken out, but for names, case and punctuation; the first one stays.

    Give the records in the order of `original_index`; then it is `first_of` that stays. Holds 12
    bytes a record. Paraphrases are not found.
    """
    seen: set[bytes] = set()
    for record in records:
        key = bytes.fromhex(duplicate_key(record))
        if key in seen:
            yield duplicate(record)
        else:
            seen.add(key)
            yield record


def rejection(rejected: Rejected, record: Record) -> Rejected:
    """A rejection with all that is known of the record."""
    known = {"row": schema.soda_row(record), "provenance": schema.provenance(record)}
    return dataclasses.replace(rejected, record={**rejected.record, **known})
