"""Explain the reasons of rejected.jsonl, for the card and the report."""

from __future__ import annotations

from collections.abc import Iterable

from data_pipeline.calls import answer_text

# By the beginning of a reason, because some end in a number, a field or an error's name.
MEANINGS = {
    "broken row": "not a row with SODA's fields",
    "broken line": "not readable as JSON, or not three columns of a .tsv",
    "not an object": "a line of JSON that has no fields",
    "no text in field": "the triple lacks the field, or it is no text",
    "no true or false in field": "--critic reads this field, and the triple lacks it",
    "below the critic": "ATOMIC-10X's critic does not keep the triple",
    "relation not used": "not one of the six relations about PersonX that SODA uses",
    "duplicate dialogue": "but for names the same as one before it",
    "duplicate": "the triple stands in the file before",
    "empty": "head or tail has no words",
    "none": "the tail is the word none: the annotator had no answer",
    "blank": "head or tail has a gap to fill in (___)",
    "no PersonX in head": "nobody to tell the story of",
    "tail of another form": "no sentence can be made: the tail is not the verb or adjective that "
    "its relation wants",
    "no interlocutor": "the model named nobody to talk to",
    "speaks with oneself": "the model named PersonX as the one to talk to",
    answer_text.USED_UP: "no room was left for the answer: switch the model's reasoning off, or "
    "raise max_tokens by --body",
    answer_text.ALONE: "the model reasoned and gave no answer",
    answer_text.MIXED: "a mark of reasoning opens or closes alone",
    "mark of a model's format": "<think>, a template's token, a fence or a control character",
    "missing prefix": "a turn without its speaker's name",
    "repetition": "utterances or sentences that repeat earlier ones",
    "empty utterance": "a turn without a word",
    "prefix within a turn": "a second speaker's name and colon inside a turn",
    "open variable": "PersonX, [name] or the like is left in the text",
    "fewer than": "too short a dialogue",
    "more than two speakers": "dialogues of exactly two are kept",
    "more than": "too long a dialogue",
    "one speaker": "dialogues of exactly two are kept",
    "speaker is not human": "by its name, or by the model's answer",
    "no label of Canary": "--canary_labels has no line for it",
    "Canary: needs intervention": "Canary labels the dialogue so",
    "moderation": "the moderation service's score is above the threshold",
    "head is not in the narrative": "the model answers No to the question on the head",
    "failed": "the server gave no usable answer; the next start asks again",
    "error": "a fault of this program; see `detail` in rejected.jsonl",
}


def explained(reasons: Iterable[str]) -> list[tuple[str, str]]:
    """Return (reason, meaning) of the explained ones, each once; the longest beginning decides."""
    found = []
    # Each once, in the order of the report.
    for reason in dict.fromkeys(reasons):
        fitting = [name for name in MEANINGS if reason.startswith(name)]
        if fitting:
            # "duplicate dialogue" begins with "duplicate", which is another reason.
            found.append((reason, MEANINGS[max(fitting, key=len)]))
    return found
