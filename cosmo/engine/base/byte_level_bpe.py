"""Read and write the files of a byte-level BPE, without a tokenizer library.

A vocabulary of this kind is its pieces by id and its merges in order. Three layouts hold it:
`vocab.json` beside `merges.txt` (HuggingFace), `tokenizer.json` alone (HuggingFace, and the copy in
a run's folder), and `X.dict` beside `X.dict-vocab.json` and `X.dict-merges.txt` (ParlAI).
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from cosmo.engine.base import files, json_lines
from cosmo.engine.base.errors import DataError, shown
from cosmo.engine.base.vocabulary import SpecialIds, fingerprint_of

# Ids 0 to 3, as HuggingFace and as ParlAI name them.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PARLAI_SPECIAL = ("__null__", "__start__", "__end__", "__unk__")
SPECIAL_IDS = SpecialIds(pad=0, start=1, eos=2)
UNKNOWN_ID = 3
# ParlAI fills a vocabulary up to a multiple of 8 with rows that mean nothing.
SPARE = re.compile(r"__FP16_PAD_(\d+)__")

_HUGGINGFACE = ("vocab.json", "merges.txt")
_SINGLE = "tokenizer.json"
_PARLAI_ENDINGS = ("-vocab.json", "-merges.txt")
_COPY_AGAIN = "Copy the vocabulary's files again."


def _symbols() -> str:
    """Return the character that stands for each byte, 0 to 255, in GPT-2's alphabet."""
    # Bytes that print in Latin-1 stand for themselves, the others for characters from U+0100.
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printed else next(others)) for byte in range(256))


SYMBOLS = _symbols()
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


@dataclasses.dataclass(frozen=True)
class ByteLevelBpe:
    """Pieces by id, the four of SPECIAL first, and merges in the order of their rank."""

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.pieces)

    @functools.cached_property
    def spare_ids(self) -> dict[str, int]:
        """The rows at the end that no text uses: name -> id."""
        first = self.size
        while SPARE.fullmatch(self.pieces[first - 1]):
            first -= 1
        return {self.pieces[id]: id for id in range(first, self.size)}

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of pieces and merges; spare rows do not count."""
        # They mean nothing, and a file may lack them.
        pieces = self.pieces[len(SPECIAL) : self.size - len(self.spare_ids)]
        return fingerprint_of(["byte-level BPE", *pieces, *map(" ".join, self.merges)])

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of the ids of pieces; bytes that are not UTF-8 become U+FFFD."""
        data = bytes(_BYTE_OF[symbol] for id in ids for symbol in self.pieces[id])
        return data.decode("utf-8", errors="replace")

    def vocab_json(self) -> str:
        """Return the content of HuggingFace's `vocab.json`."""
        return json.dumps(self._ids(), ensure_ascii=False)

    def merges_txt(self) -> str:
        """Return the content of HuggingFace's `merges.txt`."""
        return "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""])

    def tokenizer_json(self) -> str:
        """Return the content of HuggingFace's `tokenizer.json`, which holds the whole vocabulary.

        HuggingFace's tokenizer appends the end token to every text.
        """
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        byte_level["use_regex"] = True
        end, end_id = SPECIAL[SPECIAL_IDS.eos], SPECIAL_IDS.eos
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        eos = {"SpecialToken": {"id": end, "type_id": 0}}
        found = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id, "content": name, **flags, "special": True}
                for id, name in enumerate(SPECIAL)
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first, eos],
                "pair": [first, eos, second, eos],
                "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
            },
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self._ids(),
                "merges": [list(pair) for pair in self.merges],
            },
        }
        return json.dumps(found, ensure_ascii=False) + "\n"

    def _ids(self) -> dict[str, int]:
        return {piece: id for id, piece in enumerate(self.pieces)}


def find(folder: Any) -> str | None:
    """Return what to read of a folder that holds a byte-level BPE, or None.

    It is the folder of `vocab.json`, the file `tokenizer.json`, or the one file `X.dict`.
    """
    place = files.resolve(folder)
    if not place.is_dir():
        return None
    if any((place / name).exists() for name in _HUGGINGFACE):
        return str(place)
    if (place / _SINGLE).exists():
        # A T5 folder has such a file too, of another model.
        data = (place / _SINGLE).read_bytes()
        return str(place / _SINGLE) if re.search(rb'"type":\s*"BPE"', data) else None
    named = [child for child in place.iterdir() if child.name.endswith(".dict")]
    return str(named[0]) if len(named) == 1 else None


