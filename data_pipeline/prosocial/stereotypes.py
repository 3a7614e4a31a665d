"""Make rules of thumb of SBIC's stereotypes: "It's wrong to think " and a clause with a subject.

Kim et al. 2022, footnote 2: "Asians are not suitable for Hollywood movies" becomes "It's wrong to
think Asians are not suitable for Hollywood movies". Annotators leave the subject out too ("rape
women", "are stupid"): then the minority group is put in front.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OPENING = "It's wrong to think "
# A stereotype that begins so has no subject, and one with such a word after it has one.
_FINITE_WORDS = (
    "are is was were aren't isn't can can't cannot should shouldn't must will won't would do don't "
    "does doesn't have has had deserve"
)
_FINITE = frozenset(_FINITE_WORDS.split())
_OPENING_WORDS = (
    "all most many some every no any these those the a an people everyone someone only it there "
    "its their his her being not having"
)
_DETERMINERS = frozenset(_OPENING_WORDS.split())


def rule(stereotype: str, group: str) -> str:
    """Return the rule of thumb of a stereotype about a minority group, "" if it is empty."""
    text = " ".join(stereotype.split()).rstrip(" .!?,;")
    group = " ".join(group.split()).strip(" ,")
    words = text.split()
    if not any(character.isalpha() for character in text):
        return ""
    first = words[0].lower()
    if first in ("they", "them") and len(words) > 1 and group:
        # "they" names nobody outside its post.
        text = f"{group} {' '.join(words[1:])}"
    elif group and not _has_subject(words, group):
        text = f"{group} {text}"
    if words[0].lower() in _DETERMINERS and text.split()[0] == words[0]:
        text = text[0].lower() + text[1:]
    return OPENING + text


def rules(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return the different rules of (stereotype, group) pairs, in order."""
    made: dict[str, str] = {}
    for stereotype, group in pairs:
        if text := rule(stereotype, group):
            made.setdefault(text.lower(), text)
    return list(made.values())


def _has_subject(words: list[str], group: str) -> bool:
    first = re.sub(r"\W+$", "", words[0].lower())
    if first in _FINITE:
        return False
    if first in _DETERMINERS:
        return first not in ("not", "being", "having")
    # "blacks" and "black men" mean "black folks", and "woman" is "women".
    stems = {_stem(word) for word in group.split() if len(word) > 2}
    if _stem(first) in stems:
        return True
    # A finite verb after one to three words has them as its subject.
    return any(word.lower() in _FINITE for word in words[1:4])


def _stem(word: str) -> str:
    word = word.lower().removesuffix("'s").rstrip("s")
    return f"{word[:-2]}an" if word.endswith("men") else word
