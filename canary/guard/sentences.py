"""Cut a text that arrives in pieces into sentences, alike however it was cut before."""

import re

MIN_CHARS = 16  # of a sentence: "1." and "Dr." end none
# A sentence ends before a line's end, after these marks of scripts without spaces, or after . ! ?
# and what closes a quotation, before white space.
_END = re.compile(r"(?=\n)|[。！？｡][\"'”’」』）)\]]*|[.!?…]+[\"'”’»)\]*_`]*(?=\s)")  # noqa: RUF001


class Splitter:
    """Hold a text until a sentence of it is complete.

    `add` and `finish` return complete sentences, whose concatenation is the text. White space
    stands at the front of a sentence. At most `max_chars` characters make one.
    """

    def __init__(self, max_chars: int):
        self.max_chars = max_chars
        self.held = ""
        self._half = ""  # the first half of a surrogate pair, whose second half is still to come

    def add(self, text: str) -> list[str]:
        """Return the sentences that are complete with `text`."""
        text = self._half + text
        self._half = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""
        return self._sentences(text[: len(text) - len(self._half)])

    def finish(self) -> list[str]:
        """Return what is left, as sentences."""
        found = self._sentences(self._half)
        rest, self.held, self._half = self.held, "", ""
        return [*found, rest] if rest else found

    def _sentences(self, text: str) -> list[str]:
        self.held += whole(text)
        found, start = [], 0
        while (end := self._end(start)) is not None:
            found.append(self.held[start:end])
            start = end
        self.held = self.held[start:]
        return found

    def _end(self, start: int) -> int | None:
        """Return the end of the sentence that begins at `start`, None if it is not complete."""
        held, longest = self.held, start + self.max_chars
        # One character more than a sentence may have: a text of megabytes is not read to its end.
        for match in _END.finditer(held, start, longest + 1):
            end = match.end()
            # A match is certain once a character follows: more text changes nothing before it.
            if end > longest or end == len(held):
                break
            if len(held[start:end].strip()) >= MIN_CHARS:
                return end
        if len(held) <= longest:
            return None
        # Too long: cut before the last white space that has text before it.
        for place in range(longest - 1, start, -1):
            if held[place].isspace() and held[start:place].strip():
                return place
        return longest


def whole(text: str) -> str:
    """Return a text with surrogate pairs joined, and each lone half replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
