"""A SentencePiece vocabulary as the files that HuggingFace's `AutoTokenizer` reads."""

import base64
import hashlib
import json
import re
from typing import Any

from etils import epath

from cosmo.engine.base.errors import UserError

SENTINEL = re.compile(r"▁?(<extra_id_\d+>)")
SPIECE = "spiece.model"
_USER_DEFINED = 4  # SentencePiece's number for pieces that are never split


def write(folder: epath.Path, vocabulary_path: str) -> None:
    """Write spiece.model, tokenizer.json and tokenizer_config.json for a Unigram vocabulary.

    T5's sentinels become special tokens of HuggingFace's names (`<extra_id_0>`), with the ids that
    they have. Other pieces that are never split (`<sep>`) stay pieces: their score of 0 is above
    all others, so the likeliest segmentation holds them whole.
    """
    data = epath.Path(vocabulary_path).read_bytes()
    tokenizer, sentinels = _tokenizer(data)
    (folder / SPIECE).write_bytes(data)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def fingerprint(path: str) -> str:
    """The hash that `Vocabulary.fingerprint` is: of the pieces, T5's sentinels at the end apart."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=epath.Path(path).read_bytes())
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    while SENTINEL.fullmatch(pieces[-1]):
        pieces.pop()
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


def _tokenizer(data: bytes) -> tuple[dict[str, Any], list[str]]:
    """(tokenizer.json, the sentinels by number)."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise UserError("the vocabulary is no Unigram model: its tokenizer cannot be written")
    vocab: list[list[Any]] = []
    special = []
    for number, piece in enumerate(model.pieces):
        sentinel = SENTINEL.fullmatch(piece.piece)
        text = sentinel.group(1) if sentinel else piece.piece
        vocab.append([text, 0.0 if piece.type == _USER_DEFINED else piece.score])
        if sentinel or number < 3:  # pad, eos, unk
            special.append((number, text))
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in special
    ]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}
        if charsmap
        else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence("A"), eos],
            "pair": [sequence("A"), eos, sequence("B"), eos],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }
    sentinels = [text for number, text in special if number > 2]
    return tokenizer, sorted(sentinels, key=lambda text: int(re.findall(r"\d+", text)[0]))
