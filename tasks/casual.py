"""Read casual dialogue corpora as their publishers ship them, and make Canary's examples of them.

Kim et al. 2022, section 4.1 and appendix E: DailyDialog, EmpatheticDialogues and BlendedSkillTalk
serve as dialogues about which nothing is wrong.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cosmo.engine.base.errors import shown
from cosmo.tasks.dialogues import Place, utterances
from cosmo.tasks.files import TABLES, TEXTS, files_for_split, resolve, split_names
from cosmo.tasks.formatting import Example
from cosmo.tasks.recognize import naming_other_corpus
from cosmo.tasks.record_files import read_lines, read_records, read_separated, refuse_empty
from cosmo.tasks.safety import LabelStyle, label_text

_log = logging.getLogger(__name__)

END = "__eou__"
# selfeval and tags too; validation and test have candidates after them.
_EMPATHETIC_FIELD_COUNTS = (8, 9)
# Column: (its pattern, the same in words).
_EMPATHETIC_KINDS = {
    "conv_id": (re.compile(r"[^\s\"]+"), "one word"),
    "utterance_idx": (re.compile(r"[0-9]{1,4}"), "a number (1, 2, ...)"),
    "context": (re.compile(r"[A-Za-z]+"), "one word"),
    "prompt": (re.compile(r".*", re.DOTALL), "a text"),
    "speaker_idx": (re.compile(r"[0-9]{1,9}"), "a number"),
    "utterance": (re.compile(r".+", re.DOTALL), "a text"),
    "selfeval": (re.compile(r"([0-9_]+(\|[0-9_]+)+)?"), "ratings (5|5|5_2|2|5)"),
    # No ratings: these would be of a row that was cut at a comma before them.
    "tags": (re.compile(r"(?![0-9_]+\|).*", re.DOTALL), "tags"),
}
# Up to the last column that is read.
_EMPATHETIC_HEADER = list(_EMPATHETIC_KINDS)[:6]
# The first two utterances: `dialog` begins after them.
_OPENERS = ("free_turker_utterance", "guided_turker_utterance")


@dataclass(frozen=True)
class CasualDialogue:
    """One dialogue of two speakers who take turns; its utterances in order."""

    id: str
    turns: tuple[str, ...]


def casual_examples(dialogue: CasualDialogue, style: LabelStyle = "text") -> Iterator[Example]:
    """Yield an example per utterance: the dialogue up to it, and the label "casual".

    Ids are the dialogue's and the number of utterances before the last.
    """
    response = label_text("__casual__", style)
    # Every turn ends an example, as in ParlAI's teachers of these corpora. Both speakers are
    # judged, because in these corpora nobody plays the problematic part.
    for last in range(len(dialogue.turns)):
        turns = dialogue.turns[: last + 1]
        yield Example(f"{dialogue.id}-{last}", "", "", turns, response)


def read_dailydialog(
    path: Any, split: str = "train", detokenized: bool = True
) -> Iterator[CasualDialogue]:
    """Yield the DailyDialog dialogues of `split` under `path`. Li et al. 2017.

    A line is a dialogue, each utterance ended by `__eou__`. `path` is a file (`dialogues_text.txt`
    serves every split), or the unpacked folder with `dialogues_train.txt`, `train/
    dialogues_train.txt` or `train.txt`, and so on. Ids are `dailydialog-SPLIT-N`. Raises DataError
    for a missing path and for the first bad line.
    """
    # The corpus has spaces before punctuation, and the other casual corpora do not. Canary would
    # else learn that they mean casual.
    clean = detokenize if detokenized else str
    files = dailydialog_files(path, split)
    yield from _dialogues("dailydialog", path, split, files, "DailyDialog", _dailydialog, clean)


def read_empathetic(path: Any, split: str = "train") -> Iterator[CasualDialogue]:
    """Yield the EmpatheticDialogues dialogues of `split` under `path`. Rashkin et al. 2019.

    The file (`train.csv` ...) is not quoted: fields are between commas, and a comma inside a text
    is `_comma_`. Rows that a csv writer has quoted are read too. Rows of one `conv_id` in
    `utterance_idx` order, from 1, are a dialogue. One that lacks its first or a middle utterance is
    not used, and a warning counts these. Ids are `empathetic-SPLIT-N`, N counting all dialogues.
    Raises DataError for a missing path and for the first bad row.
    """
    files = files_for_split(path, split, TABLES)
    yield from _dialogues("empathetic", path, split, files, "EmpatheticDialogues", _empathetic)


def read_blended(path: Any, split: str = "train") -> Iterator[CasualDialogue]:
    """Yield the BlendedSkillTalk dialogues of `split` under `path`. Smith et al. 2020.

    The two openers of a record (`train.json` ...), which are from another corpus, are the first two
    utterances. Ids are `blended-SPLIT-N`. Raises DataError for a missing path and for the first bad
    record.
    """
    files = files_for_split(path, split)
    yield from _dialogues("blended", path, split, files, "BlendedSkillTalk", _blended)


def dailydialog_files(path: Any, split: str) -> list[Any]:
    """Return the files of `split`, see `read_dailydialog`; raise DataError if there is none."""
    if isinstance(path, str) or hasattr(path, "is_dir"):
        place = resolve(path)
        if place.is_dir():
            for name in split_names(split):
                # The published archive has a folder for each split, and copies have none.
                for folder in (place, place / name):
                    if (folder / f"dialogues_{name}.txt").exists():
                        return [folder / f"dialogues_{name}.txt"]
            if (place / "dialogues_text.txt").exists():
                return files_for_split(place / "dialogues_text.txt", split, TEXTS)
    return files_for_split(path, split, TEXTS)


# White space before a closing mark and after an opening one, and an apostrophe left alone inside
# a contraction or a possessive. Undoing the rest of the tokenization would be guessing.
_CLOSING = re.compile(r"\s+([,.!?;:%)\]…]+)(?=\s|$)")
_OPENING = re.compile(r"(?<!\S)([($\[])\s+")
_CONTRACTED = re.compile(r"(\w) (['\u2019]) ?(s|t|m|d|re|ve|ll|am)\b", re.I)


def detokenize(text: str) -> str:
    """Return `text` without the spaces that DailyDialog's tokenization put around punctuation."""
    text = _CONTRACTED.sub(r"\1\2\3", text)
    return _OPENING.sub(r"\1", _CLOSING.sub(r"\1", text))


