"""Byte-level BPE. Oracles: ParlAI's recorded ids, HuggingFace's tokenizer, hand-made files."""

import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmo.engine.base import byte_level_bpe
from cosmo.engine.base.errors import DataError, UserError
from cosmo.engine.base.vocabulary import BLENDERBOT_DELIMITER
from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.checkpoints.interop import tokenizer
from cosmo.tasks import vocabularies
from cosmo.tasks.vocabularies import RESPONSE_MARK, ROT_MARK, load

pytest.importorskip("tokenizers")

SAMPLE = "tasks/sample/prost/vocabulary.json"
ODD = (
    "",
    " ",
    "  ",
    "\t",
    "\r\n",
    "a\rb\r",
    "tab\there",
    "many      spaces   ",
    "   before",
    "nul\x00 and \x01\x7f",
    "cafe\u0301 e\u0301\u0323 \u200d\ufeff\u2028",
    "👩‍👩‍👧‍👦 🇳🇱 😀😀",
    "日本語 العربية हिन्दी",
    "I'm don't we'LL they've 'tis",
    "3.14 1,000,000 ½ x²",
    "\u00a0non-breaking\u3000wide",
    "\U0010ffff \ue000",
    "__start__ <s> </s> __FP16_PAD_0__ __rot__",
    "new\nline\n\n\nlines \n",
)


@pytest.fixture(scope="module")
def parlai(shared):
    """ParlAI's dictionary of 500 pieces."""
    return shared / "golden/parlai/model.dict"


