"""Describe an exchange that Prost learns from: `ProstExample`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProstExample:
    """One response to learn after `turns`, and the rules of thumb (RoTs) that it was written from.

    `turns` is the dialogue history as ParlAI's History has it, oldest first. Context lines
    (personas, a topic) stand before the first utterance inside its text, joined by newlines. `id`
    is unique and stable: the dialogue's id and the position of the response in the dialogue.
    """

    turns: tuple[str, ...]
    response: str
    rots: tuple[str, ...] = ()
    id: str = ""
