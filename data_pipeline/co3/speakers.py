"""Find the two speakers (Kim et al. 2023, section 2.4, appendix A.2).

They are PersonX and PersonY if the triple has both. Otherwise the model completes "... a
conversation in the scene between X and", at temperature 0, 16 tokens, to the first full stop.
"""

from __future__ import annotations

import re

from data_pipeline.calls.requests import Rejected, Stage
from data_pipeline.co3 import texts
from data_pipeline.co3.prompts import Prompts

# A longer answer is a sentence, not a person.
MAX_WORDS = 6
_INTRODUCTION = re.compile(
    r"^(?:the )?(?:other |best |most likely )?(?:person|speaker|interlocutor|answer|participant)"
    r"(?: here)?(?: is| would be|:)\s+",
    re.IGNORECASE,
)
# A completion continues after the person: "her coach about the race".
_END = re.compile(
    r"[.,;:!?\n]|\s(?:-|who|that|which|about|regarding|discussing|in the|at the|after|during|as)\s"
)
# Left out of a label: "her coach" speaks as "Coach".
_SMALL = frozenset(("a", "an", "the", "her", "his", "their", "my", "our", "its", "one", "another"))


def interlocutor(
    record_id: str, narrative: str, x: str, y: str, prompts: Prompts
) -> Stage[str | Rejected]:
    """Return the person that X speaks with: Y, or the model's answer ("her coach")."""
    if y:
        return y
    response = yield prompts.request("speaker", record_id, narrative=narrative, x=x)
    found = parse(response.text, x)
    reason = response.fault
    if not reason and (not found or texts.is_refusal(response.text)):
        reason = "no interlocutor"
    if not reason and label(found).casefold() == x.casefold():
        reason = "speaks with oneself"
    record = {"narrative": narrative, "answer": response.text[:200]}
    return Rejected(record_id, "speaker", reason, record) if reason else found


def parse(text: str, x: str) -> str:
    """Return the person that an answer names: "a friend", "her mother", "Bob"; or ""."""
    text = texts.plain(text)
    lines = [line.strip() for line in text.split("\n")]
    text = next((line for line in lines if line and not texts.is_preamble(line)), "")
    text = text.strip(" .\"'*_-:")
    # Models repeat the words of the prompt: "Ann and her coach".
    text = re.sub(rf"^{re.escape(x)}\s*(?:and|&)\s+", "", text, flags=re.IGNORECASE)
    text = _INTRODUCTION.sub("", text)
    text = re.sub(r"^(?:and|with)\s+", "", text, flags=re.IGNORECASE)
    # The stop in "Mrs. Smith" and "Dr. Lee" ends nothing.
    title = re.match(r"(?:Mr|Mrs|Ms|Dr|Prof)\.\s+\w+", text)
    text = title[0] if title else _END.split(text, maxsplit=1)[0]
    text = " ".join(text.split()).strip(" \"'*_-")
    if not any(c.isalpha() for c in text) or len(text.split()) > MAX_WORDS:
        return ""
    return text


def label(person: str) -> str:
    """Return the label of this person's turns: "her coach" -> "Coach", "Bob" -> "Bob"."""
    words = person.split()
    while len(words) > 1 and words[0].lower() in _SMALL:
        words = words[1:]
    # All words count in "mother Ann" or "best friend", the first alone in "friend from school".
    for position, word in enumerate(words):
        if position and word.lower() in ("of", "from", "at", "in", "named", "on"):
            words = words[:position]
            break
    return " ".join(word[:1].upper() + word[1:] for word in words)