def _utterances(shared, number):
    rows = (shared / "data/soda_rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for row in rows for text in json.loads(row)["dialogue"]]
    dialogues = (shared / "data/dailydialog_validation.txt").read_text(encoding="utf-8")
    texts += [text.strip() for line in dialogues.splitlines() for text in line.split("__eou__")]
    for line in (shared / "data/prosocial_rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts += [row["context"], row["response"], *(row["rots"] or ())]
    texts = list(dict.fromkeys(filter(None, texts)))
    assert len(texts) >= number
    return texts[:: len(texts) // number][:number]


def _as_folder(bpe, folder, vocab=None, merges=None):
    """Write a vocabulary as HuggingFace's two files."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(bpe.vocab_json() if vocab is None else vocab)
    (folder / "merges.txt").write_text(bpe.merges_txt() if merges is None else merges)
    return folder


def _as_parlai(bpe, folder, spare=0):
    """Write a vocabulary as ParlAI's three files."""
    folder.mkdir(exist_ok=True)
    own = bpe.pieces[4 : bpe.size - len(bpe.spare_ids)]
    names = [*byte_level_bpe.PARLAI_SPECIAL, *own, *(f"__FP16_PAD_{i}__" for i in range(spare))]
    (folder / "m.dict").write_text("".join(f"{name}\t1\n" for name in names))
    ids = {piece: id for id, piece in enumerate(own)}
    (folder / "m.dict-vocab.json").write_text(json.dumps(ids))
    (folder / "m.dict-merges.txt").write_text(bpe.merges_txt())
    return folder / "m.dict"


def test_ids_are_parlais(shared, parlai):
    """Oracle: ParlAI 1.7.2 on odd strings."""
    vocabulary = load(parlai)
    golden = json.loads((shared / "golden/parlai/tokens.json").read_text())
    for text, ids in golden["enc"].items():
        assert vocabulary.encode(text) == ids
        assert vocabulary.decode([*ids, 2, 5, 0]) == text.removeprefix(" ")
    special = (vocabulary.pad_id, vocabulary.start_id, vocabulary.eos_id, vocabulary.unk_id)
    assert special == tuple(golden["special"].values())
    assert (vocabulary.size, vocabulary.marks) == (504, {})


def test_ids_are_huggingfaces(shared, tmp_path):
    """Oracle: transformers' BlenderbotTokenizer on 5,000 real utterances and on odd strings."""
    transformers = pytest.importorskip("transformers")
    bpes = [byte_level_bpe.read(SAMPLE), byte_level_bpe.read(shared / "golden/parlai/model.dict")]
    texts = [*_utterances(shared, 5000), *ODD]
    for index, bpe in enumerate(bpes):
        folder = _as_folder(bpe, tmp_path / str(index))
        vocabulary = load(folder)
        theirs = transformers.BlenderbotTokenizer.from_pretrained(folder)
        for text in texts:
            # Theirs reads special pieces in a text as such; ours never does.
            ids = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert vocabulary.encode(text) == ids, text
            decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
            assert vocabulary.decode(ids) == decoded.removeprefix(" ")
        # The single file in HuggingFace's own format: ids with the end token.
        (folder / "tokenizer.json").write_text(bpe.tokenizer_json())
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
        for text in texts[::10]:
            ids = theirs(text, split_special_tokens=True)["input_ids"]
            assert [*vocabulary.encode(text), vocabulary.eos_id] == ids


def test_half_a_character_is_refused():
    """Oracle: the words of the error."""
    with pytest.raises(ValueError, match="half a character"):
        load(SAMPLE).encode("a \ud800 b")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_returns_the_text(text):
    """Oracle: the text put in, without the one space that encoding adds."""
    vocabulary = load(SAMPLE)
    assert vocabulary.decode(vocabulary.encode(text)) == text.removeprefix(" ")


@given(st.lists(st.integers(-5, 1020)))
def test_any_ids_decode(ids):
    """Oracle: no error, and the text of the ids before the end token."""
    vocabulary = load(SAMPLE)
    end = ids.index(2) if 2 in ids else len(ids)
    assert vocabulary.decode(ids) == vocabulary.decode([i for i in ids[:end] if i not in (0, 1)])


def test_marks_and_unknown_ids_decode_by_name():
    """Oracle: by hand; ids 1004 to 1007 are the spare rows."""
    vocabulary = load(SAMPLE)
    assert vocabulary.marks == {ROT_MARK: 1004, RESPONSE_MARK: 1005}
    ids = [1004, *vocabulary.encode("Be kind."), 1005, *vocabulary.encode("Hi"), 1006, 5000]
    assert vocabulary.decode(ids) == "__rot__ Be kind. __response__ Hi <unk> <unk>"
    assert not set(vocabulary.encode("__rot__ <s> __FP16_PAD_0__")) & {0, 1, 2, 3, 1004, 1005}


@pytest.mark.parametrize("spare", [0, 1, 2, 4, 6])
def test_every_layout_is_one_vocabulary(tmp_path, spare):
    """Oracle: the ids and the fingerprint of the bundled file; marks need two spare rows."""
    text = f"Hello{BLENDERBOT_DELIMITER}there, 😀\nand you?"
    sample, bpe = load(SAMPLE), byte_level_bpe.read(SAMPLE)
    names = [f"__FP16_PAD_{i}__" for i in range(spare)]
    bpe = byte_level_bpe.ByteLevelBpe((*bpe.pieces[:1004], *names), bpe.merges)
    folder = _as_folder(bpe, tmp_path / "hf")
    (tmp_path / "single").mkdir()
    (tmp_path / "single/tokenizer.json").write_text(bpe.tokenizer_json())
    dictionary = _as_parlai(bpe, tmp_path / "parlai", spare)
    for path in (
        folder,
        folder / "vocab.json",
        folder / "merges.txt",
        tmp_path / "single",
        tmp_path / "single/tokenizer.json",
        dictionary,
        dictionary.parent,
    ):
        found = load(path)
        assert found.size == 1004 + spare
        assert found.encode(text) == sample.encode(text)
        assert found.fingerprint == sample.fingerprint == tokenizer.fingerprint(str(path))
        assert list(found.marks.values()) == ([1004, 1005] if spare >= 2 else [])


def test_other_spare_rows_give_marks_too(tmp_path):
    """Oracle: the last two rows."""
    bpe = byte_level_bpe.read(SAMPLE)
    names = ("__FP16_PAD_3__", "__FP16_PAD_4__", "__FP16_PAD_5__")
    bpe = byte_level_bpe.ByteLevelBpe((*bpe.pieces[:1004], *names), bpe.merges)
    assert load(_as_folder(bpe, tmp_path / "hf")).marks == {ROT_MARK: 1005, RESPONSE_MARK: 1006}


def test_another_vocabulary_has_another_fingerprint(tmp_path):
    """Oracle: a merge less, and a piece renamed with its merge."""
    bpe = byte_level_bpe.read(SAMPLE)
    fewer = byte_level_bpe.ByteLevelBpe(bpe.pieces, bpe.merges[:-1])
    swapped = byte_level_bpe.ByteLevelBpe(
        (*bpe.pieces[:4], bpe.pieces[5], bpe.pieces[4], *bpe.pieces[6:]), bpe.merges
    )
    assert len({bpe.fingerprint, fewer.fingerprint, swapped.fingerprint}) == 3


def test_a_run_keeps_it_as_one_file(tmp_path):
    """Oracle: the ids and the fingerprint of the folder that was copied; a copy of a copy."""
    folder = _as_folder(byte_level_bpe.read(SAMPLE), tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "again").mkdir()
    run_checkpoints.copy_vocabulary(str(tmp_path / "run"), str(folder))
    kept = tmp_path / "run" / run_checkpoints.VOCABULARY
    run_checkpoints.copy_vocabulary(str(tmp_path / "again"), str(kept))
    again = tmp_path / "again" / run_checkpoints.VOCABULARY
    assert kept.read_bytes() == again.read_bytes()
    for path in (kept, again):
        assert load(path).fingerprint == load(folder).fingerprint
        assert load(path).encode("Hello.") == load(folder).encode("Hello.")
        assert load(path).marks == load(folder).marks


def test_sentencepiece_models_are_not_taken_for_one(vocabulary_path):
    """Oracle: the attributes of a SentencePiece vocabulary."""
    assert not byte_level_bpe.recognizes(vocabulary_path)
    vocabulary = load(vocabulary_path)
    assert (vocabulary.start_id, vocabulary.eos_id, vocabulary.marks) == (0, 1, {})


def _ids(**changed):
    bpe = byte_level_bpe.read(SAMPLE)
    return {**{piece: id for id, piece in enumerate(bpe.pieces)}, **changed}


def _renamed(old, new):
    return {new if piece == old else piece: id for piece, id in _ids().items()}


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, "", "a BPE without merges: got none"),
        (None, "#version: 0.2\n\n", "a BPE without merges: got none"),
        ("", None, "not a vocabulary: got not JSON"),
        ("{", None, "not a vocabulary: got not JSON"),
        ("\ufeff[1, 2]", None, r"no mapping of pieces to ids: got \[1, 2\]"),
        ("{}", None, r"no mapping of pieces to ids: got \{\}"),
        ('{"<pad>": "0"}', None, "no mapping of pieces to ids"),
        ('{"<pad>": true}', None, "no mapping of pieces to ids"),
        (_ids(zz=1009), None, "no piece has the id 1008: got 1009 for 'zz'"),
        (_ids(zz=7), None, "no piece has the id 8"),
        (_ids(**{"<s>": 0, "<pad>": 1}), None, r"other ids than BlenderBot's: got \['<s>', '<pad"),
        (_renamed("<unk>", "<x>"), None, "the special pieces have other ids"),
        (_renamed("Ġ", "zz"), None, "a merge of unknown pieces: got 'Ġ' in"),
        (_renamed("Ā", "zz"), None, r"a byte without a piece: got none for 1 of 256 bytes"),
        (_renamed("__FP16_PAD_3__", "a b"), None, "a piece that is not bytes: got 'a b'"),
        (None, "#version: 0.2\nĠ t\nĠ zzz\n", "a merge of unknown pieces: got 'zzz' in 'Ġ zzz'"),
        (None, "Ġ t\none\n", r"merges\.txt:2: a merge is no pair: got 'one'"),
        (None, "Ġ t\na b c\n", r"merges\.txt:2: a merge is no pair: got 'a b c'"),
        ("version https://git-lfs.github.com/spec/v1\n", None, "Git LFS pointer"),
    ],
)
def test_bad_files(tmp_path, vocab, merges, message):
    """Oracle: the words of the error, which names the file."""
    vocab = json.dumps(vocab) if isinstance(vocab, dict) else vocab
    folder = _as_folder(byte_level_bpe.read(SAMPLE), tmp_path / "hf", vocab, merges)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "VOCABULARY_PATH" in caught.value.settings


