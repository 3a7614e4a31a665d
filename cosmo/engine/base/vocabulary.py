"""Describe a vocabulary as a protocol, so that the engine imports no tokenizer library."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

# A T5 sentinel, with or without SentencePiece's mark of a word's start.
SENTINEL = re.compile(r"▁?(<extra_id_(\d+)>)")

BLENDERBOT_DELIMITER = "  "  # between the turns of a history, as the published BlenderBots read it


class SpecialIds(NamedTuple):
    """The token ids with which a network pads a row, starts the decoder and ends a text.

    The defaults are T5's. Padding is 0 in every network, because SeqIO pads with 0.
    """

    pad: int = 0
    start: int = 0
    eos: int = 1


class Vocabulary(Protocol):
    """The attributes that the engine reads of a vocabulary; `cosmo.tasks.vocabularies` has one."""

    # Properties: a frozen dataclass has attributes that can be read alone.
    @property
    def path(self) -> str:
        """Return the path of its file."""

    @property
    def size(self) -> int:
        """Return the number of its pieces."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of its pieces."""

    @property
    def eos_id(self) -> int:
        """Return the id that ends a text."""

    @property
    def unk_id(self) -> int:
        """Return the id of text without a piece."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids up to the first EOS, without padding."""


def identity(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return a vocabulary's path, size and fingerprint, as checkpoints and caches record them."""
    path, size = str(vocabulary.path), vocabulary.size
    return {"path": path, "size": size, "fingerprint": vocabulary.fingerprint}


def fingerprint_of(pieces: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary's pieces, in the order of their ids."""
    size = len(pieces)
    # Sentinels at the end do not count, because HuggingFace's copy of T5's vocabulary has none in
    # its file. Every other id means the same there.
    while size and SENTINEL.fullmatch(pieces[size - 1]):
        size -= 1
    return hashlib.sha256("\n".join(pieces[:size]).encode()).hexdigest()
