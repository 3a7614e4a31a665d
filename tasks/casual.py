"""Casual dialogue corpora as their publishers ship them, and the examples Canary learns from them.

Kim et al. 2022, section 4.1 and appendix E: DailyDialog, EmpatheticDialogues and BlendedSkillTalk
serve as dialogues about which nothing is wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cosmo.engine.base.errors import shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import TABLES, TEXTS, files_for_split, resolve, split_names
from cosmo.tasks.formatting import Example
from cosmo.tasks.raw import lines, refuse_empty, rows
from cosmo.tasks.recognize import named
from cosmo.tasks.safety import LabelStyle, label_text

_log = logging.getLogger(__name__)

END = "__eou__"
_ED_HEADER = ["conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance"]
_ED_FIELDS = (8, 9)  # selfeval and tags too; validation and test have candidates after them
_OPENERS = ("free_turker_utterance", "guided_turker_utterance")


@dataclass(frozen=True)
class CasualDialogue:
    """One dialogue of two speakers who take turns; its utterances in order."""

    id: str
    turns: tuple[str, ...]


def casual_examples(dialogue: CasualDialogue, style: LabelStyle = "text") -> Iterator[Example]:
    """Every beginning of the dialogue is casual: an example per utterance, which is then the last.

    So ParlAI's teachers read these corpora: each turn of a dialogue is an example. Both speakers'
    utterances are judged, for in these corpora nobody plays the problematic part. Ids are the
    dialogue's and the number of utterances before the last.
    """
    response = label_text("__casual__", style)
    for last in range(len(dialogue.turns)):
        turns = dialogue.turns[: last + 1]
        yield Example(f"{dialogue.id}-{last}", "", "", turns, response)


def read_dailydialog(
    path: Any, split: str = "train", detokenized: bool = True
) -> Iterator[CasualDialogue]:
    """The DailyDialog dialogues of `split` under `path`. Li et al. 2017.

    A line is a dialogue, each utterance ended by `__eou__`. `path` is a file (`dialogues_text.txt`
    serves every split), or the unpacked folder with `dialogues_train.txt`, `train/
    dialogues_train.txt` or `train.txt`, and so on. Unless `detokenized` is False, the corpus's
    spaces before punctuation go: Canary would else learn that they mean casual. Ids are
    `dailydialog-SPLIT-N`. Raises DataError for a missing path and for the first bad line.
    """
    clean = detokenize if detokenized else str
    yield from _numbered("dailydialog", split, dailydialog_files(path, split), "DailyDialog", clean)


def read_empathetic(path: Any, split: str = "train") -> Iterator[CasualDialogue]:
    """The EmpatheticDialogues dialogues of `split` under `path` (`train.csv` ...).

    Rashkin et al. 2019. The file is not quoted: fields lie between commas, and a comma inside a
    text is `_comma_`. Rows of one `conv_id` in `utterance_idx` order, from 1, are a dialogue; one
    that lacks its first or a middle utterance is not used, and a warning counts these. Ids are
    `empathetic-SPLIT-N`, N counting all dialogues. Raises DataError for a missing path and for
    the first bad row.
    """
    files = files_for_split(path, split, TABLES)
    yield from _numbered("empathetic", split, files, "EmpatheticDialogues", str)


def read_blended(path: Any, split: str = "train") -> Iterator[CasualDialogue]:
    """The BlendedSkillTalk dialogues of `split` under `path` (`train.json` ...).

    Smith et al. 2020. The two openers, which come from another corpus, are the first two
    utterances. Ids are `blended-SPLIT-N`. Raises DataError for a missing path and for the first
    bad record.
    """
    files = files_for_split(path, split)
    yield from _numbered("blended", split, files, "BlendedSkillTalk", str)


def dailydialog_files(path: Any, split: str) -> list[Any]:
    """The files of `split`; see `read_dailydialog`. Raises DataError where there is none."""
    if isinstance(path, str) or hasattr(path, "is_dir"):
        place = resolve(path)
        if place.is_dir():
            for name in split_names(split):
                for folder in (place, place / name):
                    if (folder / f"dialogues_{name}.txt").exists():
                        return [folder / f"dialogues_{name}.txt"]
            if (place / "dialogues_text.txt").exists():
                return files_for_split(place / "dialogues_text.txt", split, TEXTS)
    return files_for_split(path, split, TEXTS)


# White space before a closing mark and after an opening one, and an apostrophe left alone inside
# a contraction or a possessive. The rest of the tokenization cannot be undone without guessing.
_CLOSING = re.compile(r"\s+([,.!?;:%)\]…]+)(?=\s|$)")
_OPENING = re.compile(r"(?<!\S)([($\[])\s+")
_CONTRACTED = re.compile(r"(\w) (['\u2019]) ?(s|t|m|d|re|ve|ll|am)\b", re.I)


def detokenize(text: str) -> str:
    """`text` without the spaces that DailyDialog's tokenization put around punctuation."""
    text = _CONTRACTED.sub(r"\1\2\3", text)
    return _OPENING.sub(r"\1", _CLOSING.sub(r"\1", text))