def test_missing_files(tmp_path):
    """Oracle: the words of the error."""
    folder = _as_folder(byte_level_bpe.read(SAMPLE), tmp_path / "hf")
    (folder / "merges.txt").unlink()
    for path in (folder, folder / "vocab.json"):
        with pytest.raises(DataError, match="a BPE without merges: got FileNotFoundError"):
            load(path)
    _as_folder(byte_level_bpe.read(SAMPLE), folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(DataError, match="no vocabulary: got FileNotFoundError"):
        load(folder)
    with pytest.raises(DataError, match="no vocabulary: got FileNotFoundError"):
        load(tmp_path / "nothing.dict")
    dictionary = _as_parlai(byte_level_bpe.read(SAMPLE), tmp_path / "parlai")
    (tmp_path / "parlai/m.dict-merges.txt").unlink()
    with pytest.raises(DataError, match="a BPE without merges"):
        load(dictionary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:1000], "other ids than its BPE's: got 1000 lines"),
        (lambda rows: ["__start__\t1", *rows], "got '__start__' in line 1, expected '__null__'"),
        (lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]], "got .* in line 5, expected "),
        (lambda rows: [*rows, "__ressep__\t1"], "a row after the BPE's pieces: got '__ressep__'"),
    ],
)
def test_bad_dictionaries_of_parlai(tmp_path, change, message):
    """Oracle: the words of the error."""
    path = _as_parlai(byte_level_bpe.read(SAMPLE), tmp_path / "parlai")
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=message):
        load(path)


