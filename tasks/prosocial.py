"""Make Cosmo's examples of ProsocialDialog: situations from rules of thumb, names drawn.

Kim et al. 2023 ("SODA"), appendix C. Names come from the 1,000 most common, and the instruction is
SODA's. The situation is "NAME is trying to gently convince a friend" and the rules of thumb. Only
the guiding speaker's responses are learnt.

The paper does not give these choices. All 1,000 names are equally likely. Several rules of thumb
are joined by "and". A context without any is "NAME is having a conversation with a friend."
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from cosmo.tasks import namebook
from cosmo.tasks.dialogues import ProsocialDialogue
from cosmo.tasks.formatting import Example, instruction

# First words that keep their capital inside a sentence although they are not all capitals.
_PROPER_WORDS = (
    "African Africans Allah America American Americans Arab Arabs Asian Asians Australian Bible "
    "Blacks Britain British Buddhist Buddhists Canada Canadian Catholic Catholics China Chinese "
    "Christian Christianity Christians Christmas Christ Democrat Democrats Easter England English "
    "Europe European Europeans Facebook French German Germans Germany God Google Halloween Hindu "
    "Hindus Hispanic Hispanics Hitler Holocaust India Indian Indians Instagram Irish Islam Israel "
    "Israeli Italian Italians Jesus Jew Jewish Jews Judaism Korean Koreans Latino Latinos Mexican "
    "Mexicans Mexico Monday Mormon Mormons Mr Mrs Ms Muslim Muslims Nazi Nazis Netflix Obama "
    "Palestinian Polish Quran Reddit Republican Republicans Russia Russian Russians Saturday "
    "Spanish Sunday Thanksgiving Thursday Trump Tuesday Twitter Ukraine Wednesday YouTube "
    "Austin Georgia Jordan Sydney"
)
_PROPER = frozenset(_PROPER_WORDS.split())

# First words that are never part of a name of several words.
_OPENING_WORDS = (
    "A All An Any Being Every If In It Most No Not One Other Others People Saying Some That The "
    "There They Thinking This To Using We When White You Your"
)
_OPENERS = frozenset(_OPENING_WORDS.split())


def draw_names(dialogue_id: str, seed: int = 0) -> tuple[str, str]:
    """Return two different names, (guiding speaker, other speaker), of the id and the seed."""
    names = namebook.load().common
    # hashlib, because Python's own hash of a string differs from run to run.
    digest = hashlib.sha256(f"{seed}:{dialogue_id}".encode()).digest()
    guide = int.from_bytes(digest[:8], "big") % len(names)
    # A step of 1 to n - 1 names further, so that the two names differ.
    step = 1 + int.from_bytes(digest[8:16], "big") % (len(names) - 1)
    return names[guide], names[(guide + step) % len(names)]


def situation(name: str, rots: Sequence[str]) -> str:
    """Return the narrative for a response of speaker `name` that was written from `rots`."""
    # Each clause once, in order: a sentence must not repeat itself.
    clauses = list(dict.fromkeys(clause for rot in rots if (clause := _clause(rot))))
    if not clauses:
        return f"{name} is having a conversation with a friend."
    return f"{name} is trying to gently convince a friend {' and '.join(clauses)}."


def prosocial_examples(dialogue: ProsocialDialogue, seed: int = 0) -> Iterator[Example]:
    """Yield an example per response; its turns are all utterances of both speakers before it."""
    guide, other = draw_names(dialogue.id, seed)
    role = instruction(guide, other)
    turns: tuple[str, ...] = ()
    for index, turn in enumerate(dialogue.turns):
        turns += (turn.context,)
        # The other speaker's utterances are no targets, because they are the problematic part.
        yield Example(
            id=f"{dialogue.id}-{index}",
            narrative=situation(guide, turn.rots),
            instruction=role,
            turns=turns,
            response=turn.response,
        )
        turns += (turn.response,)


def _clause(rot: str) -> str:
    """Return a rule of thumb as part of a sentence: no full stop, no sentence-initial capital."""
    rot = rot.strip().rstrip(".!? ")
    words = rot.split()
    if not words or _keeps_capital(words):
        return rot
    return rot[0].lower() + rot[1:]


def _keeps_capital(words: Sequence[str]) -> bool:
    """Return whether the first word looks like `I`, an acronym or a name."""
    first = re.split(r"[^\w]", words[0], maxsplit=1)[0]
    # "A" is the one capital letter that starts a sentence and is no name or acronym.
    if first == "I" or (first.isupper() and first != "A"):
        return True
    names = namebook.load()
    if first in _PROPER or (first in names and first not in names.words):
        return True
    # A name of several words, as in "New York"; but "It's Bob's ..." and "The French ..." are not.
    following = words[1] if len(words) > 1 else ""
    return following[:1].isupper() and following[1:2].islower() and first not in _OPENERS
