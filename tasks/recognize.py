"""Recognise the corpus that a file holds, for the error about a file of another corpus."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import columns_of, is_columnar

HEAD_BYTES = 1 << 16  # looked at: the first records, or a part of the first

PROSOCIAL = ("ProsocialDialog", "ProsocialDialog (direct download)")
NORM_BANK = (
    "Commonsense Norm Bank",
    "Commonsense Norm Bank (relative)",
    "Commonsense Norm Bank (text to text)",
)

# (corpus, names of fields in its first records). The first line whose fields are all there counts,
# so a more special format stands before the one that it contains.
_FIELDS = (
    ("SODA", "narrative dialogue speakers"),
    (PROSOCIAL[0], "context response rots safety_label"),
    (PROSOCIAL[1], "text labels rots safety_label"),
    ("ToxiChat", "reddit_thread"),
    ("BlendedSkillTalk", "free_turker_utterance guided_turker_utterance"),
    ("BlendedSkillTalk as the Hugging Face hub has it", "free_messages guided_messages"),
    ("Wizard of Wikipedia", "chosen_topic dialog"),
    ("Topical-Chat", "content message agent"),
    ("Holl-E", "chat_id query response"),
    ("Holl-E", "chat_id chat spans"),
    ("ATOMIC-10X with names", "head relation tail x_relations"),
    ("ATOMIC-10X", "head relation tail p_valid_model"),
    ("ATOMIC-10X", "head relation tail rec_0.5"),
    ("ATOMIC-2020 triples", "head relation tail"),
    ("EmpatheticDialogues", "conv_id utterance_idx prompt"),
    ("SBIC", "post targetMinority offensiveYN"),
    ("Social Chemistry 101", "rot situation rot-agree"),
    ("MIC", "Q A rot"),
    (NORM_BANK[0], "input_sequence class_label text_label"),
    (NORM_BANK[1], "action_1 action_2 targets"),
    (NORM_BANK[2], "inputs targets"),
    ('records {"turns": [...]}', "turns"),
)


def looks_like(file: Any) -> str | None:
    """Return the name of the corpus that `file` (a path) seems to hold, None if it is unknown.

    The names of fields in the first 64 KiB decide, or the marks of DailyDialog and PersonaChat. For
    a Parquet or Arrow file the columns decide. A file that cannot be read is unknown.
    """
    place = resolve(file)
    try:
        if is_columnar(place):
            return _of_fields(set(columns_of(place)))
        text = _head(place)
    except Exception:  # the caller has an error to report already
        return None
    start = text.lstrip()
    # No JSON parser, because the head may end inside the first record.
    if start.startswith(("{", "[")):
        return _of_fields(set(re.findall(r'"([\w.-]+)"\s*:', text)))
    first_line = start.partition("\n")[0]
    if "__eou__" in first_line:
        return "DailyDialog"
    # PersonaChat numbers the lines of each dialogue from 1.
    if re.match(r"1 (your persona: |partner's persona: |[^\t\n]+\t)", first_line):
        return "PersonaChat"
    # csv writers may quote the names.
    header = set(re.split(r"[,\t]", first_line.replace('"', "").strip()))
    # "turns" marks JSON records alone, and is a common word.
    return _of_fields(header) if "turns" not in header else None


@contextlib.contextmanager
def naming_other_corpus(file: Any, *expected: str) -> Iterator[None]:
    """Add to a DataError raised inside that `file` looks like another corpus, if it does.

    `expected` are the names by which `looks_like` knows the right corpus.
    """
    try:
        yield
    except DataError as error:
        found = looks_like(file)
        if found is None or found in expected:
            raise
        text = f"{file} looks like {found}, not like {expected[0]}. {error.message}"
        raise DataError(text, setting=error.settings) from None


def _of_fields(fields: set[str]) -> str | None:
    for corpus, needed in _FIELDS:
        if fields.issuperset(needed.split()):
            return corpus
    return None


def _head(file: Any) -> str:
    with files.opened(file) as stream:
        # Errors are ignored, because the cut may fall inside a character.
        return stream.read(HEAD_BYTES).decode("utf-8-sig", errors="ignore")