def test_parlais_own_ids_without_the_dictionary(tmp_path):
    """ParlAI's vocab.json has no special pieces. Oracle: the words of the error."""
    path = _as_parlai(byte_level_bpe.read(SAMPLE), tmp_path / "parlai")
    with pytest.raises(DataError, match=r"Give BlenderBot's vocabulary, or X\.dict"):
        load(f"{path}-vocab.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "got a model of type 'Unigram'"),
        ({"model": []}, "got a model of type 'list'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "expected BPE over ByteLevel"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "no mapping of pieces to ids"),
        ({"model": {"type": "BPE", "merges": [["a"]]}}, r"a merge is no pair: got \['a'\]"),
        ({"model": {"type": "BPE", "merges": ["a b c"]}}, "a merge is no pair: got 'a b c'"),
        ({"model": {"type": "BPE", "vocab": _ids()}}, "a BPE without merges"),
    ],
)
def test_bad_tokenizer_files(tmp_path, change, message):
    """Oracle: the words of the error."""
    value = {**json.loads(byte_level_bpe.read(SAMPLE).tokenizer_json()), **change}
    (tmp_path / "vocabulary.model").write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "vocabulary.model")


def test_merges_may_be_joined_by_a_space(tmp_path):
    """As older tokenizers write them. Oracle: the same fingerprint."""
    value = json.loads(byte_level_bpe.read(SAMPLE).tokenizer_json())
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert load(tmp_path / "tokenizer.json").fingerprint == load(SAMPLE).fingerprint


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    """Oracle: the name of the extra."""
    folder = _as_folder(byte_level_bpe.read(SAMPLE), tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'cosmo-dialogue\[blenderbot\]'"):
        load(folder)


def test_a_folder_of_another_kind(tmp_path):
    """Oracle: the words of the error; T5's tokenizer.json is no byte-level BPE."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert byte_level_bpe.find(tmp_path) is None
    with pytest.raises(DataError, match="no byte-level BPE"):
        byte_level_bpe.read(tmp_path)
    with pytest.raises(DataError, match="no vocabulary: got IsADirectoryError"):
        load(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_are_refused_or_whole(tmp_path, seed):
    """Bytes flipped, cut, doubled. Oracle: an error of ours, or a vocabulary that round-trips."""
    draw = random.Random(seed)
    bpe = byte_level_bpe.read(SAMPLE)
    _as_folder(bpe, tmp_path / "hf")
    _as_parlai(bpe, tmp_path / "parlai", 4)
    (tmp_path / "single").mkdir()
    (tmp_path / "single/tokenizer.json").write_text(bpe.tokenizer_json())
    places = [path for path in sorted(tmp_path.glob("*/*")) if path.is_file()]
    refused = 0
    for number in range(40):
        place = draw.choice(places)
        whole = place.read_bytes()
        data, at = bytearray(whole), draw.randrange(len(whole))
        kind = number % 4
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + draw.randrange(1, 50)]
        elif kind == 2:
            del data[at:]
        else:
            data[at:at] = data[at : at + draw.randrange(1, 50)]
        place.write_bytes(data)
        vocabularies._load.cache_clear()
        try:
            found = load(place if place.parent.name == "single" else place.parent)
            assert found.decode(found.encode("Hello there, 😀.")) == "Hello there, 😀."
        except UserError:
            refused += 1
        place.write_bytes(whole)
    vocabularies._load.cache_clear()
    assert refused > 15
