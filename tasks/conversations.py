"""Read seven corpora of conversations as their publishers ship them: the one reader of each.

DailyDialog, EmpatheticDialogues, BlendedSkillTalk, Topical-Chat, PersonaChat (ConvAI2), Wizard of
Wikipedia and Holl-E. The lines before the first utterance, personas and topics, are kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.dialogues import Place, utterances
from cosmo.tasks.files import (
    TABLES,
    TEXTS,
    files_for_split,
    resolve,
    split_file,
)
from cosmo.tasks.recognize import naming_other_corpus
from cosmo.tasks.record_files import (
    read_entries,
    read_lines,
    read_records,
    read_separated,
    refuse_empty,
)

_log = logging.getLogger(__name__)

END = "__eou__"
SILENCE = "__SILENCE__"  # ParlAI's mark of an opening that nobody spoke
PERSONAS = ("your persona:", "partner's persona:")
WIZARD = "wizard_of_wikipedia"  # BlendedSkillTalk's name of the corpus whose contexts have a topic
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
class Conversation:
    """One dialogue of two speakers who take turns; its utterances in order.

    `context` are the lines before the first utterance: personas, a topic. `respondent` is the
    index of the first utterance of the speaker whom these lines describe or inform: that speaker's
    turns are `turns[respondent::2]`.
    """

    id: str
    turns: tuple[str, ...]
    context: tuple[str, ...] = ()
    respondent: int = 1


def read_dailydialog(
    path: Any, split: str = "train", detokenized: bool = True
) -> Iterator[Conversation]:
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
    yield from _conversations("dailydialog", path, split, files, "DailyDialog", _dailydialog, clean)


def read_empathetic(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the EmpatheticDialogues dialogues of `split` under `path`. Rashkin et al. 2019.

    The file (`train.csv` ...) is not quoted: fields are between commas, and a comma inside a text
    is `_comma_`. Rows that a csv writer has quoted are read too. Rows of one `conv_id` in
    `utterance_idx` order, from 1, are a dialogue. One that lacks its first or a middle utterance is
    not used, and a warning counts these. Ids are `empathetic-SPLIT-N`, N counting all dialogues.
    Raises DataError for a missing path and for the first bad row.
    """
    files = files_for_split(path, split, TABLES)
    yield from _conversations("empathetic", path, split, files, "EmpatheticDialogues", _empathetic)


