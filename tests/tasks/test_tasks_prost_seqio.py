"""Prost's SeqIO tasks. Oracles: the pure functions of `prost_text`, SeqIO's converter."""

import itertools
import json

import numpy as np
import pytest

from cosmo.engine.base.errors import DataError
from cosmo.engine.data import datasets, seqio_reader
from cosmo.tasks import metrics
from cosmo.tasks.families import Corpus
from cosmo.tasks.prost_text import (
    VARIANTS,
    ProstExample,
    gold_prefix_ids,
    history_ids,
    history_text,
    target_ids,
    target_text,
)
from cosmo.tasks.vocabularies import load, seqio_vocabulary
from tests import lazily

seqio = lazily.importorskip("seqio")
pytest.importorskip("tokenizers")

SAMPLE = "tasks/sample/prost/vocabulary.json"
LENGTHS = {"inputs": 20, "targets": 12}
METRICS = (metrics.f1, metrics.bleu4)


def _examples(split):
    """Yield examples of every kind: short and cut, with and without RoTs, odd characters."""
    for number in range(70):
        turns = tuple(f"turn {n} \n of {number} 😀" for n in range(number % 5 + 1))
        rots = (f"It's wrong to {number}.", "You should be kind.") if number % 3 else ()
        yield ProstExample(turns, f"{split}   answer, {'so ' * (number % 9)}.", rots, f"d-{number}")


def _corpus(examples=_examples):
    def files(split):
        if split not in ("train", "validation"):
            raise DataError(f"no data for split {split!r}")
        return ["a file"]

    return Corpus(examples, files, lambda: ("train", "validation"))


def _register(variant="rot_and_response", examples=_examples, **settings):
    from cosmo.tasks import prost_seqio

    prost_seqio.register(
        {"prost_test_a": _corpus(examples), "prost_test_b": _corpus(examples)},
        {"prost_test": {"prost_test_a": 9.0, "prost_test_b": 0.0}},
        {"prost_test_a": METRICS, "prost_test_b": METRICS},
        **{"vocabulary_path": SAMPLE, "variant": variant, "token_metrics": True, **settings},
        shuffle_buffer_size=100,
    )
    return seqio.get_mixture_or_task("prost_test_a")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [LENGTHS, {"inputs": 500, "targets": 500}, None])
def test_ids_and_texts_are_the_pure_ones(variant, lengths):
    """Oracle: `history_ids`, `target_ids` and their texts."""
    task, vocabulary = _register(variant), load(SAMPLE)
    rows = list(task.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator())
    inputs, targets = (lengths or {}).get("inputs"), (lengths or {}).get("targets")
    for row, example in zip(rows, _examples("train"), strict=True):
        assert row["id"].decode() == example.id
        assert row["inputs"].tolist() == history_ids(example.turns, vocabulary, inputs).ids
        assert row["targets"].tolist() == target_ids(example, vocabulary, variant)[:targets]
        assert row["inputs_pretokenized"].decode() == history_text(example.turns)
        assert row["targets_pretokenized"].decode() == target_text(example, variant)
        prefix = [] if variant == "response_only" else gold_prefix_ids(example.rots, vocabulary)
        assert row["num_given"] == len(prefix)
        gold = variant == "gold_rot_and_response"
        assert row["prefix"].tolist() == prefix if gold else "prefix" not in row


def test_real_rows(shared):
    """Oracle: as above, on ProsocialDialog's rows with BlenderBot's lengths."""
    rows = (shared / "data/prosocial_rows.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [
        ProstExample((row["context"],), row["response"], tuple(row["rots"] or ()), str(index))
        for index, row in enumerate(map(json.loads, rows))
    ]
    task, vocabulary = _register(examples=lambda split: iter(examples)), load(SAMPLE)
    lengths = {"inputs": 128, "targets": 128}
    found = task.get_dataset(lengths, "validation", shuffle=False).as_numpy_iterator()
    for row, example in zip(found, examples, strict=True):
        assert row["inputs"].tolist() == history_ids(example.turns, vocabulary, 128).ids
        assert row["targets"].tolist() == target_ids(example, vocabulary)[:128]


