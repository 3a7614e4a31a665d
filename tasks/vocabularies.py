"""Load SentencePiece vocabularies without TensorFlow, or as SeqIO's twin of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError
from cosmo.engine.base.vocabulary import fingerprint_of
from cosmo.tasks.files import resolve

# T5's vocabulary at its public home: 32,100 pieces.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"

# Others are refused, because decoding and every T5 checkpoint rely on these.
_SPECIAL = {"pad": 0, "eos": 1, "unk": 2}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A SentencePiece model. `size` counts its pieces, `fingerprint` is a hash of them."""

    path: str
    size: int
    fingerprint: str
    processor: Any = field(repr=False)
    pad_id: int = _SPECIAL["pad"]
    eos_id: int = _SPECIAL["eos"]
    unk_id: int = _SPECIAL["unk"]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without EOS."""
        return self.processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` up to the first EOS, without padding.

        An id past the pieces decodes as unknown.
        """
        kept = []
        for id in map(int, ids):
            if id == self.eos_id:
                break
            if id != self.pad_id:
                # A model's vocabulary is often padded to a round size, past the pieces.
                kept.append(id if 0 <= id < self.size else self.unk_id)
        return self.processor.decode(kept)


def load(path: Any) -> Vocabulary:
    """Return the vocabulary at `path`, read once per file; raise DataError if it cannot be used."""
    return _load(str(resolve(path)))


def seqio_vocabulary(path: Any) -> Any:
    """Return the same vocabulary as a `seqio.SentencePieceVocabulary`."""
    import seqio  # loads TensorFlow

    # extra_ids=0, because T5's published vocabulary already holds its 100 sentinels.
    return seqio.SentencePieceVocabulary(load(path).path, extra_ids=0)


@functools.cache
def _load(path: str) -> Vocabulary:
    import sentencepiece

    def wrong(problem: str, got: str, expected: str) -> DataError:
        further = {"remedy": "Correct the path.", "setting": "VOCABULARY_PATH"}
        return DataError.at(path, None, problem, got=got, expected=expected, **further)

    try:
        data = resolve(path).read_bytes()
    except Exception as error:  # remote file systems raise errors of their own
        found = f"{type(error).__name__}: {error}"
        raise wrong("no vocabulary", found, "a SentencePiece model file") from error
    files.refuse_pointer(path, data)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise wrong("not a vocabulary", str(error), "a SentencePiece model") from None
    ids = {
        "pad": processor.pad_id(),
        "eos": processor.eos_id(),
        "unk": processor.unk_id(),
    }
    if ids != _SPECIAL:
        raise wrong("the special pieces have other ids than T5's", str(ids), str(_SPECIAL))
    size = processor.get_piece_size()
    # A hash of the pieces, because files of one vocabulary may differ in settings of training.
    fingerprint = fingerprint_of([processor.id_to_piece(i) for i in range(size)])
    return Vocabulary(path, size, fingerprint, processor)