def recognizes(path: Any) -> bool:
    """Return whether `path` is a file or folder of a byte-level BPE, by names and first bytes."""
    place = files.resolve(path)
    if place.is_dir():
        return find(place) is not None
    if place.name.endswith((".json", ".dict")) or place.name == _HUGGINGFACE[1]:
        return True
    if not place.exists():
        return False
    with place.open("rb") as file:
        head = file.read(len(PARLAI_SPECIAL[0]))
    # A SentencePiece model begins with a line feed.
    return head.startswith((b"{", PARLAI_SPECIAL[0].encode()))


def read(path: Any) -> ByteLevelBpe:
    """Return the byte-level BPE at `path`, a file or the folder of one.

    Raises DataError that names the file which is missing or cannot be used.
    """
    place = files.resolve(path)
    if place.is_dir():
        found = find(place)
        if found is None:
            names = sorted(child.name for child in place.iterdir())[:20]
            expected = f"a folder with {' and '.join(_HUGGINGFACE)}, or {_SINGLE}, or one X.dict"
            _refuse(place, "no byte-level BPE", f"the files {names}", expected, "Correct the path.")
        place = files.resolve(found)
    if place.is_dir():
        vocab, merges = (place / name for name in _HUGGINGFACE)
        return _checked(vocab, _by_id(vocab, _json(vocab)), merges, _merges(merges))
    if place.name == _HUGGINGFACE[1]:
        place = place.parent / _HUGGINGFACE[0]
    data = _bytes(place)
    if not data.lstrip(files.MARK + b" \t\r\n").startswith((b"{", b"[")):
        parlai = [place.parent / f"{place.name}{ending}" for ending in _PARLAI_ENDINGS]
        if place.name.endswith(".dict") or data.startswith(PARLAI_SPECIAL[0].encode()):
            return _read_parlai(place, data, *parlai)
    value = _json(place, data)
    if isinstance(value, Mapping) and "model" in value and not isinstance(value["model"], int):
        vocab, pairs = _read_single(place, value)
        return _checked(place, _by_id(place, vocab), place, pairs)
    merges = place.parent / place.name.replace("vocab.json", "merges.txt")
    if merges == place:
        merges = place.parent / _HUGGINGFACE[1]
    return _checked(place, _by_id(place, value), merges, _merges(merges))


