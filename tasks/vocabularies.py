"""Load vocabularies without TensorFlow, or as SeqIO's twins of them.

Two kinds: SentencePiece models (T5) and byte-level BPE (BlenderBot). `load` recognizes both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cosmo.engine.base import byte_level_bpe, files
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.engine.base.vocabulary import fingerprint_of
from cosmo.tasks.files import resolve

# T5's vocabulary at its public home: 32,100 pieces.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"

# Others are refused, because decoding and every T5 checkpoint rely on these.
_SPECIAL = {"pad": 0, "eos": 1, "unk": 2}

# Prost's marks, before its rules of thumb and before its response. They take the first two spare
# rows of BlenderBot's vocabulary, so that no network is resized.
ROT_MARK, RESPONSE_MARK = "__rot__", "__response__"
_MARK_ROWS = ("__FP16_PAD_0__", "__FP16_PAD_1__")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A SentencePiece model. `size` counts its pieces, `fingerprint` is a hash of them."""

    path: str
    size: int
    fingerprint: str
    processor: Any = field(repr=False)
    pad_id: int = _SPECIAL["pad"]
    start_id: int = _SPECIAL["pad"]  # T5 starts its decoder with padding
    eos_id: int = _SPECIAL["eos"]
    unk_id: int = _SPECIAL["unk"]
    marks: dict[str, int] = field(default_factory=dict, repr=False)  # Prost's: it has none

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


@dataclass(frozen=True, eq=False)
class ByteLevelVocabulary:
    """A byte-level BPE with BlenderBot's special ids; see `cosmo.engine.base.byte_level_bpe`.

    Every text is encoded as if a space came before it. A text that spells a special piece or a mark
    is plain text. `marks` are Prost's: text -> id, and empty where the vocabulary has no spare row.
    """

    path: str
    size: int
    fingerprint: str
    bpe: byte_level_bpe.ByteLevelBpe = field(repr=False)
    tokenizer: Any = field(repr=False)
    marks: dict[str, int] = field(repr=False)
    pad_id: int = byte_level_bpe.SPECIAL_IDS.pad
    start_id: int = byte_level_bpe.SPECIAL_IDS.start
    eos_id: int = byte_level_bpe.SPECIAL_IDS.eos
    unk_id: int = byte_level_bpe.UNKNOWN_ID

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without EOS. Raises ValueError for half a surrogate pair."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # the library's word for it is "must be str"
            raise ValueError(f"not valid text (half a character): {shown(text)}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` up to the first EOS, without padding and start.

        A mark decodes as its text between spaces, an id without a piece as `<unk>`. One space at
        the start is left out, because encoding puts it there.
        """
        parts: list[str] = []
        run: list[int] = []
        marks = {id: mark for mark, id in self.marks.items()}
        pieces = range(self.unk_id + 1, self.size - len(self.bpe.spare_ids))
        for id in map(int, ids):
            if id == self.eos_id:
                break
            if id in (self.pad_id, self.start_id):
                continue
            if id in pieces:
                run.append(id)
            else:
                # No character has bytes on both sides of a special piece.
                parts += [self.bpe.text(run), f" {marks.get(id, '<unk>')}"]
                run = []
        return "".join([*parts, self.bpe.text(run)]).removeprefix(" ")


AnyVocabulary = Vocabulary | ByteLevelVocabulary


def load(path: Any) -> AnyVocabulary:
    """Return the vocabulary at `path`, read once per file; raise DataError if it cannot be used.

    `path` is a SentencePiece model, or a byte-level BPE in one of the layouts of `byte_level_bpe`.
    """
    return _load(str(resolve(path)))


def seqio_vocabulary(path: Any) -> Any:
    """Return the same vocabulary as a `seqio.Vocabulary`."""
    vocabulary = load(path)
    if isinstance(vocabulary, ByteLevelVocabulary):
        from cosmo.tasks.seqio_vocabulary import SeqioVocabulary

        return SeqioVocabulary(vocabulary)
    import seqio  # loads TensorFlow

    # extra_ids=0, because T5's published vocabulary already holds its 100 sentinels.
    return seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=0)


@functools.cache
def _load(path: str) -> AnyVocabulary:
    if byte_level_bpe.recognizes(resolve(path)):
        return _load_byte_level(path)
    return _load_sentencepiece(path)


def _load_byte_level(path: str) -> ByteLevelVocabulary:
    bpe = byte_level_bpe.read(resolve(path))
    tokenizers = import_tokenizers(path)
    ids = {piece: id for id, piece in enumerate(bpe.pieces)}
    # No piece is registered as special: a user's text could else write one.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, list(bpe.merges)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    spare = bpe.spare_ids
    names = _MARK_ROWS if all(name in spare for name in _MARK_ROWS) else list(spare)[-2:]
    rows = [spare[name] for name in names]
    marks = dict(zip((ROT_MARK, RESPONSE_MARK), rows, strict=True)) if len(rows) == 2 else {}
    return ByteLevelVocabulary(path, bpe.size, bpe.fingerprint, bpe, tokenizer, marks)


def import_tokenizers(path: Any) -> Any:
    """Return the module `tokenizers`; raise UserError that names the extra if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"the vocabulary {path} is a byte-level BPE, which needs tokenizers: pip install "
            "'cosmo-dialogue[blenderbot]'"
        ) from error
    return tokenizers


def _load_sentencepiece(path: str) -> Vocabulary:
    import sentencepiece

    def wrong(problem: str, got: str, expected: str) -> DataError:
        further = {"remedy": "Correct the path.", "setting": "VOCABULARY_PATH"}
        return DataError.at(path, None, problem, got=got, expected=expected, **further)

    try:
        data = resolve(path).read_bytes()
    except Exception as error:  # remote file systems raise errors of their own
        found = f"{type(error).__name__}: {error}"
        expected = "a SentencePiece model file, or a byte-level BPE's file or folder"
        raise wrong("no vocabulary", found, expected) from error
    files.refuse_pointer(path, data, "VOCABULARY_PATH")
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