def read_blended(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the BlendedSkillTalk dialogues of `split` under `path`. Smith et al. 2020.

    The two openers of a record (`train.json` ...), which are from another corpus, are the first two
    utterances. The context is the guided speaker's persona, and the topic where the openers are
    from Wizard of Wikipedia. Ids are `blended-SPLIT-N`. Raises DataError for a missing path and for
    the first bad record.
    """
    files = files_for_split(path, split)
    yield from _conversations("blended", path, split, files, "BlendedSkillTalk", _blended)


def read_topical_chat(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the Topical-Chat dialogues of `split` under `path`. Gopalakrishnan et al. 2019.

    A file is one JSON object of all its conversations. `path` is the unpacked repository, its
    folder `conversations` (`train.json`, `valid_freq.json` ...) or as in `files_for_split`. Ids are
    `topical-SPLIT-N`. Raises DataError for a missing path and for the first bad conversation.
    """
    files = topical_chat_files(path, split)
    yield from _conversations("topical", path, split, files, "Topical-Chat", _topical_chat)


def read_persona_chat(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the PersonaChat dialogues of `split` under `path`. Zhang et al. 2018, ConvAI2's form.

    Lines are numbered from 1 within a dialogue: personas, then two utterances between tabs, the
    second the respondent's. `__SILENCE__` is no utterance: the respondent begins. Ids are
    `persona-SPLIT-N`. A dialogue that lacks a line is not used, and a warning counts these. Raises
    DataError for a missing path and for the first bad line.
    """
    files = persona_chat_files(path, split)
    yield from _conversations("persona", path, split, files, "PersonaChat", _persona_chat)


def read_wizard(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the Wizard of Wikipedia dialogues of `split` under `path`. Dinan et al. 2019.

    The respondent is the wizard, and the context is the topic. Passages are left out. Ids are
    `wizard-SPLIT-N`. Raises DataError for a missing path and for the first bad record.
    """
    files = wizard_files(path, split)
    yield from _conversations("wizard", path, split, files, "Wizard of Wikipedia", _wizard)


def read_holle(path: Any, split: str = "train") -> Iterator[Conversation]:
    """Yield the Holl-E dialogues of `split` under `path`. Moghe et al. 2018.

    The publishers' `train_data.json` comes in two forms. In `main_data` a record is a whole `chat`.
    In `raw_data`, which ParlAI reads (`raw_train_data.json`), it is a query and its response. Those
    of one `chat_id` in a row are a dialogue there, or their `chat` is. Documents are left out. Ids
    are `holle-SPLIT-N`. The corpus was not at hand: the forms are those that its documentation and
    script describe. Raises DataError for a missing path and for the first bad record.
    """
    stems = ("{split}_data", "raw_{split}_data")
    files = split_file(path, split, stems) or files_for_split(path, split)
    yield from _conversations("holle", path, split, files, "Holl-E", _holle)


def read_dailydialog_emotions(
    path: Any, split: str = "train"
) -> Iterator[tuple[Conversation, tuple[int, ...]]]:
    """Yield each DailyDialog dialogue of `split` with the emotion of each utterance, 0 to 6.

    0 is none; then anger, disgust, fear, happiness, sadness, surprise. They stand in
    `dialogues_emotion.txt`, or `dialogues_emotion_SPLIT.txt` beside the split's dialogues. Raises
    DataError for a missing file, and where emotions and utterances do not match.
    """
    dialogues = dailydialog_files(path, split)
    for file in dialogues:
        place = resolve(file)
        name = place.name.replace("dialogues_", "dialogues_emotion_", 1)
        beside = place.with_name(name.replace("emotion_text.", "emotion.", 1))
        if name == place.name or not beside.exists():
            raise DataError.at(
                file, None, "no file of emotions beside it", got=place.name,
                expected="dialogues_emotion.txt, or dialogues_emotion_SPLIT.txt beside "
                "dialogues_SPLIT.txt", remedy="Unpack the publisher's archive.",
            )  # fmt: skip
        lines = ((number, line) for number, line in read_lines(beside) if line.strip())
        emotions = (_emotions(line, Place(str(beside), number)) for number, line in lines)
        found = read_dailydialog(file, split)
        for one, given in itertools.zip_longest(found, emotions):
            if one is None or given is None or len(one.turns) != len(given):
                raise DataError.at(
                    beside, None, "emotions that do not match the utterances",
                    got=f"{given} for {one.id if one else 'no dialogue'}",
                    expected="a line for each dialogue, a number for each utterance",
                    remedy="Take both files from one archive.",
                )  # fmt: skip
            yield one, given


def _emotions(line: str, place: Place) -> tuple[int, ...]:
    numbers = line.split()
    if not all(re.fullmatch("[0-6]", number) for number in numbers):
        raise place.error("not a line of emotions", shown(line.strip()), "numbers from 0 to 6")
    return tuple(map(int, numbers))


def dailydialog_files(path: Any, split: str) -> list[Any]:
    """Return the files of `split`, see `read_dailydialog`; raise DataError if there is none."""
    # The published archive has a folder for each split, and copies have none.
    if found := split_file(path, split, ("dialogues_{split}",), TEXTS, ("", "{split}")):
        return found
    # One file of all splits, of which `files_for_split` warns.
    whole = split_file(path, split, ("dialogues_text",), TEXTS)
    return files_for_split(whole[0] if whole else path, split, TEXTS)


def topical_chat_files(path: Any, split: str) -> list[Any]:
    """Return the files of `split`: of validation and test those of frequent entities.

    Give a path with `{split}` or a mapping for the rare ones. Raises DataError if there is none.
    """
    folders = ("", "conversations")
    return split_file(path, split, ("{split}_freq", "{split}"), folders=folders) or files_for_split(
        path, split
    )


def wizard_files(path: Any, split: str) -> list[Any]:
    """Return the files of `split`: of validation and test those of topics seen in training.

    Give a path with `{split}` or a mapping for the unseen ones. Raises DataError if there is none.
    """
    return split_file(path, split, ("{split}_random_split", "{split}")) or files_for_split(
        path, split
    )


def persona_chat_files(path: Any, split: str) -> list[Any]:
    """Return the files of `split`: of a folder those with the respondent's original persona.

    ConvAI2's test split was never published, so that validation serves as test, as in ParlAI.
    Raises DataError if there is none.
    """
    stems = ("{split}_self_original", "{split}_self_original_no_cands")
    for name in (split, *(("validation",) if split == "test" else ())):
        if found := split_file(path, name, stems, TEXTS):
            return found
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


def _conversations(
    name: str,
    path: Any,
    split: str,
    files: Sequence[Any],
    corpus: str,
    read_file: Callable[[Any], Iterator[Conversation | None]],
    clean: Callable[[str], str] = str,
) -> Iterator[Conversation]:
    """Yield the dialogues of `files` with ids. `read_file` yields None for an unusable one."""
    count = 0
    for file in files:
        unusable = 0
        with naming_other_corpus(file, corpus):
            for read in read_file(file):
                if read is None:
                    unusable += 1
                else:
                    turns = tuple(map(clean, read.turns))
                    yield dataclasses.replace(read, id=f"{name}-{split}-{count}", turns=turns)
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


def _dailydialog(file: Any) -> Iterator[Conversation]:
    for number, line in read_lines(file):
        if line.strip():
            yield Conversation("", dailydialog_turns(line, Place(str(file), number)))


def dailydialog_turns(line: str, place: Place) -> tuple[str, ...]:
    """Return the utterances of a line of DailyDialog, as tokenized; raise DataError."""
    *turns, rest = line.split(END)
    if not turns or rest.strip():
        raise place.error(
            "not a line of DailyDialog", shown(line.strip()), f"utterances each ended by {END}"
        )
    return utterances(turns, place)


def _empathetic(file: Any) -> Iterator[Conversation | None]:
    parsed = (empathetic_utterance(fields, place) for place, fields in empathetic_rows(file))
    # Consecutive rows alone, so that one dialogue at a time is in memory.
    for _, rows in itertools.groupby(parsed, key=lambda row: row[0]):
        _, numbers, turns = zip(*rows, strict=True)
        yield Conversation("", turns) if numbered_from_1(numbers) else None


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


def _blended(file: Any) -> Iterator[Conversation]:
    for place, row in read_records(file):
        yield blended_conversation(row, place)


def blended_conversation(row: Any, place: Place) -> Conversation:
    """Return a record of BlendedSkillTalk as a Conversation, its openers first.

    Raises DataError.
    """
    _check_fields(row, (*_OPENERS, "dialog"), place)
    turns = row["dialog"]
    shaped = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and turn[0] in (0, 1) for turn in turns
    )
    if not shaped:
        raise place.error(
            "field 'dialog' has a wrong shape", shown(turns), "a list of [0 or 1, text]"
        )
    context = [f"{PERSONAS[0]} {line}" for line in _guided_persona(row.get("personas"), place)]
    topic = row.get("additional_context")
    # As in ParlAI: the situation of an empathetic dialogue is known to neither speaker.
    if row.get("context_dataset") == WIZARD and topic:
        context.extend(utterances([topic], place))
    spoken = utterances([*(row[name] for name in _OPENERS), *(t for _, t in turns)], place)
    return Conversation("", spoken, tuple(context))


def _guided_persona(personas: Any, place: Place) -> tuple[str, ...]:
    """Return the persona lines of the guided speaker, none if the record has no personas."""
    if not personas:
        return ()
    if not isinstance(personas, list) or len(personas) != 2:
        raise place.error(
            "field 'personas' has a wrong shape", shown(personas), "a list of lines per speaker"
        )
    return utterances(personas[1], place)


def _topical_chat(file: Any) -> Iterator[Conversation]:
    for place, entry in read_entries(file):
        yield topical_conversation(entry, place)


def topical_conversation(entry: Any, place: Place) -> Conversation:
    """Return an entry of Topical-Chat as a Conversation, without what its speakers read.

    Raises DataError.
    """
    return Conversation("", _texts_of(entry, "content", "message", place))


def _holle(file: Any) -> Iterator[Conversation]:
    parsed = (holle_record(row, place) for place, row in read_records(file))
    for _, group in itertools.groupby(parsed, key=lambda one: one[0]):
        yield Conversation("", holle_turns(list(group)))


def holle_record(row: Any, place: Place) -> tuple[str, tuple[str, ...], bool]:
    """Return (chat_id, utterances, whether they are the whole chat) of a record of Holl-E.

    Without the whole chat they are a query and its response. Raises DataError.
    """
    whole = isinstance(row, dict) and "chat" in row
    names = ("chat",) if whole else ("query", "response")
    _check_fields(row, ("chat_id", *names), place)
    given = row["chat"] if whole else [row["query"], row["response"]]
    if not isinstance(given, list):
        raise place.error("field 'chat' has a wrong shape", shown(given), "a list of texts")
    return str(row["chat_id"]), tuple(utterances(given, place)), whole


def holle_turns(records: Sequence[tuple[str, tuple[str, ...], bool]]) -> tuple[str, ...]:
    """Return the utterances of a dialogue's records, made by `holle_record`.

    A query that repeats the response before it is one utterance.
    """
    turns: list[str] = []
    for _, said, whole in records:
        if whole:
            return said
        query, response = said
        if not turns or turns[-1] != query:
            turns.append(query)
        turns.append(response)
    return tuple(turns)


def _wizard(file: Any) -> Iterator[Conversation]:
    for place, row in read_records(file):
        yield wizard_conversation(row, place)


def wizard_conversation(row: Any, place: Place) -> Conversation:
    """Return a record of Wizard of Wikipedia as a Conversation; raise DataError."""
    turns = _texts_of(row, "dialog", "text", place)
    _check_fields(row, ("chosen_topic",), place)
    speaker = row["dialog"][0].get("speaker")
    if not isinstance(speaker, str) or not speaker.endswith(("Wizard", "Apprentice")):
        raise place.error(
            "field 'speaker' of utterance 1 names no speaker",
            shown(speaker),
            "0_Wizard, 1_Apprentice or the like",
        )
    topic = utterances([row["chosen_topic"]], place)
    return Conversation("", turns, topic, 0 if speaker.endswith("Wizard") else 1)


def _persona_chat(file: Any) -> Iterator[Conversation | None]:
    numbered = read_lines(file)
    lines = (persona_line(text, Place(str(file), n)) for n, text in numbered if text.strip())
    for group in group_persona_lines(lines):
        whole = numbered_from_1([line.number for line in group])
        yield persona_conversation(group) if whole else None


@dataclass(frozen=True)
class PersonaLine:
    """A line of PersonaChat: its number in the dialogue, and a persona or up to two utterances."""

    place: Place
    number: int
    texts: tuple[str, ...]


def persona_line(text: str, place: Place) -> PersonaLine:
    """Return a line of PersonaChat; raise DataError if it has no number."""
    number, _, rest = text.strip().partition(" ")
    # At most 9 digits, because Python refuses to convert thousands of them.
    if not re.fullmatch("[0-9]{1,9}", number):
        raise place.error("not a numbered line", shown(text.strip()), "a number and a text")
    # ParlAI's lines have a reward and candidate answers after the two utterances. A newline inside
    # a text is written as a backslash and n.
    texts = (part.replace("\\n", "\n").strip() for part in rest.split("\t")[:2])
    return PersonaLine(place, int(number), tuple(texts))


def group_persona_lines(lines: Iterable[PersonaLine]) -> Iterator[list[PersonaLine]]:
    """Yield the consecutive lines of each dialogue; one begins where the number does not rise."""
    group: list[PersonaLine] = []
    for line in lines:
        # Nothing but the number separates two dialogues.
        if group and line.number <= group[-1].number:
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def persona_conversation(lines: Sequence[PersonaLine]) -> Conversation:
    """Return the lines of a dialogue as a Conversation; raise DataError."""
    context, turns, respondent = [], [], 1
    for line in lines:
        is_persona = line.texts[0].startswith(PERSONAS)
        if is_persona and not turns:
            context.append(line.texts[0])
            continue
        first, *second = line.texts
        # Only an opening may be silent, because the speakers take turns.
        if first == SILENCE and not turns:
            respondent, spoken = 0, second
        # Only the last line may lack its answer.
        elif second in ([], [""]) and line is lines[-1]:
            spoken = [first]
        else:
            spoken = [first, *(second or [""])]
        if is_persona or SILENCE in spoken or "" in spoken:
            raise line.place.error(
                "an exchange lacks an utterance",
                shown("\t".join(line.texts)),
                "two utterances between tabs",
            )
        turns.extend(spoken)
    return Conversation("", utterances(turns, lines[0].place), tuple(context), respondent)


def numbered_from_1(numbers: Sequence[int]) -> bool:
    """Return whether the numbers are 1, 2, ... without a hole."""
    return list(numbers) == list(range(1, len(numbers) + 1))


def _check_fields(row: Any, names: Sequence[str], place: Place) -> None:
    if not isinstance(row, dict):
        raise place.error("not a dialogue", shown(row), f"an object with the field '{names[-1]}'")
    for name in names:
        if name not in row:
            raise place.error(f"field '{name}' is missing", f"the fields {sorted(row)}", "it")


def _texts_of(row: Any, field: str, name: str, place: Place) -> tuple[str, ...]:
    """Return the texts `name` of the list of objects `field`; raise DataError."""
    _check_fields(row, (field,), place)
    turns = row[field]
    spoken = isinstance(turns, list) and all(isinstance(t, dict) and name in t for t in turns)
    if not spoken:
        raise place.error(
            f"field '{field}' has a wrong shape",
            shown(turns),
            f"a list of objects with the field '{name}'",
        )
    return utterances([turn[name] for turn in turns], place)