def _read_single(place: Any, value: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    """Return (the mapping of pieces to ids, the merges) of a `tokenizer.json`."""
    model = value["model"]
    kind = model.get("type", "BPE") if isinstance(model, Mapping) else type(model).__name__
    if kind != "BPE" or "ByteLevel" not in json.dumps(value.get("pre_tokenizer")):
        got = f"a model of type {shown(kind)}, split by {shown(value.get('pre_tokenizer'))}"
        _refuse(place, "no byte-level BPE", got, "BPE over ByteLevel", "Correct the path.")
    pairs = []
    for merge in model.get("merges") or ():
        # Older files join the two parts with a space.
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not _is_pair(parts):
            _refuse(place, "a merge is no pair", shown(merge), "two pieces", _COPY_AGAIN)
        pairs.append(tuple(parts))
    return model.get("vocab"), pairs


def _read_parlai(place: Any, data: bytes, vocab: Any, merges: Any) -> ByteLevelBpe:
    """Return the vocabulary of ParlAI's `.dict`: four special rows, then the BPE's pieces."""
    try:
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        got = f"byte {data[error.start]:#x}"
        _refuse(place, "not a dictionary of ParlAI", got, "text in UTF-8", _COPY_AGAIN)
    # A line is the token and its count.
    names = [line.rstrip("\r").split("\t")[0] for line in lines]
    own = _by_id(vocab, _json(vocab))
    pieces = [*PARLAI_SPECIAL, *own]
    for id, piece in enumerate(pieces):
        name = names[id] if id < len(names) else None
        if name != piece:
            got = f"{shown(name)} in line {id + 1}" if name is not None else f"{len(names)} lines"
            expected = f"{shown(piece)}, as {vocab.name} after the four special rows"
            _refuse(place, "other ids than its BPE's", got, expected, _COPY_AGAIN)
    more = names[len(pieces) :]
    if foreign := [name for name in more if not SPARE.fullmatch(name)]:
        expected = "__FP16_PAD_0__ and so on"
        remedy = "Use the dictionary of a model without tokens of its own."
        _refuse(place, "a row after the BPE's pieces", shown(foreign[0]), expected, remedy)
    return _checked(place, [*SPECIAL, *own, *more], merges, _merges(merges))


def _checked(
    place: Any, pieces: Sequence[str], merges_place: Any, merges: Sequence[tuple[str, str]]
) -> ByteLevelBpe:
    """Return the vocabulary; raise DataError unless its parts fit and it can write every text."""
    if tuple(pieces[:4]) not in (SPECIAL, PARLAI_SPECIAL):
        _refuse(
            place,
            "the special pieces have other ids than BlenderBot's",
            f"{shown(list(pieces[:4]))} at 0 to 3",
            f"{list(SPECIAL)} or {list(PARLAI_SPECIAL)}",
            "Give BlenderBot's vocabulary, or X.dict for ParlAI's X.dict-vocab.json.",
        )
    if not merges:
        remedy = "Give the merges that were made with these pieces."
        _refuse(merges_place, "a BPE without merges", "none", "a pair a line", remedy)
    found = ByteLevelBpe((*SPECIAL, *pieces[4:]), tuple(merges))
    known = set(found.pieces)
    for pair in merges:
        unknown = [piece for piece in (*pair, "".join(pair)) if piece not in known]
        if unknown:
            got = f"{shown(unknown[0])} in {shown(' '.join(pair))}"
            expected = f"pieces of {getattr(place, 'name', place)}"
            remedy = "Give the merges and the pieces of one vocabulary."
            _refuse(merges_place, "a merge of unknown pieces", got, expected, remedy)
    lacking = [symbol for symbol in SYMBOLS if symbol not in known]
    if lacking:
        got = f"none for {len(lacking)} of 256 bytes, such as {shown(lacking[0])}"
        _refuse(place, "a byte without a piece", got, "a piece for each byte", _COPY_AGAIN)
    ordinary = found.pieces[len(SPECIAL) : found.size - len(found.spare_ids)]
    for piece in ordinary:
        if not piece or not _BYTE_OF.keys() >= set(piece):
            expected = "characters of the byte-level alphabet"
            _refuse(place, "a piece that is not bytes", shown(piece), expected, _COPY_AGAIN)
    return found


def _by_id(place: Any, value: Any) -> list[str]:
    """Return the pieces of a mapping piece -> id, in the order of their ids."""
    ids = value.values() if isinstance(value, Mapping) else ()
    if not value or not ids or not all(type(id) is int for id in ids):
        got = shown(value)
        _refuse(place, "no mapping of pieces to ids", got, '{"<pad>": 0, ...}', _COPY_AGAIN)
    pieces = sorted(value, key=value.__getitem__)
    for wanted, piece in enumerate(pieces):
        if value[piece] != wanted:
            got = f"{value[piece]} for {shown(piece)}"
            _refuse(place, f"no piece has the id {wanted}", got, "ids 0, 1, 2, ...", _COPY_AGAIN)
    return pieces


def _merges(place: Any) -> list[tuple[str, str]]:
    """Return the pairs of a `merges.txt`."""
    data = _bytes(place)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        _refuse(place, "no merges", f"byte {data[error.start]:#x}", "text in UTF-8", _COPY_AGAIN)
    found = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        # A merge may begin with #, the first line does.
        if not line or line.startswith("#version"):
            continue
        # Not at any white space: pieces hold no space, but other characters that Python counts.
        parts = line.split(" ")
        if not _is_pair(parts):
            _refuse(place, "a merge is no pair", shown(line), "two pieces", _COPY_AGAIN, number)
        found.append(tuple(parts))
    return found


def _is_pair(parts: Any) -> bool:
    pair = isinstance(parts, list) and len(parts) == 2
    return pair and all(isinstance(part, str) and part for part in parts)


def _json(place: Any, data: bytes | None = None) -> Any:
    data = _bytes(place) if data is None else data  # it raises errors of its own
    try:
        return json_lines.value(data)
    except ValueError as error:
        _refuse(
            place, "not a vocabulary", str(error), "a JSON mapping of pieces to ids", _COPY_AGAIN
        )


def _bytes(place: Any) -> bytes:
    try:
        data = place.read_bytes()
    except Exception as error:  # remote file systems raise errors of their own
        got = f"{type(error).__name__}: {error}"
        kind = "a BPE without merges" if place.name.endswith("merges.txt") else "no vocabulary"
        expected = "the file, beside the vocabulary's other files"
        _refuse(place, kind, got, expected, "Put all files of the vocabulary in one folder.")
    files.refuse_pointer(place, data, "VOCABULARY_PATH")
    return data


def _refuse(
    place: Any, problem: str, got: str, expected: str, remedy: str, line: int | None = None
) -> NoReturn:
    further = {"remedy": remedy, "setting": "VOCABULARY_PATH"}
    raise DataError.at(place, line, problem, got=got, expected=expected, **further)
