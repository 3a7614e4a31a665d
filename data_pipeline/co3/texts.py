"""Clean a model's text: quotes, markdown, preambles; recognise refusals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# The stages' patterns know straight marks alone. A fullwidth colon ends a speaker's name too.
_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201f": '"'}
    | {"\u00a0": " ", "\u200b": "", "\ufeff": "", "\u2028": "\n", "\uff1a": ":"}
)
_NO_LETTER = re.compile(r"[\W_]+")  # in ASCII
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_HEADING = re.compile(r"^\s*#{1,6}\s+", re.MULTILINE)
_REFUSAL = re.compile(
    r"^(?:i'?m (?:really |very |so )?sorry,? (?:but )?(?:i|as)\b.{0,40}"
    r"(?:can'?t|cannot|can not|unable|won'?t|not able|an ai)"
    r"|(?:sorry, )?(?:but )?i (?:can'?t|cannot|am unable to|'m unable to|won'?t) (?:\w+ )?"
    r"(?:help|assist|fulfil|fulfill|create|generate|write|comply|provide|continue|do that|engage)"
    r"|as an? (?:ai|artificial|large)\b)",
    re.IGNORECASE | re.DOTALL,
)
_AFFIRMATION = re.compile(
    r"^(?:sure|certainly|of course|absolutely|okay|ok|great|yes|no problem)\b[^\n]{0,80}[:!.]\s*$",
    re.IGNORECASE,
)
_ANNOUNCEMENT = re.compile(
    r"^(?:[^\n]{0,40}\b)?(?:here(?:'s| is| are| goes)|the following|below is)\b[^\n]{0,120}:\s*$"
    r"|^(?:rewritten )?(?:story|narrative|version|rewrite|conversation|dialogue)\s*:\s*$",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^(?:sure|certainly|of course|absolutely|okay)[!,.]\s+here(?:'s| is)[^\n:]{0,100}:\s+"
    r"|^here(?:'s| is) (?:the|a|your)[^\n:]{0,80}(?:story|version|narrative)[^\n:]{0,40}:\s+"
    r"|^(?:rewritten )?(?:story|narrative|version|rewrite)\s*:\s+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Return the text composed (NFC), with straight quotes and without markdown; lines stay."""
    text = composed(text).translate(_QUOTES).replace("\r\n", "\n").replace("\r", "\n")
    # Most texts have none of these marks, and looking for one letter is fast.
    if "`" in text:
        text = _FENCE.sub("", text)
    if "#" in text:
        text = _HEADING.sub("", text)
    if "**" in text or "__" in text:
        text = _EMPHASIS.sub(r"\2", text)
    return text.strip()


def is_refusal(text: str) -> bool:
    """Return whether the model declines instead of answering."""
    return _REFUSAL.match(plain(text)) is not None


def is_announcement(line: str) -> bool:
    """Return whether a line announces the answer: "Sure! Here is the conversation:"."""
    return _ANNOUNCEMENT.match(line.strip()) is not None


def is_preamble(line: str) -> bool:
    """Return whether a line stands before the answer: an announcement, or "Certainly!"."""
    # "Certainly!" alone is left out here only: as a turn it is an answer.
    return is_announcement(line) or _AFFIRMATION.match(line.strip()) is not None


def paragraph(text: str) -> str:
    """Return the text as one paragraph, without announcements before it or quotes around it."""
    lines = [line.strip() for line in plain(text).split("\n")]
    while lines and (not lines[0] or is_preamble(lines[0])):
        lines.pop(0)
    # After joining, because the announcement may stand on the story's own line.
    text = _OPENING.sub("", " ".join(line for line in lines if line))
    return unquoted(" ".join(text.split()))


def unquoted(text: str) -> str:
    """Remove quotation marks around the whole text, or a single one without a partner."""
    text = text.strip()
    # Its partner was cut off, or stood in another line.
    if text.count('"') == 1:
        return text.strip('"').strip()
    # With marks inside, the outer two may belong to different quotations.
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        return text[1:-1].strip()
    return text


def composed(text: str) -> str:
    """Return the text in Unicode's composed form (NFC): one spelling of each accented letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def same(text: str) -> str:
    """Return letters, marks, digits and emoji alone, so that two texts can be compared."""
    if text.isascii():
        return _NO_LETTER.sub("", text.casefold())
    return composed(text.casefold()).translate(_COMPARED)


def words(text: str) -> list[str]:
    """Return the runs of letters, marks, digits and emoji of a text, in their order."""
    if text.isascii():
        return [word for word in _NO_LETTER.split(text) if word]
    return composed(text).translate(_SPACED).split()


def with_letters(text: str) -> str:
    """Return the text with a letter for each mark and emoji: a pattern of words finds them.

    It has the same length, so that a match in it shows the place in the text.
    """
    return text if text.isascii() else text.translate(_LETTERED)


def _counts(character: str) -> bool:
    """Return whether a character makes a difference between two utterances."""
    category = unicodedata.category(character)
    if category[0] in "LN" or category in ("So", "Sc"):
        return True
    # Skin tones are modifier symbols. Variation selectors only choose a picture.
    return (category == "Sk" and character > "\U0001f000") or (
        category[0] == "M" and not "\ufe00" <= character <= "\ufe0f"
    )


# Filled on demand, because Unicode has a million codes and a text some dozens.
class _Table(dict):
    """A table for `str.translate` that is filled with the characters that it meets."""

    def __init__(self, replaced: Callable[[str], str]):
        super().__init__()
        self._replaced = replaced

    def __missing__(self, code: int) -> str:
        self[code] = found = self._replaced(chr(code))
        return found


_COMPARED = _Table(lambda character: character if _counts(character) else "")
_SPACED = _Table(lambda character: character if _counts(character) else " ")
# Joiners and variation selectors stand within a letter's or an emoji's picture.
_LETTERED = _Table(
    lambda character: (
        "a"
        if unicodedata.category(character) in ("Mn", "Mc", "Me", "So", "Cf")
        or (unicodedata.category(character) == "Sk" and character > "\U0001f000")
        else character
    )
)
