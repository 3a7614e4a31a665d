"""Write a vocabulary as the files that HuggingFace's `AutoTokenizer` reads."""

import base64
import json
from typing import Any

from etils import epath

from cosmo.engine.base import byte_level_bpe
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SENTINEL, fingerprint_of
from cosmo.engine.checkpoints.interop import foreign_files

SPIECE = "spiece.model"
FIRST_SPECIAL = 3  # pieces 0 to 2 are <pad>, </s> and <unk> in every T5 vocabulary
# The score of a byte's piece, such as <0x41>. A text that spells it is split into other pieces.
BYTE_SCORE = -10_000.0


def write_tokenizer(folder: epath.Path, vocabulary_path: str) -> None:
    """Write the files of a Unigram SentencePiece model, or of a byte-level BPE.

    Raises UserError if the SentencePiece model at `vocabulary_path` is of another type.
    """
    if byte_level_bpe.recognizes(vocabulary_path):
        return _write_byte_level(folder, byte_level_bpe.read(vocabulary_path))
    tokenizer, sentinels = _tokenizer(_read_model(vocabulary_path), vocabulary_path)
    # AutoTokenizer reads tokenizer.json. The original serves SentencePiece, and our own import.
    (folder / SPIECE).write_bytes(epath.Path(vocabulary_path).read_bytes())
    text = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_bytes(f"{text}\n".encode())  # whatever the locale
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": sentinels,
        # True would remove spaces before punctuation, which a model may have learnt to write.
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_byte_level(folder: epath.Path, bpe: byte_level_bpe.ByteLevelBpe) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, as BlenderBot's folders have them."""
    # transformers 5 appends the end token only by tokenizer.json.
    # As bytes: a locale may have another encoding.
    (folder / "tokenizer.json").write_bytes(bpe.tokenizer_json().encode())
    (folder / "vocab.json").write_bytes(f"{bpe.vocab_json()}\n".encode())
    (folder / "merges.txt").write_bytes(bpe.merges_txt().encode())
    pad, start, end, unknown = byte_level_bpe.SPECIAL
    settings = {
        "tokenizer_class": "BlenderbotTokenizer",
        "add_prefix_space": True,
        "pad_token": pad,
        "bos_token": start,
        "cls_token": start,
        "eos_token": end,
        "sep_token": end,
        "unk_token": unknown,
        "mask_token": None,  # its default would be an id beyond the embedding
        # True would remove spaces before punctuation, which a model may have learnt to write.
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def fingerprint(path: str) -> str:
    """Return the hash of a vocabulary's pieces, equal to the one of `cosmo.tasks.vocabularies`."""
    if byte_level_bpe.recognizes(path):
        return byte_level_bpe.read(path).fingerprint
    return fingerprint_of(pieces_of(path))


def pieces_of(path: str) -> list[str]:
    """Return the pieces of a SentencePiece model, in the order of their ids. Raises UserError."""
    return [piece.piece for piece in _read_model(path).pieces]


def _read_model(path: str) -> Any:
    """Return the SentencePiece model in a file, as its protocol buffer. Raises UserError."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        foreign_files.check_no_pointer(epath.Path(path))
        model.ParseFromString(epath.Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"vocabulary {path} cannot be read: {error}; copy it again") from error
    if not model.pieces:
        raise UserError(f"vocabulary {path} has no pieces: it is no SentencePiece model")
    return model


def _tokenizer(model: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Return (the content of tokenizer.json, the sentinels in the order of their numbers)."""
    # The tokenizer.json below holds Unigram's scores. Other types have none: BPE has merges.
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        raise UserError(
            f"vocabulary {path} is a {kind} model, expected UNIGRAM: its tokenizer cannot be "
            "written. Export without a vocabulary"
        )
    vocab: list[list[Any]] = []
    special: list[tuple[int, str]] = []  # (id, text)
    sentinels: dict[int, str] = {}
    for id, piece in enumerate(model.pieces):
        # T5's sentinels become special tokens with HuggingFace's names, and keep their ids.
        sentinel = SENTINEL.fullmatch(piece.piece)
        text = sentinel.group(1) if sentinel else piece.piece
        # Pieces that are never split (<sep>) get a score of 0, above that of all others: so the
        # likeliest segmentation keeps them whole.
        whole = piece.type == piece.USER_DEFINED
        score = BYTE_SCORE if piece.type == piece.BYTE else piece.score
        vocab.append([text, 0.0 if whole else score])
        if sentinel:
            sentinels[int(sentinel.group(2))] = text
        if sentinel or id < FIRST_SPECIAL:
            special.append((id, text))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    # mT5 writes a character that no piece has as its bytes.
    bytes_too = model.trainer_spec.byte_fallback
    decoders = [{"type": "ByteFallback"}, metaspace]
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **flags, "special": True} for id, text in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            # SentencePiece folds runs of white space; splitting there gives the same pieces.
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            # T5's inputs and targets end in EOS.
            "single": [first, eos],
            "pair": [first, eos, second, eos],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders} if bytes_too else metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": bytes_too},
    }
    return tokenizer, [sentinels[number] for number in sorted(sentinels)]
