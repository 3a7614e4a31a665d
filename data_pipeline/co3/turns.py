"""Read the turns "Name: utterance" in a model's answer, whatever the model writes around them.

It reads markdown, bold names, numbered turns, bullets, blank lines, and turns of several lines. A
first turn may lack its name. It drops announcements before and commentary after the conversation,
narration between turns, and stage directions. It removes quotation marks around utterances.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import unicodedata

from data_pipeline.co3 import texts
from data_pipeline.co3.speakers import label

# "10:30" is a time, and no turn of number 10.
_BULLET = re.compile(r"^(?:[-*\u2022>]\s+|\(?\d{1,2}[.):]\s*(?=\D))")
_TURN_NUMBER = re.compile(r"^turn\s+\d+\s*[:.)-]\s*", re.IGNORECASE)
# Forty characters at most: more before a colon are a sentence. "https://" is no name.
_PREFIX = re.compile(
    r"^[\[*_<]*(?P<name>[^\W\d_][\w'.\- &]{0,39}?)[\]*_>]*"
    r"\s*(?:[\(\[*][^)\]*:]{1,60}[\)\]*])?\s*[*_]{0,2}:(?!//)[*_]{0,2}\s*(?P<said>.*)$"
)
# "Scene: a church" is no turn.
_SCENE = re.compile(
    r"^\W*(?:note|notes|scene|setting|title|context|background|summary|narrator|narration|end|"
    r"conversation|dialogue|dialog|story|transcript|here|continuation|ps|moral|analysis|topic|"
    r"explanation|disclaimer|location|time|characters|participants)\b[^:]{0,30}:",
    re.IGNORECASE,
)
_DIRECTION = re.compile(r"^(?:\([^()]*\)|\[[^\[\]]*\]|\*[^*]+\*|_[^_]+_)[.!]?$")
_RULE = re.compile(r"^[\s\-=_*~#.]{2,}$|^\W*$")
_ENDING = re.compile(
    r"^\W*(?:the end|end of (?:the )?(?:conversation|dialogue|scene|transcript)|end)\W*$", re.I
)
_LEADING_ACT = re.compile(r"^(?:\([^()]{1,60}\)|\[[^\[\]]{1,60}\]|\*[^*]{1,60}\*)\s*(?=\S)")
_TRAILING_ACT = re.compile(
    r"(?<=\S)\s*(?:\([^()]{1,60}\)|\[[^\[\]]{1,60}\]|(?<=\s)\*[^*]{1,60}\*)$"
)
_STARRED = re.compile(r"(?<!\w)([*_])(?=\S)([^*_\n]+?)(?<=\S)\1(?!\w)")
_THIRD_PERSON = re.compile(r"^(?:he|she|they|both|the two|the)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Turns:
    """A conversation: `dialogue[i]` is the utterance of `speakers[i]`.

    `dropped` counts the lines left out: narration, commentary, announcements. `unprefixed` counts
    other lines without a name: the model forgot it.
    """

    speakers: tuple[str, ...] = ()
    dialogue: tuple[str, ...] = ()
    dropped: int = 0
    unprefixed: int = 0

    def __len__(self) -> int:
        return len(self.dialogue)

    def text(self) -> str:
        """Return one turn a line, "Name: utterance"."""
        pairs = zip(self.speakers, self.dialogue, strict=True)
        return "\n".join(f"{name}: {said}" for name, said in pairs)


def parse(text: str, first: str, others: tuple[str, ...] = ()) -> Turns:
    """Return the turns of an answer to a prompt that ends with "`first`:".

    `others` are the labels that are expected besides.
    """
    first, others = texts.composed(first), tuple(map(texts.composed, others))
    lines = [_unbulleted(line) for line in texts.plain(text).split("\n")]
    prefixes = [_prefix(line) for line in lines]
    # Without case, because models change it between turns.
    counts = collections.Counter(p[0].casefold() for p in prefixes if p)
    expected = {_bare(name).casefold() for name in (first, *others)}
    spoken = [p is not None and _is_speaker(p[0], counts, expected) for p in prefixes]
    last = max((i for i, yes in enumerate(spoken) if yes), default=-1)
    opener = prefixes[spoken.index(True)][0].casefold() if any(spoken) else ""
    said: list[list[str]] = []
    dropped = unprefixed = 0
    blank = False
    for position, line in enumerate(lines):
        # An emoji alone is an utterance, a row of dashes is none.
        if _RULE.match(texts.with_letters(line)):
            blank = True
            continue
        if spoken[position]:
            name, utterance = prefixes[position]
            said.append([name, utterance])
        elif _ENDING.match(line):
            dropped += 1
            break
        elif _DIRECTION.match(line) or _SCENE.match(line):
            dropped += 1
        elif not said:
            # The prompt ended with the first speaker's name, so this may be the utterance. Not if
            # it announces the conversation, or if the next line has that name again. A completion
            # begins with a space after the colon, so it is no announcement.
            goes_on = text.startswith(" ")
            if texts.is_announcement(line) or (opener == first.casefold() and not goes_on):
                dropped += 1
            else:
                said.append([first, line])
        elif blank and position > last:
            dropped += 1  # commentary after the conversation, to the end
            break
        elif _is_narration(line, {*expected, *counts}):
            dropped += 1
        elif _continues(line, lines[position - 1] if position else ""):
            said[-1][1] += f" {line}"
        else:
            said[-1][1] += f" {line}"
            # Kept for now: `dialogue` asks again for a conversation with such lines.
            unprefixed += 1
        blank = False
    turns = [(name, cleaned(utterance)) for name, utterance in said]
    turns = [(name, utterance) for name, utterance in turns if utterance]
    names = _merged([name for name, _ in turns])
    return Turns(
        speakers=tuple(names),
        dialogue=tuple(utterance for _, utterance in turns),
        dropped=dropped,
        unprefixed=unprefixed,
    )


def cleaned(utterance: str) -> str:
    """Remove stage directions at either end, emphasis, and quotation marks around the utterance."""
    utterance = " ".join(utterance.split())
    utterance = texts.unquoted(utterance)
    utterance = _LEADING_ACT.sub("", utterance)
    utterance = _TRAILING_ACT.sub("", utterance)
    if _DIRECTION.match(utterance):
        return ""
    if "*" in utterance or "_" in utterance:
        utterance = _STARRED.sub(r"\2", utterance)
    # Again, because a stage direction may have stood before the first mark.
    return texts.unquoted(utterance)


def _unbulleted(line: str) -> str:
    line = line.strip()
    line = _BULLET.sub("", line, count=1)
    return _TURN_NUMBER.sub("", line).strip()


def _bare(name: str) -> str:
    """Return a name without emoji and punctuation around it: "Leo", of an emoji and "Leo"."""
    if name.isascii():
        return name.strip(" .'-*_")
    start, end = 0, len(name)
    while start < end and not name[start].isalnum():
        start += 1
    # A mark at the end belongs to its letter.
    while end > start and not (name[end - 1].isalnum() or _is_mark(name[end - 1])):
        end -= 1
    return name[start:end]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" and not "\ufe00" <= character <= "\ufe0f"


# Cached, because each line of a conversation begins with one of few names.
@functools.lru_cache(maxsize=256)
def _name(text: str) -> str | None:
    """Return the text if it may be a speaker's name: few words, and not "Note".

    Emoji around it are no part of it.
    """
    name = _bare(text)
    words = name.split()
    # More words before a colon are a sentence.
    return name if 0 < len(words) <= 4 and not _SCENE.match(f"{name}:") else None


def _prefix(line: str) -> tuple[str, str] | None:
    match = _PREFIX.match(texts.with_letters(line))
    name = _name(line[slice(*match.span("name"))]) if match else None
    return (name, line[match.start("said") :]) if name else None


def _is_speaker(name: str, counts: collections.Counter[str], expected: set[str]) -> bool:
    """Return whether a prefix is a speaker's name; "Look at it this way: no" has none."""
    if name.casefold() in expected or label(name).casefold() in expected:
        return True
    words = name.split()
    if not any(map(_is_cased, name)):
        # A script without capitals: a sentence before a colon looks like a name, but once only.
        return counts[name.casefold()] > 1
    often = counts[name.casefold()] > 1
    capitals = all(
        word[0].isupper()
        or word.lower() in ("of", "the", "and")
        # "Agent 47" or an emoji; "Step 2" comes once.
        or (often and not word[0].islower())
        for word in words
    )
    # A lone "I" is the pronoun.
    return capitals and (often or len(words) <= 3) and words[0] != "I"