def _numbered(
    name: str, split: str, files: Sequence[Any], corpus: str, clean: Callable[[str], str]
) -> Iterator[CasualDialogue]:
    """The dialogues of `files` with their ids; None from a reader counts and is not used."""
    count = 0
    for file in files:
        unusable = 0
        with named(file, corpus):
            for turns in _READERS[name](file):
                if turns is None:
                    unusable += 1
                else:
                    yield CasualDialogue(f"{name}-{split}-{count}", tuple(map(clean, turns)))
                count += 1
        if unusable:
            _log.warning(
                "%s: %d incomplete dialogues are not used (their first or a middle utterance is "
                "missing)",
                file,
                unusable,
            )
    refuse_empty(files, count)


def _dailydialog(file: Any) -> Iterator[list[str] | None]:
    for number, line in lines(file):
        if not line.strip():
            continue
        yield dailydialog_turns(line, Place(str(file), number))


def dailydialog_turns(line: str, place: Place) -> list[str]:
    """The utterances of a line of DailyDialog, as tokenized. Raises DataError."""
    *turns, rest = line.split(END)
    if not turns or rest.strip():
        raise place.error(
            "not a line of DailyDialog", shown(line.strip()), f"utterances each ended by {END}"
        )
    return _utterances(turns, place)


def _empathetic(file: Any) -> Iterator[list[str] | None]:
    conversation, turns, whole = None, [], True
    for number, line in lines(file):
        place = Place(str(file), number)
        if number == 1:
            if line.rstrip("\r\n").split(",")[: len(_ED_HEADER)] != _ED_HEADER:
                raise place.error(
                    "not EmpatheticDialogues' header",
                    shown(line.strip()),
                    ",".join(_ED_HEADER) + ",...",
                )
            continue
        if not line.strip():
            continue
        name, index, text = empathetic_utterance(line, place)
        if name != conversation:
            if turns:
                yield turns if whole else None
            conversation, turns, whole = name, [], True
        whole &= index == len(turns) + 1
        turns.append(text)
    if turns:
        yield turns if whole else None


def empathetic_utterance(line: str, place: Place) -> tuple[str, int, str]:
    """(conv_id, utterance_idx, utterance) of a row of EmpatheticDialogues. Raises DataError."""
    fields = line.rstrip("\r\n").split(",")
    if len(fields) not in _ED_FIELDS:
        raise place.error(
            "a row with a wrong number of fields", str(len(fields)), "8, or 9 with candidates"
        )
    if not fields[1].strip().isdigit():
        raise place.error("field 'utterance_idx' is no number", shown(fields[1]), "1, 2, ...")
    text = fields[5].replace("_comma_", ",").strip()
    if not text:
        raise place.error("field 'utterance' is empty", shown(fields[5]), "a text")
    return fields[0], int(fields[1]), text


def _blended(file: Any) -> Iterator[list[str] | None]:
    for place, row in rows(file, ()):
        yield blended_turns(row, place)


def blended_turns(row: Any, place: Place) -> list[str]:
    """The utterances of a dialogue of BlendedSkillTalk, its openers first. Raises DataError."""
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
    return _utterances([*(row[name] for name in _OPENERS), *(t for _, t in turns)], place)


def _utterances(texts: Sequence[Any], place: Place) -> list[str]:
    """The utterances, stripped. Raises DataError for one that is empty or no text."""
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise place.error(f"utterance {number} is empty or no text", shown(text), "a text")
    return [text.strip() for text in texts]


_READERS = {"dailydialog": _dailydialog, "empathetic": _empathetic, "blended": _blended}