def test_scores_are_of_the_response_alone():
    """Oracle: the ids of the response and the end token, by hand."""
    vocabulary = load(SAMPLE)
    _register("gold_rot_and_response")
    config = datasets.DatasetConfig("prost_test", {"inputs": 40, "targets": 60}, "train")
    (found,) = seqio_reader.task_examples(config, 9)
    batch = datasets.make_batch(found.rows, 10, 40, 60)
    for index, example in enumerate(itertools.islice(_examples("train"), 9)):
        response = [*vocabulary.encode(example.response), vocabulary.eos_id]
        row, weights = found.rows[index], batch["decoder_loss_weights"][index]
        assert list(row.target_ids) == [*row.prefix_ids, *response]
        assert bool(row.prefix_ids) == bool(example.rots)
        assert batch["decoder_target_tokens"][index][weights > 0].tolist() == response
    assert not batch["decoder_loss_weights"][9].any()
    _register("rot_and_response")
    (found,) = seqio_reader.task_examples(config, 2)
    assert [row.prefix_ids for row in found.rows] == [(), ()]
    assert [row.num_given > 0 for row in found.rows] == [False, True]


def test_shards_and_mixture():
    """Oracle: every third example; a mixture without the task of rate 0."""
    task = _register()
    shard = seqio.ShardInfo(index=1, num_shards=3)
    rows = task.get_dataset(LENGTHS, "train", shuffle=False, shard_info=shard).as_numpy_iterator()
    assert [row["id"].decode() for row in rows] == [f"d-{n}" for n in range(1, 70, 3)]
    mixture = seqio.get_mixture_or_task("prost_test")
    assert [task.name for task in mixture.tasks] == ["prost_test_a"]


def test_the_converter_makes_the_batch():
    """Oracle: targets as they are, the decoder's inputs one to the right after 0."""
    _register()
    converter = seqio.EncDecFeatureConverter(pack=False)
    dataset = seqio.get_dataset(
        "prost_test", LENGTHS, dataset_split="train", shuffle=False, feature_converter=converter
    )
    for row in itertools.islice(dataset.as_numpy_iterator(), 5):
        targets = row["decoder_target_tokens"]
        np.testing.assert_array_equal(row["decoder_input_tokens"], [0, *targets[:-1]])
        assert len(row["encoder_input_tokens"]) == LENGTHS["inputs"]


def test_text_metrics_are_of_the_response():
    """Oracle: the metrics' own values on the bare responses."""
    task = _register()
    assert {f.__name__ for f in task.predict_metric_fns} == {"f1", "bleu4"}
    assert {f.__name__ for f in task.score_metric_fns} == {"perplexity", "token_accuracy"}
    post = task.postprocess_fn
    targets = [post(target_text(e), example={}, is_target=True) for e in _examples("train")]
    assert targets == [e.response.strip() for e in _examples("train")]
    answer = post("__rot__ Be kind. __response__ train answer, so", example={}, is_target=False)
    assert metrics.f1(targets[1:2], [answer]) == metrics.f1(["train   answer, so ."], [answer])
    assert not _register(token_metrics=False).score_metric_fns


def test_the_twin_of_a_vocabulary():
    """Oracle: the vocabulary itself; SeqIO's decode stops after the end token as ours does."""
    import tensorflow as tf

    ours, theirs = load(SAMPLE), seqio_vocabulary(SAMPLE)
    assert (theirs.vocab_size, theirs.eos_id, theirs.unk_id, theirs.pad_id) == (1008, 2, 3, 0)
    for text in ("Hello there.", "a\nb  c", "😀 é", "nul\0", ""):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids == theirs.encode_tf(text).numpy().tolist()
        assert theirs.decode([*ids, 2, 9]) == ours.decode(ids)
        assert theirs.decode_tf(tf.constant([*ids, 2, 9])).numpy().decode() == ours.decode(ids)
        (encoded,) = tf.data.Dataset.from_tensors(text).map(theirs.encode_tf).as_numpy_iterator()
        assert encoded.tolist() == ids
    texts = ["Hello", "so it is"]
    rows = tf.constant([[*ours.encode(text), 2, *[0] * 20][:20] for text in texts])
    assert [text.decode() for text in theirs.decode_tf(rows).numpy()] == texts
    assert theirs == seqio_vocabulary(SAMPLE)
    assert hash(theirs) == hash(seqio_vocabulary(SAMPLE))
    assert theirs != seqio.PassThroughVocabulary(1008)


def test_bad_settings(vocabulary_path):
    """Oracle: the words of the error."""
    with pytest.raises(DataError, match="variant='both'"):
        _register("both")
    with pytest.raises(DataError, match="no rows for Prost's marks"):
        _register(vocabulary_path=vocabulary_path)
    with pytest.raises(DataError, match="no data for split 'test'"):
        _register().get_dataset(LENGTHS, "test", shuffle=False)
