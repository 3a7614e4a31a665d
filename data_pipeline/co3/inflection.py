"""Put the verbs of a tail into another tense, by lemminflect's dictionary.

Table 8 wants "to get a job" as "got a job" (xNeed) and "become rich" as "becomes rich" (xEffect).
The dictionary inflects a verb; which words of a tail are its verbs is decided here.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import lemminflect

_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))["verbs"]
_AFTER_VERB, _VERBS, _ADVERBS = (
    frozenset(_LISTS[name].split()) for name in ("followers", "openers", "adverbs")
)
# Where the dictionary has another form first, or none.
_PAST = {"babysit": "babysat", "mimic": "mimicked", "weave": "wove", "dive": "dove"}
_PAST |= {"sneak": "snuck", "broadcast": "broadcast"}
_PAST |= {"can": "could", "cannot": "could not", "can't": "couldn't"}
_JOINING = frozenset(["and", "or", "then", "and/or"])
_PLACES = frozenset(["bed", "church", "class", "school", "work"])  # "to go to work"
_WORD = re.compile(r"[a-z-]+")


def lemma(word: str) -> str | None:
    """Return the base form if the word can be a verb, else None."""
    lemmas = lemminflect.getAllLemmas(word.lower())
    found = lemmas.get("VERB") or lemmas.get("AUX")
    return found[0] if found else None


def inflect(base: str, tag: str) -> str:
    """Inflect a base form: past tense (VBD), third person (VBZ) or another of Penn's tags."""
    if tag == "VBD" and base in _PAST:
        return _PAST[base]
    # A verb that the dictionary does not know stays as it is.
    forms = lemminflect.getInflection(base, tag) or (base,)
    # It has two past forms (was, were), and the subject is one person.
    if base == "be":
        return {"VBD": "was", "VBZ": "is"}.get(tag, forms[0])
    return forms[0]


def opens_with_verb(phrase: str) -> bool:
    """Return whether the first word looks like a verb in its base form."""
    words = phrase.split()
    return bool(words) and _is_base_verb(words, 0)


def third_person(word: str) -> bool:
    """Return whether the word can be a verb's third person ("rolls")."""
    bare, _ = _bare(word)
    base = lemma(bare)
    return base is not None and bare == inflect(base, "VBZ")


def past(phrase: str) -> str | None:
    """Return the phrase in the past tense: "to go and buy a car" -> "went and bought a car".

    None if it opens with no verb ("a copy machine").
    """
    return _finite(phrase, "VBD")


def present(phrase: str) -> str | None:
    """Return the phrase in the third person: "to get lost" -> "gets lost". None without a verb."""
    return _finite(phrase, "VBZ")


def _finite(phrase: str, tag: str) -> str | None:
    words = phrase.split()
    infinitive = bool(words) and words[0].lower() == "to"
    words = words[1:] if infinitive else words
    negated = bool(words) and words[0].lower() == "not"
    words = words[1:] if negated else words
    first = _first_verb(words)
    if first is None:
        return None
    word, mark = _bare(words[first])
    # After "to" any word is a verb, also one that the dictionary does not know ("to facetime").
    base = word if infinitive else lemma(word)
    if base is None or base == "to" or not (infinitive or _is_finite(words, first, base)):
        return None
    # "not go" is "did not go", but "not be" is "was not".
    if negated and base != "be":
        return " ".join(["did" if tag == "VBD" else "does", "not", *words])
    denial = ["not"] if negated else []
    words = [*words[:first], inflect(base, tag) + mark, *denial, *words[first + 1 :]]
    return " ".join(_coordinated(words, first + 1, tag))


def _bare(word: str) -> tuple[str, str]:
    """Split a word into its lower-case form and the punctuation after it."""
    bare = word.rstrip(",.;:!?")
    return bare.lower(), word[len(bare) :]


def _first_verb(words: list[str]) -> int | None:
    """Return the position of the first word that is not an adverb."""
    for position, word in enumerate(words):
        low, _ = _bare(word)
        # "reply" and "apply" end like adverbs, and are verbs.
        if low in _ADVERBS or (low.endswith("ly") and not lemma(low)):
            continue
        return position if _WORD.fullmatch(low) else None
    return None


def _is_base_verb(words: list[str], position: int) -> bool:
    word, _ = _bare(words[position])
    lemmas = lemminflect.getAllLemmas(word)
    if word == "be":
        return True
    if word not in lemmas.get("VERB", ()) and word not in lemmas.get("AUX", ()):
        return False
    # A word that can be nothing else needs no further sign.
    if word in _VERBS or set(lemmas) <= {"VERB", "AUX"}:
        return True
    following = words[position + 1] if position + 1 < len(words) else ""
    return following in _AFTER_VERB


def _is_finite(words: list[str], position: int, base: str) -> bool:
    """Return whether a tail without "to" opens with a verb: "get" or "gets"."""
    word, _ = _bare(words[position])
    if word == base:
        return _is_base_verb(words, position)
    if word != inflect(base, "VBZ"):
        return False
    following = words[position + 1] if position + 1 < len(words) else ""
    return (
        base in _VERBS or "NOUN" not in lemminflect.getAllLemmas(word) or following in _AFTER_VERB
    )


def _coordinated(words: list[str], start: int, tag: str) -> list[str]:
    """Inflect the verbs after "and", "or", "then" and commas like the first one.

    Not those that hang on an infinitive: "wanted to read and write".
    """
    words = list(words)
    inside_infinitive = False
    for position in range(start, len(words)):
        if not words[position]:
            continue
        before = words[position - 1].lower()
        after = words[position + 1 :]
        if words[position].lower() == "to" and after:
            # "to eat and to drink": both are infinitives, and the second loses its "to".
            verb, mark = _bare(after[0])
            is_verb = lemma(verb) == verb and verb not in _PLACES
            if before in _JOINING and is_verb and not inside_infinitive:
                # Emptied, not deleted, so that later positions stay.
                words[position : position + 2] = ["", inflect(verb, tag) + mark]
            else:
                inside_infinitive = inside_infinitive or is_verb
            continue
        # A word that nothing joins to the first verb is no further verb of the sentence.
        if inside_infinitive or not (before in _JOINING or before.endswith(",")):
            continue
        if _is_base_verb(words, position):
            verb, mark = _bare(words[position])
            words[position] = inflect(verb, tag) + mark
    return [word for word in words if word]
