"""Turn tokens into text as they come: no half of a character, nothing past a stop string."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from cosmo.engine.base import byte_level_bpe
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.tasks import prost_text
from cosmo.tasks.vocabularies import RESPONSE_MARK, ROT_MARK, ByteLevelVocabulary

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a whole character


class Piece(NamedTuple):
    """The bytes of a token's piece, and their text."""

    text: str
    data: bytes


def piece(vocabulary: Any, id: int) -> Piece:
    """Return a token as it stands in the vocabulary, with the space at a word's start."""
    if isinstance(vocabulary, ByteLevelVocabulary):
        spare = len(vocabulary.bpe.spare_ids)
        if vocabulary.unk_id < id < vocabulary.size - spare:
            symbols = byte_level_bpe.SYMBOLS
            data = bytes(symbols.index(symbol) for symbol in vocabulary.bpe.pieces[id])
            return Piece(data.decode("utf-8", "replace"), data)
    elif id < vocabulary.size and not vocabulary.processor.is_control(id):
        name = vocabulary.processor.id_to_piece(id)
        if vocabulary.processor.is_byte(id):
            data = bytes([int(name.removeprefix("<0x").removesuffix(">"), 16)])
            return Piece(data.decode("utf-8", "replace"), data)
        if not vocabulary.processor.is_unknown(id):
            text = name.replace("▁", " ")
            return Piece(text, text.encode())
    # The end of a text, padding: no text. A mark or an unknown token decodes as words.
    text = vocabulary.decode([id])
    return Piece(text, text.encode())


class Writer:
    """The text of an answer while its tokens come.

    `add` and `finish` return what may be shown now. All that they return, joined, is
    `vocabulary.decode` of all tokens, cut before the first of `stops`. Held back are the bytes of a
    character that is not whole, and text that may be the beginning of a stop string.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()):
        self.vocabulary, self.stops = vocabulary, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False  # whether a stop string came
        self.shown = ""
        self.length = 0  # of the text of all tokens, without a character that is not whole

    def text(self) -> str:
        """Return the text of all tokens so far."""
        return self.vocabulary.decode(self.ids)

    def add(self, id: int) -> str:
        """Add a token; return the text that it lets show."""
        if self.stopped:
            return ""
        self.ids.append(id)
        # The whole text each time: a token's text depends on its neighbours, and answers are short.
        text = self.text().rstrip(_REPLACEMENT)
        self.length = len(text)
        return self._show(text, whole=False)

    def finish(self) -> str:
        """Return what was held back: no token follows."""
        return "" if self.stopped else self._show(self.text(), whole=True)

    def _show(self, text: str, whole: bool) -> str:
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            end = min(places)
        else:
            end = len(text) if whole else len(text) - self._held(text)
        if end <= len(self.shown):
            return ""
        new, self.shown = text[len(self.shown) : end], text[:end]
        return new

    def _held(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        most = max(map(len, self.stops), default=1) - 1
        ends = range(min(most, len(text)), 0, -1)
        return next((n for n in ends if any(s.startswith(text[-n:]) for s in self.stops)), 0)


class ProstWriter(Writer):
    """The response of an answer of Prost's that writes its rules of thumb (RoTs) first.

    Nothing shows before the RoTs end. An answer that begins with no RoTs is all response.
    """

    def __init__(self, vocabulary: ByteLevelVocabulary, stops: Sequence[str] = ()):
        super().__init__(vocabulary, stops)
        self._rot, self._response = (vocabulary.marks[m] for m in (ROT_MARK, RESPONSE_MARK))

    def rots(self) -> tuple[str, ...] | None:
        """Return the RoTs; None while they may be incomplete."""
        if not self.ids or (self.ids[0] == self._rot and self._response not in self.ids):
            return None
        if self.ids[0] != self._rot:
            return ()
        return prost_text.split_answer(self.vocabulary.decode(self.ids)).rots

    def text(self) -> str:
        """Return the response so far, "" while the RoTs are being written."""
        ids = self.ids
        if ids and ids[0] == self._rot:
            if self._response not in ids:
                return ""
            ids = ids[ids.index(self._response) + 1 :]
        # Marks in a response are no text: it is cut there.
        marks = [place for place, id in enumerate(ids) if id in (self._rot, self._response)]
        return self.vocabulary.decode(ids[: marks[0]] if marks else ids)


@dataclasses.dataclass
class TokenLog:
    """The entries of tokens that wait until their text is shown.

    `starts` are the places in the text where they begin.
    """

    entries: list[Any] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)

    def add(self, start: int, entry: Any) -> None:
        """Add a token's entry."""
        self.starts.append(start)
        self.entries.append(entry)

    def take(self, end: int | None) -> list[Any]:
        """Remove and return the entries of tokens that begin before `end`; None takes all."""
        count = len(self.starts)
        if end is not None:
            count = next((n for n, start in enumerate(self.starts) if start >= end), count)
        taken, self.entries = self.entries[:count], self.entries[count:]
        self.starts = self.starts[count:]
        return taken
