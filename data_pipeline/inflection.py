"""English verbs in a tail put into another tense, by lemminflect's dictionary.

Table 8 wants "to get a job" as "got a job" (xNeed) and "become rich" as "becomes rich" (xEffect).
The dictionary inflects a verb; which words of a tail are its verbs is decided here.
"""

from __future__ import annotations

import re

import lemminflect

# What follows a verb rather than a noun, where a word may be either ("to wash and dry the car").
_AFTER_VERB = frozenset(
    """a an the his her their its my our your him them it himself herself themselves someone somebody
    something anyone anything everyone everything this that these those some any more enough
    PersonX PersonX's PersonY PersonY's PersonZ PersonZ's up out off down away back into to for from
    with at about on over through around there home""".split()
)
# Verbs although they may be nouns, when they open a tail.
_VERBS = frozenset(
    """ask be become begin break bring build buy call change check choose come cook do drink drive
    eat find get give go have help keep know learn leave let look make meet need open pay play
    practice put run save say see sell show sit sleep start stay stop study take talk teach tell
    think travel try use visit wait walk want watch wear work write""".split()
)
_ADVERBS = frozenset("first also just always already even really still then never often".split())
# Where the dictionary has another form first, or none.
_PAST = {
    "babysit": "babysat",
    "mimic": "mimicked",
    "weave": "wove",
    "dive": "dove",
    "sneak": "snuck",
}
_PAST |= {"broadcast": "broadcast", "can": "could", "cannot": "could not", "can't": "couldn't"}
_WORD = re.compile(r"[A-Za-z']+")


def lemma(word: str) -> str | None:
    """The base form, if the word can be a verb."""
    lemmas = lemminflect.getAllLemmas(word.lower())
    found = lemmas.get("VERB") or lemmas.get("AUX")
    return found[0] if found else None


def inflect(base: str, tag: str) -> str:
    """A base form in the past tense (VBD), third person (VBZ) or another of Penn's tags."""
    if tag == "VBD" and base in _PAST:
        return _PAST[base]
    forms = lemminflect.getInflection(base, tag) or (base,)
    if base == "be":
        return {"VBD": "was", "VBZ": "is"}.get(tag, forms[0])
    return forms[0]


def opens_with_verb(phrase: str) -> bool:
    """Whether the first word is a verb in its base form, as far as the words tell."""
    words = phrase.split()
    return bool(words) and _is_base_verb(words, 0)


def third_person(word: str) -> bool:
    """Whether the word can be a verb's third person ("rolls")."""
    base = lemma(word.strip(",.;"))
    return base is not None and word.strip(",.;").lower() == inflect(base, "VBZ")


def past(phrase: str) -> str | None:
    """The phrase in the past tense: "to go out and buy a car" -> "went out and bought a car".

    None where it opens with no verb ("a copy machine").
    """
    return _finite(phrase, "VBD")


def present(phrase: str) -> str | None:
    """The phrase in the third person: "to get lost" -> "gets lost". None where there is no verb."""
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
    word = words[first].lower()
    # After "to" any word is a verb, also one that the dictionary does not know ("to facetime").
    base = word if infinitive else lemma(word)
    if base is None or not (infinitive or _is_finite(words, first, base)):
        return None
    if negated:
        auxiliary = "was" if tag == "VBD" else "is"
        if base != "be":
            return " ".join(["did" if tag == "VBD" else "does", "not", *words])
        words = [*words[:first], auxiliary, "not", *words[first + 1 :]]
    else:
        words = [*words[:first], inflect(base, tag), *words[first + 1 :]]
    return " ".join(_coordinated(words, first + 1, tag))


def _first_verb(words: list[str]) -> int | None:
    """The position of the first word that is no adverb."""
    for position, word in enumerate(words):
        low = word.lower()
        if low in _ADVERBS or (low.endswith("ly") and not lemma(low)):
            continue
        return position if _WORD.fullmatch(word.strip(",.;")) else None
    return None


def _is_base_verb(words: list[str], position: int) -> bool:
    word = words[position].lower().strip(",.;")
    lemmas = lemminflect.getAllLemmas(word)
    if word == "be":
        return True
    if word not in lemmas.get("VERB", ()) and word not in lemmas.get("AUX", ()):
        return False
    if word in _VERBS or set(lemmas) <= {"VERB", "AUX"}:
        return True
    following = words[position + 1] if position + 1 < len(words) else ""
    return following in _AFTER_VERB


def _is_finite(words: list[str], position: int, base: str) -> bool:
    """Whether a tail without "to" opens with a verb: base form ("get"), or third ("gets")."""
    word = words[position].lower()
    if word == base:
        return _is_base_verb(words, position)
    if word != inflect(base, "VBZ"):
        return False
    following = words[position + 1] if position + 1 < len(words) else ""
    return (
        base in _VERBS or "NOUN" not in lemminflect.getAllLemmas(word) or following in _AFTER_VERB
    )


def _coordinated(words: list[str], start: int, tag: str) -> list[str]:
    """The verbs after "and", "or", "then" and commas inflected like the first one."""
    words = list(words)
    for position in range(start, len(words)):
        before = words[position - 1]
        joined = before.lower() in ("and", "or", "then", "and/or") or before.endswith(",")
        if not joined:
            continue
        if words[position].lower() == "to" and position + 1 < len(words):
            # "to eat and to drink": both are infinitives, and the second loses its "to".
            if before.lower() in ("and", "or", "then") and lemma(words[position + 1]):
                base = words[position + 1].lower()
                words[position : position + 2] = ["", inflect(base, tag)]
            continue
        mark = words[position][len(words[position].rstrip(",.;")) :]
        word = words[position].lower().strip(",.;")
        if _is_base_verb([word, *words[position + 1 :]], 0):
            words[position] = inflect(word, tag) + mark
    return [word for word in words if word]
