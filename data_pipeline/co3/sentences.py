"""Turn a triple into a sentence with names for its persons (Kim et al. 2023, 2.3 and table 8)."""

from __future__ import annotations

import dataclasses
import re

from cosmo.tasks.namebook import Namebook
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import inflection, texts
from data_pipeline.co3.prompts import Prompts
from data_pipeline.co3.triples import Triple, persons

# A lone Y or X is a person too ("to assist Y"); not in "x-ray" or "Y chromosome".
_LONE = re.compile(r"(?<![\w'-])([XYxy])(?='s\b|(?![\w'-])(?! ?(?:ray|chromosome|axis)))")
_GLUED = re.compile(r"\b(Person[XYZ])s?(?= 's\b|'s\b|\u2019s\b)")
# ATOMIC's texts are partly tokenized: "does n't", "PersonX 's".
_SPACED = (
    (re.compile(r"\b([Cc])an n['\u2019]t\b"), r"\1an't"),
    (re.compile(r" n['\u2019]t\b"), "n't"),
    (re.compile(r" ['\u2019](s|re|m|ve|d|ll)\b"), r"'\1"),
    (re.compile(r"s '(?= |$)"), "s'"),
    (re.compile(r"\s+([,.;:!?])"), r"\1"),
)
_SUBJECT = re.compile(
    r"^(?:he|she|they|it|i|we|you|people|someone|everyone|others)\s", re.IGNORECASE
)
_PERSON_SUBJECT = re.compile(r"^(?:PersonX|the person|person|he|she|they)\s+", re.IGNORECASE)
# A tail with a subject of its own does not follow "Now X".
_OTHER_SUBJECT = re.compile(
    r"^(?:Person[XYZ]'s|Person[YZ]|his|her|their|the|no|yes)\b", re.IGNORECASE
)
# Annotators repeat the verb of the template ("feels happy"), which adds it itself.
_FEELS = re.compile(
    r"^(?:to\s+)?(?:is|was|be|being|are|feels?|feeling|becomes?|gets|seen as)\s+", re.IGNORECASE
)
_WANTS = re.compile(r"^(?:wants?|because|intends?)\s+(?:to want\s+)?", re.IGNORECASE)
_NOT_LOWERED = re.compile(r"^(?:I\b|Person[XYZ]|[A-Z]{2})")
# Verbs that are in the third person already, or have one form.
_FINITE = frozenset(
    ("is", "has", "was", "can", "cannot", "can't", "will", "does", "doesn't", "isn't")
)


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A triple in words: `literal` is the whole; head and tail have names for persons.

    `tail_past` is the tail in the past tense, for xNeed alone. `y` and `z` are empty where the
    triple has no such person.
    """

    literal: str
    head: str
    tail: str
    tail_past: str
    x: str
    y: str
    z: str

    def fields(self) -> dict[str, str]:
        """Return the fields of the templates of tables 8 and 9."""
        return {"head": self.head, "tail": self.tail, "tail_past": self.tail_past, "x": self.x}


def sentence(triple: Triple, prompts: Prompts, names: Namebook, seed: int) -> Sentence | Rejected:
    """Return the triple's sentence; the same id and seed give the same one.

    Rejected ("tail of another form") if the tail does not fit the template: a noun in place of a
    verb, or a whole sentence.
    """
    head = clean(triple.head)
    tail = clean(triple.tail)
    # Lower case within the sentence, but not "I", "PersonY" or "TV".
    if not tail[:1].isupper() or not _NOT_LOWERED.match(tail):
        tail = tail[:1].lower() + tail[1:]
    fitted = fit(triple.relation, tail)
    if fitted is None:
        record = {"head": triple.head, "relation": triple.relation, "tail": triple.tail}
        return Rejected(triple.id, "sentence", "tail of another form", record)
    tail, tail_past = fitted
    # Names that the source drew stay. Persons without one get a name here.
    # Six, because three of them may be names that the source drew.
    ours = [n for n in names.people(triple.id, seed, 6) if n not in triple.names]
    drawn = [texts.composed(given) or ours.pop(0) for given in triple.names]
    wanted = f"{head} {tail}"
    x, y, z = (n if f"Person{p}" in wanted else "" for n, p in zip(drawn, "XYZ", strict=True))
    head, tail, tail_past = (
        _named(text, {"X": x, "Y": y, "Z": z}) for text in (head, tail, tail_past)
    )
    found = Sentence("", head, tail, tail_past, x, y, z)
    # The sodaverse has its sentence already.
    literal = texts.composed(triple.literal) or prompts.sentence(triple.relation, **found.fields())
    return dataclasses.replace(found, literal=literal)


def clean(text: str) -> str:
    """Return the phrase spelt as in a text: "does n't" joined, no quotes or stop around."""
    text = persons(" ".join(text.replace('"', " ").split()))
    text = _LONE.sub(lambda match: f"Person{match[1].upper()}", text)
    for pattern, replacement in _SPACED:
        text = pattern.sub(replacement, text)
    text = _GLUED.sub(r"\1", text)
    return text.strip(" .,;'`")


def fit(relation: str, tail: str) -> tuple[str, str] | None:
    """Return the tail as the relation's template needs it, or None. xNeed gets the past tense."""
    if not tail:
        return None
    if relation in ("xAttr", "xReact"):
        tail = _FEELS.sub("", tail)
        # The templates are "X feels ..." and "X is ...", which want an adjective.
        bad = tail.startswith(("to ", "PersonX ")) or _SUBJECT.match(tail)
        return None if bad or not tail else (tail, "")
    if relation in ("xIntent", "xWant"):
        tail = _WANTS.sub("", tail)
        if tail.startswith("to be PersonX"):
            return None
        if tail.startswith(("to ", "PersonY to ", "PersonZ to ", "PersonY's ")):
            return tail, ""
        if inflection.opens_with_verb(tail):
            return f"to {tail}", ""
        noun = re.match(r"(?:a|an|the|some|more|every|his|her|their|PersonY's)\s", tail)
        return (tail, "") if noun else None
    if relation == "xNeed":
        tail = _PERSON_SUBJECT.sub("", tail)
        past = None if _SUBJECT.match(tail) else inflection.past(tail)
        return (tail, past) if past else None
    return _effect(tail)


def _effect(tail: str) -> tuple[str, str] | None:
    """Return an xEffect tail in the third person: "PersonX gets lost"."""
    tail = _PERSON_SUBJECT.sub("", tail)
    if _OTHER_SUBJECT.match(tail) or _SUBJECT.match(tail):
        return None
    words = tail.split()
    if words[0] in _FINITE:
        return tail, ""
    if words[0] == "are":
        return " ".join(["is", *words[1:]]), ""
    if inflection.third_person(words[0]):
        return tail, ""
    tail = inflection.present(tail)
    return (tail, "") if tail else None


def _named(text: str, names: dict[str, str]) -> str:
    return re.sub(r"Person([XYZ])", lambda match: names[match[1]], text)
