"""Oracles: SeqIO's own vocabulary on the same model, SHA-256, hand-made id lists."""

import hashlib
import json

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks.vocabularies import load, seqio_vocabulary
from tests.tasks.tasks_samples import train_vocabulary


def _real_texts(shared):
    rows = (shared / "data/soda_rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for row in rows for text in json.loads(row)["dialogue"]]
    dialogues = (shared / "data/dailydialog_validation.txt").read_text(encoding="utf-8")
    return [*texts, *dialogues.splitlines()[:200], "N <sep> R <sep> a <turn> b ~ {x}"]


def test_equals_seqio_on_real_texts(shared, t5_vocabulary, vocabulary_path):
    """Oracle: seqio.SentencePieceVocabulary, whose decode stops after EOS as ours does."""
    for path in (t5_vocabulary, vocabulary_path, "tasks/sample/vocabulary.model"):
        ours, theirs = load(path), seqio_vocabulary(path)
        assert (ours.size, ours.eos_id, ours.unk_id) == (
            theirs.vocab_size,
            theirs.eos_id,
            theirs.unk_id,
        )
        for text in _real_texts(shared):
            ids = ours.encode(text)
            assert ids == theirs.encode(text)
            assert ours.decode(ids) == theirs.decode(ids)


def test_t5_vocabulary_is_the_published_one(t5_vocabulary):
    """Oracle: 32,100 pieces; `<sep>` costs six and `<turn>` four."""
    vocabulary = load(t5_vocabulary)
    assert vocabulary.size == 32100
    assert (len(vocabulary.encode(" <sep> ")), len(vocabulary.encode(" <turn> "))) == (6, 4)


def test_decode_cuts_at_eos_and_drops_padding(vocabulary_path):
    """Oracle: the text put in."""
    vocabulary = load(vocabulary_path)
    ids = vocabulary.encode("hello my friend")
    assert vocabulary.decode([0, *ids, 0, 1, *ids, 0, 0]) == "hello my friend"
    assert vocabulary.decode([]) == vocabulary.decode([1]) == ""
    assert vocabulary.decode([vocabulary.size + 5]) == vocabulary.decode([2])


def test_fingerprint_and_cache(vocabulary_path):
    """Oracle: hashlib over the pieces, without T5's sentinels at the end."""
    vocabulary = load(vocabulary_path)
    pieces = [vocabulary.processor.id_to_piece(i) for i in range(vocabulary.size)]
    pieces = [piece for piece in pieces if "<extra_id_" not in piece]
    assert vocabulary.fingerprint == hashlib.sha256("\n".join(pieces).encode()).hexdigest()
    assert load(str(vocabulary_path)) is vocabulary


def test_fingerprint_without_sentinels(shared, tmp_path):
    """T5's vocabulary as HuggingFace keeps it: 32,000 pieces. Oracle: that of all 32,100."""
    from sentencepiece import sentencepiece_model_pb2

    path = shared / "data/t5_cc_all.32000.100extra.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    del model.pieces[32000:]
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    short = load(tmp_path / "spiece.model")
    assert (short.size, load(path).size) == (32000, 32100)
    assert short.fingerprint == load(path).fingerprint
    model.pieces[500].piece = "another"
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    assert load(tmp_path / "other.model").fingerprint != short.fingerprint


def test_what_is_no_vocabulary_of_ours(tmp_path):
    """Oracle: the words of the error."""
    with pytest.raises(DataError, match="no vocabulary: got FileNotFoundError"):
        load(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(DataError, match="not a vocabulary"):
        load(tmp_path / "text.model")
    other = train_vocabulary(tmp_path / "other", pad_id=3, eos_id=2, unk_id=0, bos_id=1)
    with pytest.raises(DataError, match=r"got \{'pad': 3, 'eos': 2, 'unk': 0\}"):
        load(other)