def _dialogues(
    name: str,
    path: Any,
    split: str,
    files: Sequence[Any],
    corpus: str,
    read_turns: Callable[[Any], Iterator[tuple[str, ...] | None]],
    clean: Callable[[str], str] = str,
) -> Iterator[CasualDialogue]:
    """Yield the dialogues of `files` with ids. `read_turns` yields None for an unusable one."""
    count = 0
    for file in files:
        unusable = 0
        with naming_other_corpus(file, corpus):
            for turns in read_turns(file):
                if turns is None:
                    unusable += 1
                else:
                    yield CasualDialogue(f"{name}-{split}-{count}", tuple(map(clean, turns)))
                # Unusable ones count too, so that no id depends on them.
                count += 1
        if unusable:
            _log.warning(
                "%s: %d incomplete dialogues are not used (their first or a middle utterance is "
                "missing)",
                file,
                unusable,
            )
    refuse_empty(path, split, count)


def _dailydialog(file: Any) -> Iterator[tuple[str, ...] | None]:
    for number, line in read_lines(file):
        if line.strip():
            yield dailydialog_turns(line, Place(str(file), number))


def dailydialog_turns(line: str, place: Place) -> tuple[str, ...]:
    """Return the utterances of a line of DailyDialog, as tokenized; raise DataError."""
    *turns, rest = line.split(END)
    if not turns or rest.strip():
        raise place.error(
            "not a line of DailyDialog", shown(line.strip()), f"utterances each ended by {END}"
        )
    return utterances(turns, place)


def _empathetic(file: Any) -> Iterator[tuple[str, ...] | None]:
    parsed = (empathetic_utterance(fields, place) for place, fields in empathetic_rows(file))
    # Consecutive rows alone, so that one dialogue at a time is in memory.
    for _, rows in itertools.groupby(parsed, key=lambda row: row[0]):
        _, numbers, turns = zip(*rows, strict=True)
        yield turns if numbers == tuple(range(1, len(turns) + 1)) else None


def empathetic_rows(file: Any) -> Iterator[tuple[Place, list[str]]]:
    """Yield (place, fields) for each row of EmpatheticDialogues; DataError for another header."""
    # Raw first, as it is published: a quote there is a character of the text.
    rows = read_separated(file, ",", lambda fields, _: _empathetic_fault(fields) is None, False)
    for number, (place, fields) in enumerate(rows):
        if number:
            yield place, fields
        elif fields[: len(_EMPATHETIC_HEADER)] != _EMPATHETIC_HEADER:
            raise place.error(
                "not EmpatheticDialogues' header",
                shown(",".join(fields)),
                ",".join(_EMPATHETIC_HEADER) + ",...",
            )


def empathetic_utterance(fields: Sequence[str], place: Place) -> tuple[str, int, str]:
    """Return (conv_id, utterance_idx, utterance) of a row of EmpatheticDialogues.

    Raises DataError if the fields are not of their columns' kinds.
    """
    fault = _empathetic_fault(fields)
    if fault is not None:
        raise place.error(*fault)
    return fields[0].strip(), int(fields[1]), fields[5].replace("_comma_", ",").strip()


def _empathetic_fault(fields: Sequence[str]) -> tuple[str, str, str] | None:
    """Return (problem, value, rule) of the first field that is not of its column's kind."""
    if len(fields) not in _EMPATHETIC_FIELD_COUNTS:
        return "a row with a wrong number of fields", str(len(fields)), "8, or 9 with candidates"
    # All columns count, because a row that was cut at a comma shows only in those after the cut.
    # Not strict, because the ninth field (candidates) has no kind.
    for (name, (pattern, rule)), value in zip(_EMPATHETIC_KINDS.items(), fields, strict=False):
        if not pattern.fullmatch(value.strip()):
            problem = f"is not {rule}" if value.strip() else "is empty"
            return f"field '{name}' {problem}", shown(value), rule
    return None


def _blended(file: Any) -> Iterator[tuple[str, ...] | None]:
    for place, row in read_records(file):
        yield blended_turns(row, place)


def blended_turns(row: Any, place: Place) -> tuple[str, ...]:
    """Return the utterances of a dialogue of BlendedSkillTalk, its openers first.

    Raises DataError.
    """
    if not isinstance(row, dict):
        raise place.error("not a dialogue", shown(row), "an object with the field 'dialog'")
    for name in (*_OPENERS, "dialog"):
        if name not in row:
            raise place.error(f"field '{name}' is missing", f"the fields {sorted(row)}", "it")
    turns = row["dialog"]
    spoken = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and turn[0] in (0, 1) for turn in turns
    )
    if not spoken:
        raise place.error(
            "field 'dialog' has a wrong shape", shown(turns), "a list of [0 or 1, text]"
        )
    return utterances([*(row[name] for name in _OPENERS), *(t for _, t in turns)], place)
