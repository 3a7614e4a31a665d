"""The vocabulary that the engine works with, as a protocol: it knows no tokenizer library."""

from collections.abc import Iterable
from typing import Protocol


class Vocabulary(Protocol):
    """What the engine asks of a vocabulary; `cosmo.tasks.vocabularies` has one."""

    path: str
    size: int
    fingerprint: str
    eos_id: int
    unk_id: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids up to the first EOS, without padding."""
