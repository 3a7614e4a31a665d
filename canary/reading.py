"""Read dialogues from the files that Canary labels: find a file's corpus, parse its records.

A record that cannot be used becomes `record_sources.Rejected` with the reason; reading continues.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from canary import pieces
from cosmo.engine.base import files, json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import record_sources
from cosmo.tasks import conversations, dialogues, readers, recognize, record_files
from cosmo.tasks.dialogues import Place

log = logging.getLogger("canary")

# The first records may be broken: up to 50 lines are tried, and of each a MiB.
MAX_LINES, MAX_LINE_BYTES = 50, 1 << 20  # read to find out a file's corpus
# SODA's files have more columns. Parquet stores each apart, so the others are not read.
PARQUET_COLUMNS = ("narrative", "dialogue", "speakers")
EXPECTED = (
    "SODA rows or {turns} records (JSON lines; SODA in Parquet and Arrow too), "
    "ProsocialDialog rows or its direct download, or DailyDialog's text"
)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """An id and its turns, oldest first: at least one, none of them empty."""

    id: str
    turns: tuple[str, ...]


Items = list[Dialogue | record_sources.Rejected]


def equal_ids_warner() -> Callable[[Sequence[Dialogue]], None]:
    """Return a function of dialogues that warns, once, if some have the id of another one."""
    warned = False

    def warn(dialogues: Sequence[Dialogue]) -> None:
        nonlocal warned
        again = len(dialogues) - len({dialogue.id for dialogue in dialogues})
        # Ids are compared within a window, because those of a whole file may not fit in memory.
        # Once, because every window of such a file would repeat it.
        if again and not warned:
            warned = True
            log.warning(
                "%d of %d dialogues read together have the id of another one: their lines can be "
                "told apart by their order only",
                again,
                len(dialogues),
            )

    return warn


@dataclasses.dataclass(frozen=True)
class Format:
    """A corpus's file format: `cut` yields pieces of a file, `read` parses one piece.

    `read(piece, its number, path, whole)` returns a dialogue for each context of a dialogue, or
    with `whole` the whole dialogue once.
    """

    name: str
    cut: record_sources.Cut
    read: Callable[[record_sources.Piece, int, str, bool], Items]


def source(path: str, *, whole: bool = False) -> record_sources.Source:
    """Return the dialogues of a file, for `bulk.answer_source`.

    A file of ProsocialDialog has a dialogue for each row: all turns up to the row's `context`. With
    `whole` each dialogue comes once. Raises UserError for a file that cannot be read, or is of no
    corpus in FORMATS.
    """
    with record_sources.open_input(path, text=False) as file:
        columnar = file.read(len(files.ARROW_FILE)).startswith(record_files.COLUMNAR)
    # By its name too: the first bytes of a damaged file may be gone.
    if columnar or path.lower().endswith((".parquet", ".arrow")):
        return _columnar_source(path)
    found = recognise(path)
    return record_sources.file_source(
        path,
        lambda piece, number: found.read(piece, number, path, whole),
        expected=EXPECTED,
        # A run that continues must read the same records: contexts, or whole dialogues.
        identity={"corpus": found.name, "whole": whole},
        cut=found.cut,
    )


def recognise(path: str) -> Format:
    """Return the format of a file, by its first records; UserError if it is none of FORMATS."""
    with record_sources.open_input(path) as file:
        blank = True  # an empty file gets an error of its own
        for _ in range(MAX_LINES):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                break
            # One bad byte must not hide the corpus; the record with it is rejected later.
            text = line.decode("utf-8-sig", errors="replace").strip()
            blank &= not text
            # The direct download alone is a JSON list.
            if text.startswith("[") and _is_download(path):
                return FORMATS["prosocial_download"]
            # A JSON record may quote DailyDialog's mark.
            if conversations.END in text and not text.startswith("{"):
                return FORMATS["dailydialog"]
            name = _of_object(text)
            if name is not None:
                return FORMATS[name]
    if blank:
        raise UserError(f"{path} has no dialogues; give {EXPECTED}", setting="input")
    name = recognize.looks_like(path)
    found = f"looks like {name}" if name else "is of no corpus known here"
    raise UserError(f"{path} {found}; give {EXPECTED}", setting="input")


def _of_object(text: str) -> str | None:
    try:
        row = json_lines.value(text)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    # First, because such records may keep fields of the corpus that they come from.
    if "turns" in row:
        return "turns"
    if "dialogue" in row:
        return "soda"
    return "prosocial" if {"context", "response", "dialogue_id"} <= row.keys() else None


def _is_download(path: str) -> bool:
    with record_sources.open_input(path) as file:
        # One element, because the file may be of any size.
        first = next(pieces.elements(file), None)
    try:
        dialogue = json_lines.value(b"".join(first.lines)) if first else None
        return isinstance(dialogue, list) and {"text", "labels"} <= dialogue[0].keys()
    except (ValueError, LookupError, AttributeError):
        return False


def _one(read: Callable[[Any, Place, str], Dialogue]) -> Callable:
    """Return a `Format.read` for pieces of one record: it rejects what `read` refuses."""

    def items(piece: record_sources.Piece, number: int, path: str, whole: bool) -> Items:
        (data,) = piece.lines
        if not data.strip():
            return []
        place = Place(path, piece.line + 1)
        try:
            return [read(data, place, str(number))]
        except ValueError as error:
            return [_rejected(error, place, piece.lines)]

    return items


def _rejected(error: Exception, place: Place, kept: Sequence[bytes]) -> record_sources.Rejected:
    # A reject has file and line already.
    reason = str(error).removeprefix(f"{place.file}:{place.line}: ")
    return record_sources.Rejected(place.line, reason, record_sources.text_of(kept))


def _soda(data: bytes, place: Place, number: str) -> Dialogue:
    return Dialogue(number, readers.soda_dialogue(json_lines.value(data), place, number).dialogue)


def _soda_row(row: Any, place: Place, number: int) -> Dialogue | record_sources.Rejected:
    try:
        return Dialogue(str(number), readers.soda_dialogue(row, place, str(number)).dialogue)
    except ValueError as error:
        return _rejected(error, place, [json_lines.line(row)])


def _columnar_source(path: str) -> record_sources.Source:
    """Return the dialogues of SODA in Parquet or Arrow; UserError for any other file."""
    try:
        with record_sources.open_input(path, text=False) as file:
            # A checksum of the bytes as stored: a run continues over the same file only.
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            found = record_files.open_columnar(path, file)
    except record_files.DAMAGED as error:
        # A DataError is a ValueError, and so among DAMAGED; it names the cause itself.
        if isinstance(error, UserError):
            raise
        text = f"{path} is no whole Parquet or Arrow file: {error}"
        raise UserError(text, setting="input") from error
    sizes, kind = found.sizes, found.kind
    if not set(PARQUET_COLUMNS) <= set(found.names):
        raise UserError(
            f"{path} has the columns {sorted(found.names)}; of {kind} files those of SODA are read "
            f"({', '.join(PARQUET_COLUMNS)}): give other corpora as JSON lines",
            setting="input",
        )
    if not sum(sizes):
        raise UserError(f"{path} is empty", setting="input")

    def rows(file: Any, start: int) -> Iterator[Dialogue | record_sources.Rejected]:
        """Yield an item for each row from `start` on; rows of a damaged part are rejected."""
        # Opened anew for each start, because an Arrow stream is read forward only.
        blocks = record_files.open_columnar(path, file)
        end = 0
        for block, size in enumerate(sizes):
            number, end = end, end + size
            if end <= start:  # skipped unread
                continue
            try:
                for row in blocks.rows(block, list(PARQUET_COLUMNS)):
                    if number >= start:
                        yield _soda_row(row, Place(path, number + 1), number)
                    number += 1
            except record_files.DAMAGED as error:
                reason = f"the {kind} file is damaged here: {' '.join(str(error).split())}"
                # Lost rows keep their numbers, so that the ids of later rows do not move.
                for lost in range(max(number, start), end):
                    # Without its text, which cannot be read.
                    yield record_sources.Rejected(lost + 1, reason, "")

    logged = record_sources.rejects_logger(path)

    def items(spans: Sequence[record_sources.Span]) -> Iterator[list[Any]]:
        with record_sources.open_input(path, text=False) as file:
            # No span begins at -1, so the first one opens the rows.
            position, following = -1, iter(())
            for span in spans:
                if span.start != position:
                    file.seek(0)
                    following = rows(file, span.start)
                position = span.stop
                yield list(logged(list(itertools.islice(following, span.stop - span.start))))

    return record_sources.Source(path, sum(sizes), {"rows": sum(sizes), "sha256": digest}, items)


def _turns(data: bytes, place: Place, number: str) -> Dialogue:
    record = json_lines.value(data)
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, expected an object {{turns}}")
    name = record.get("id")
    # Ids may be numbers in JSON.
    return Dialogue(number if name is None else str(name), checked(record.get("turns")))


def checked(turns: Any) -> tuple[str, ...]:
    """Return turns without white space around them; ValueError names the first unusable one."""
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError("field 'turns': expected a list of at least one utterance")
    for place, turn in enumerate(turns):
        if not isinstance(turn, str):
            raise ValueError(f"turn {place + 1}: got {type(turn).__name__}, expected a string")
        if not turn.strip():
            raise ValueError(f"turn {place + 1} is empty: every turn needs a text")
        if not json_lines.is_whole(turn):
            raise ValueError(f"turn {place + 1} is not valid text (half a character)")
    return tuple(turn.strip() for turn in turns)


def _daily(data: bytes, place: Place, number: str) -> Dialogue:
    try:
        turns = conversations.dailydialog_turns(data.decode("utf-8-sig"), place)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    # Spaces before punctuation go, as in training: Canary would take them for a mark of small talk.
    return Dialogue(number, tuple(map(conversations.detokenize, turns)))


def _prosocial(piece: record_sources.Piece, number: int, path: str, whole: bool) -> Items:
    """Read hub rows of one dialogue: a row is usable if all rows before it are there."""

    def rows() -> Iterator[tuple[Place, list[bytes], Callable]]:
        for offset, data in enumerate(piece.lines):
            if data.strip():
                yield (
                    Place(path, piece.line + offset + 1),
                    [data],
                    lambda data=data: json_lines.value(data),
                )

    def turn(row: Any, place: Place, expected: int) -> tuple[str, str, dialogues.ProsocialTurn]:
        dialogue, response, _ = readers.row_position(row, place)
        if response != expected:
            raise place.error(
                "its dialogue's rows before it are missing",
                f"response_id {response}",
                f"response_id {expected}",
            )
        return str(dialogue), str(response), readers.prosocial_turn(row, place)

    return _contexts(rows(), turn, whole)


def _download(piece: record_sources.Piece, number: int, path: str, whole: bool) -> Items:
    """Read a dialogue of the direct download, whose id is its number, because it has no other."""
    place = Place(path, piece.line + 1)
    try:
        dialogue = json_lines.value(b"".join(piece.lines))
        if not isinstance(dialogue, list) or not dialogue:
            raise ValueError("expected a dialogue: a list of at least one row")
    except ValueError as error:
        return [_rejected(error, place, piece.lines)]

    def rows() -> Iterator[tuple[Place, list[bytes], Callable]]:
        for row_number, row in enumerate(dialogue, start=1):
            here = Place(path, piece.line + 1, f"row {row_number}")
            # A reject needs the row's own text, which was cut from the file with all of the
            # dialogue.
            yield here, [json_lines.line(row)], lambda row=row: row

    def turn(row: Any, place: Place, expected: int) -> tuple[str, str, dialogues.ProsocialTurn]:
        return str(number), str(expected), readers.direct_download_turn(row, place)

    return _contexts(rows(), turn, whole)


def _contexts(rows: Iterator, turn: Callable, whole: bool) -> Items:
    """Return a dialogue for each row, or one; a row that cannot be used ends the dialogue."""
    items: Items = []
    turns: tuple[str, ...] = ()
    name, count, broken = "", 0, False
    for place, kept, read in rows:
        try:
            # Every context holds all turns before it, so one bad row spoils the later ones.
            if broken:
                raise ValueError("a row before it in its dialogue cannot be used")
            name, response, found = turn(read(), place, count)
        except ValueError as error:
            broken = True
            items.append(_rejected(error, place, kept))
            continue
        if not whole:
            items.append(Dialogue(f"{name}-{response}", (*turns, found.context)))
        turns += (found.context, found.response)
        count += 1
    # A damaged dialogue still gives its usable beginning.
    return [Dialogue(name, turns), *items] if whole and turns else items


FORMATS = {
    found.name: found
    for found in (
        Format("soda", record_sources.by_line, _one(_soda)),
        Format("turns", record_sources.by_line, _one(_turns)),
        Format("dailydialog", record_sources.by_line, _one(_daily)),
        Format("prosocial", pieces.dialogues, _prosocial),
        Format("prosocial_download", pieces.elements, _download),
    )
}