def _is_cased(character: str) -> bool:
    return character.isupper() or character.islower()


def _is_narration(line: str, names: set[str]) -> bool:
    """Return whether a line is about the speakers, in the third person and without quotes."""
    if '"' in line or line.endswith("?"):
        return False
    words = line.split()
    if words[0].strip(",'s").casefold() in names and not words[0].endswith(","):
        return not re.search(r"\b(?:I|I'm|you|my|your|we)\b", line)
    return _THIRD_PERSON.match(line) is not None and not re.search(r"\b(?:I|you|my|me)\b", line)


def _continues(line: str, before: str) -> bool:
    """Return whether a line continues the turn before: a list, or the middle of a sentence."""
    return line[0].islower() or before.endswith((",", ":", ";", "-")) or line[0] in "-\u2022"


def _merged(names: list[str]) -> list[str]:
    """Give each speaker one label: "the coach" and "COACH" are one, "Ann Lee" and "Ann" too."""
    # Two capitals are initials ("JJ").
    labels = [label(name.title() if name.isupper() and len(name) > 2 else name) for name in names]
    canonical: dict[str, str] = {}
    for name in labels:
        canonical.setdefault(name.casefold().replace(".", ""), name)
    keys = sorted(canonical, key=len)
    for key in keys:
        longer = [other for other in keys if other.startswith(f"{key} ")]
        # Two longer names leave open whose short form it is.
        if len(longer) == 1:
            canonical[longer[0]] = canonical[key]
    return [canonical[name.casefold().replace(".", "")] for name in labels]
