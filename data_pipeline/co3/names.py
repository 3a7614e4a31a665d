"""Replace every name in a dialogue, so that each name of the list is equally common.

Kim et al. 2023, section 3.1, "Name Bias Mitigation". One name is one other name throughout
narrative, conversation, speakers and persons; which one depends on the record's id and the seed.

Names are the persons of the triple, speakers on the list of names, and capitalised words of that
list. Some names are words or places too ("Will", "Grace", "May", "Paris"). They are replaced only
for a person of the triple or a speaker, or if the text shows it ("my friend Grace", "I asked
Will"). Even then other uses stay: "Will you come?", "in May", "Grace under pressure". A name within
a longer word is none ("Annapolis", "Jean-Luc").
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

from cosmo.tasks.namebook import Namebook
from data_pipeline.co3.schema import Record
from data_pipeline.co3.texts import with_letters

# A capitalised word, with the apostrophe of "James' car"; what may not stand before it is looked
# at after its first letter, which lets the search jump from capital to capital.
_CAPITALISED = re.compile(
    r"(?P<name>[A-Z](?<![\w@#./-].)(?<!\w[-'].)[^\W\d_]+)(?!\w)(?!-\w)(?P<s>(?<=s)'(?=\s[a-z]))?"
)
_INTRODUCED = re.compile(
    r"\b(?:named|called|name is|name's|friend|brother|sister|cousin|[Uu]ncle|[Aa]unt|Mr\.?|Mrs\.?"
    r"|Ms\.?|Miss|son|daughter|husband|wife|boyfriend|girlfriend|roommate|coworker|neighbor)"
    r" ([A-Z][a-z]+)(?!\w)(?! [A-Z])"
)
# Before a word at the start of a sentence: nothing, a stop, a quotation mark, a bracket.
_SENTENCE_START = re.compile(r"(?:^|[.!?:;\u2026\n\0]|[\"'(\[*-])\s*$")
# The text after a name that opens a sentence.
_AFTER_NAME = re.compile(
    r"'s\b|[,!?.:]|\s*[\n\0]|$|\sand [A-Z]|\s(?:who|is|was|has|had|said|just|never|always|also|told"
    r"|really|didn't|doesn't|isn't|wasn't|can't|won't|can|could|will|would|might|decided|felt|went"
    r"|took|made|came|knew|saw|thought|got|gave|[a-z]{2,}(?:ed|[^s\W]s))\b"
)
# Months, places and common nouns: "in May", "a Grace period".
_BEFORE_OTHER = re.compile(
    r"\b(?:in|near|last|next|this|of|until|since|by|during|early|late|every|a|an|the|from) $",
    re.IGNORECASE,
)
_AFTER_OTHER = re.compile(r"\s\d")
_IN_SENTENCE = re.compile(r"(?:\b[a-z']+|,|(?:^|[.!?\n\0]\s*)[A-Z][a-z]+) $")
_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_PERSONS = frozenset(_LISTS["names"]["persons"].split())
_ROLES = frozenset(_LISTS["speakers"]["human"].split())  # "King", "Baker": who, not what name
_LABEL_WORD = re.compile(r"(?<![\w-])[^\W\d_]+(?![\w-])")
_BREAK = "\n\0\n"  # between texts, when all are looked through at once


def replace(record: Record, names: Namebook, seed: int) -> Record:
    """Return the record with other names; unchanged if it was renamed before or has no name."""
    # A second renaming would draw other names, because the draw depends on the names found.
    if record.renamed:
        return record
    persons = [name for name in (record.x, record.y, record.z) if name]
    speakers = list(dict.fromkeys(record.speakers))
    texts = (record.literal, record.narrative, record.interlocutor, *record.dialogue)
    everything = _BREAK.join(texts)
    certain = {word for person in persons for word in person.split()}
    for speaker in speakers:
        certain.update(
            word
            for word in _LABEL_WORD.findall(speaker)
            if word in names and (word in _PERSONS or word.lower() not in _ROLES)
        )
    capitalised = {match["name"] for match in _CAPITALISED.finditer(everything)}
    introduced = set()
    if not capitalised.isdisjoint(names.words):
        introduced = {name for name in _INTRODUCED.findall(everything) if name in names}
    if not capitalised.isdisjoint(_PERSONS):
        introduced |= {m["name"] for m in _CAPITALISED.finditer(everything) if _is_evident(m)}
    found = {word for word in capitalised if word in names and word not in names.words}
    found |= certain | introduced
    if not found:
        return dataclasses.replace(record, renamed=True)
    # Sorted, because the order of a set differs between processes.
    old = sorted(found)
    # No new name may be in the text already, else two persons become one.
    given = names.replacements(record.id, seed, len(old), avoid=found | capitalised)
    mapping = dict(zip(old, given, strict=True))
    unsure = {name for name in old if name in names.words}

    def another(match: re.Match[str]) -> str:
        name = match["name"]
        new = mapping.get(name)
        # "EMILY" is shouted; two capitals are more often initials.
        if new is None and name.isupper() and len(name) > 2:
            new = mapping.get(name.capitalize(), "").upper()
        if not new or (name in unsure and not _stands_as_name(match)):
            return match[0]
        ending = match["s"] or ""
        # "James' car" is "Ann's car".
        return new + ("'s" if ending and not new.endswith(("s", "S")) else ending)

    def label(name: str) -> str:
        if name in mapping:  # "Jean-Luc"
            return mapping[name]
        return _LABEL_WORD.sub(lambda match: mapping.get(match[0], match[0]), name)

    everything = _CAPITALISED.sub(another, _without_ascii_capital(everything, mapping))
    literal, narrative, interlocutor, *dialogue = everything.split(_BREAK)
    return dataclasses.replace(
        record,
        literal=literal,
        narrative=narrative,
        interlocutor=interlocutor,
        dialogue=tuple(dialogue),
        speakers=tuple(label(name) for name in record.speakers),
        x=label(record.x),
        y=label(record.y),
        z=label(record.z),
        human={label(name): verdict for name, verdict in record.human.items()},
        renamed=True,
    )


def _without_ascii_capital(text: str, mapping: dict[str, str]) -> str:
    """Replace the names that `_CAPITALISED` cannot find: those that begin with no letter A to Z."""
    others = [name for name in mapping if not "A" <= name[0] <= "Z"]
    if not others:
        return text
    letters = with_letters(text)

    def another(match: re.Match[str]) -> str:
        name, before, after = match[0], match.start() - 1, match.end()
        # Scripts without capitals may write a name and the next word as one.
        joined = name[0].isupper() and (
            (before >= 0 and letters[before].isalnum()) or letters[after : after + 1].isalnum()
        )
        return name if joined else mapping[name]

    longest_first = sorted(others, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), another, text)


def _is_evident(match: re.Match[str]) -> bool:
    """Return whether a word has its capital only because it is a person's name."""
    if match["name"] not in _PERSONS or not _stands_as_name(match):
        return False
    before = match.string[max(0, match.start() - 40) : match.start()]
    after = match.string[match.end("name") : match.end("name") + 4]
    # Not where a sentence starts, nor in "Union Jack", "Frank Sinatra".
    return _IN_SENTENCE.search(before) is not None and not re.match(r"\s[A-Z]", after)


def _stands_as_name(match: re.Match[str]) -> bool:
    """Return whether an ambiguous word is a name here, by the words before and after it."""
    before = match.string[max(0, match.start() - 12) : match.start()]
    after = match.string[match.end("name") : match.end("name") + 16]
    if _BEFORE_OTHER.search(before) or _AFTER_OTHER.match(after):
        return False
    if _SENTENCE_START.search(before):
        return _AFTER_NAME.match(after) is not None
    return True
