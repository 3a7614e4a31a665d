"""Oracles: the pure Python formatting, the paper's dropout rates, SeqIO's own converters."""

import numpy as np
import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import mixtures
from cosmo.tasks.families import prosocial_file_examples, soda_file_examples
from cosmo.tasks.formatting import Separators, cosmo_input, drop_oldest_turns
from cosmo.tasks.vocabularies import load
from tests import lazily
from tests.tasks.tasks_samples import prosocial_row, soda_row, train_vocabulary, write_lines

seqio = lazily.importorskip("seqio")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Small corpora of both shapes with a train and a validation split."""
    folder = tmp_path_factory.mktemp("corpora")
    rows = [soda_row(i, turns=2 + i % 5) for i in range(20)]
    write_lines(folder / "soda/train.jsonl", rows)
    write_lines(folder / "soda/valid.jsonl", rows[:5])
    rows = [prosocial_row(i, j) for i in range(10) for j in range(3)]
    write_lines(folder / "prosocial/train.json", rows)
    write_lines(folder / "prosocial/valid.json", rows[:6])
    return {"soda_path": folder / "soda", "prosocial_path": folder / "prosocial"}


def _use(name, vocabulary_path, **settings):
    return seqio.get_mixture_or_task(
        mixtures.use(name, vocabulary_path=vocabulary_path, **settings)
    )


def _rows(task, lengths, split="validation", seed=0):
    dataset = task.get_dataset(lengths, split, shuffle=False, seed=seed)
    return list(dataset.as_numpy_iterator())


def _check_equal_to_text(task, examples, vocabulary, lengths, separators=None):
    """The task's ids and texts are those of the formatting functions."""
    separators = separators or Separators()
    rows = _rows(task, lengths)
    examples = list(examples)
    assert [row["id"].decode() for row in rows] == [example.id for example in examples]
    budget = lengths["inputs"] if lengths else 10**6
    for row, example in zip(rows, examples, strict=True):
        fixed = (example.narrative, example.instruction)
        kept = drop_oldest_turns(
            *fixed, example.turns, budget, lambda text: len(vocabulary.encode(text)), separators
        )
        text = cosmo_input(*fixed, kept, separators)
        ids = vocabulary.encode(text)[-(budget - 1) :]
        assert row["inputs"].tolist() == [*ids, vocabulary.eos_id]
        assert row["inputs_pretokenized"].decode() == text
        ids = vocabulary.encode(example.response)[: lengths["targets"] - 1 if lengths else None]
        assert row["targets"].tolist() == [*ids, vocabulary.eos_id]
        assert row["targets_pretokenized"].decode() == example.response


def _check_both_corpora(paths, vocabulary_path, lengths):
    vocabulary = load(vocabulary_path)
    task = _use("soda", vocabulary_path, **paths)
    examples = soda_file_examples(paths["soda_path"], "validation")
    _check_equal_to_text(task, examples, vocabulary, lengths)
    task = seqio.get_mixture_or_task("prosocial_dialog")
    examples = prosocial_file_examples(paths["prosocial_path"], "validation")
    _check_equal_to_text(task, examples, vocabulary, lengths)


@pytest.mark.parametrize("lengths", [None, *({"inputs": n, "targets": 24} for n in (24, 96, 300))])
def test_ids_equal_the_text_of_all_real_rows(shared, t5_vocabulary, lengths):
    """Oracle: T5's vocabulary on `cosmo_input` after `drop_oldest_turns`; 24 cuts into the rest."""
    paths = {
        "soda_path": shared / "data/soda_rows.jsonl",
        "prosocial_path": shared / "data/prosocial_rows.jsonl",
    }
    _check_both_corpora(paths, t5_vocabulary, lengths)


def test_ids_equal_the_text_with_pieces_for_separators(corpora, vocabulary_path):
    """Oracle: as above, with a vocabulary that has the separators, and with other separators."""
    vocabulary = load(vocabulary_path)
    for separators in (Separators(), Separators(" | ", "\n")):
        task = _use("soda", vocabulary_path, separators=separators, **corpora)
        for inputs in (8, 60, 90):
            examples = soda_file_examples(corpora["soda_path"], "validation")
            lengths = {"inputs": inputs, "targets": 16}
            _check_equal_to_text(task, examples, vocabulary, lengths, separators)


def test_ids_equal_the_text_of_the_sample_corpus():
    """Oracle: as above, with the corpus and the vocabulary that come with the repository."""
    paths = {"soda_path": "tasks/sample/soda", "prosocial_path": "tasks/sample/prosocial"}
    lengths = {"inputs": 128, "targets": 48}
    _check_both_corpora(paths, "tasks/sample/vocabulary.model", lengths)


def test_empty_parts_and_odd_characters(tmp_path, vocabulary_path):
    """Oracle: as above, on a narrative-less monologue and on texts with odd white space."""
    odd = ["hello\u00a0 there\tmy", "é café \u4f60\u597d", "a\x1fb", "rain \u200b rain"]
    rows = [
        {"narrative": "", "dialogue": ["hello"] * 3, "speakers": ["Nora"] * 3},
        {"narrative": "x  y", "dialogue": odd, "speakers": ["Nora", "Ben"] * 2},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    task = _use("soda", vocabulary_path, soda_path=path)
    got = _rows(task, None)
    vocabulary = load(vocabulary_path)
    for row, example in zip(got, soda_file_examples(path, "validation"), strict=True):
        turns = [turn.replace("\x1f", "") for turn in example.turns]
        text = cosmo_input(example.narrative, example.instruction, turns)
        assert row["inputs"].tolist() == [*vocabulary.encode(text), vocabulary.eos_id]
    assert got[0]["inputs_pretokenized"] == b"hello"


def test_training_drops_parts_at_the_papers_rates(tmp_path, vocabulary_path):
    """Oracle: 30% and 50%, independently, within four standard errors over 6,000 examples."""
    path = write_lines(tmp_path / "train.jsonl", [soda_row(i, turns=2) for i in range(2000)])
    task = _use("soda", vocabulary_path, soda_path=path)
    dataset = task.get_dataset(None, "train", shuffle=False, seed=3, num_epochs=3)
    texts = [row["inputs_pretokenized"] for row in dataset.as_numpy_iterator()]
    narrative = np.array([b"helps" not in text for text in texts])
    instruction = np.array([b"Imagine" not in text for text in texts])
    assert len(texts) == 6000
    for dropped, chance in (
        (narrative, 0.3),
        (instruction, 0.5),
        (narrative & instruction, 0.15),
    ):
        assert abs(dropped.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / len(texts))
    # A cached corpus must not repeat its draws: the epochs differ.
    assert (narrative[:2000] != narrative[2000:4000]).mean() > 0.3


def test_training_is_repeatable_and_evaluation_keeps_everything(corpora, vocabulary_path):
    """Oracle: the same seed again; another seed; the definition of evaluation."""
    task = _use("soda", vocabulary_path, **corpora)
    texts = [
        [row["inputs_pretokenized"] for row in _rows(task, None, "train", seed)]
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    for row in _rows(task, None, "validation", seed=5):
        assert b"helps" in row["inputs_pretokenized"] and b"Imagine" in row["inputs_pretokenized"]


def test_features_before_the_cache_can_be_cached(corpora, vocabulary_path):
    """Oracle: SeqIO's cache writer takes scalars and vectors of plain types only."""
    import tensorflow as tf

    task = _use("soda", vocabulary_path, **corpora)
    dataset = task.preprocess_precache(task.source.get_dataset("train", shuffle=False))
    for name, spec in dataset.element_spec.items():
        assert isinstance(spec, tf.TensorSpec) and spec.shape.rank <= 1, name
        assert spec.dtype in (tf.string, tf.int32), name


@pytest.mark.parametrize("pack", [False, True])
def test_seqio_converter_takes_the_mixture(corpora, vocabulary_path, pack):
    """Oracle: SeqIO's own checks in EncDecFeatureConverter; packing loses no target token."""
    lengths = {"inputs": 128, "targets": 32}
    _use("cosmo", vocabulary_path, **corpora, rates={"prosocial_dialog": 5e6})
    dataset = seqio.get_dataset(
        "cosmo",
        task_feature_lengths=lengths,
        dataset_split="train",
        shuffle=True,
        seed=1,
        num_epochs=1,
        feature_converter=seqio.EncDecFeatureConverter(pack=pack),
    )
    rows = list(dataset.as_numpy_iterator())
    assert len(rows) > 5
    for row in rows:
        assert row["encoder_input_tokens"].shape == (128,)
        assert row["decoder_target_tokens"].shape == (32,)
    if pack:
        assert max(row["decoder_segment_ids"].max() for row in rows) > 1


def test_mixing_rates_are_the_published_sizes(corpora, vocabulary_path):
    """Oracle: 1,191,582 * 6.6 and 120,236 examples."""
    mixture = _use("cosmo", vocabulary_path, **corpora)
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"soda": pytest.approx(7_864_441.2), "prosocial_dialog": 120_236}


def test_registering_again_replaces(corpora, vocabulary_path):
    """Oracle: the settings of the second call."""
    for metrics_on, expected in ((True, 2), (False, 0)):
        task = _use("soda", vocabulary_path, **corpora, token_metrics=metrics_on)
        assert len(task.predict_metric_fns) == 4
        assert len(task.score_metric_fns) == expected
    assert task.splits == ("train", "validation")


def test_evaluator_of_seqio_runs_the_metrics(corpora, vocabulary_path):
    """Oracle: a model that answers the targets themselves has F1 1 and the perplexity it says."""
    _use("soda", vocabulary_path, **corpora)
    evaluator = seqio.Evaluator(
        "soda",
        seqio.EncDecFeatureConverter(pack=False),
        "validation",
        sequence_length={"inputs": 128, "targets": 32},
    )

    def targets(dataset):
        return [(int(i), row["decoder_target_tokens"]) for i, row in dataset.as_numpy_iterator()]

    def predict(dataset, *_):
        return [(i, ids.tolist()) for i, ids in targets(dataset)]

    def score(dataset, *_):
        counts = [(i, int((ids > 0).sum())) for i, ids in targets(dataset)]
        tokens = [count for _, count in counts]
        scores = [(i, -np.log(7.0) * count) for i, count in counts]
        return scores, {"num_tokens": tokens, "num_correct": tokens}

    future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score, step=0)
    result = future.result()["soda"]
    assert result["f1"] == 1.0 and result["token_accuracy"] == 1.0
    assert result["perplexity"] == pytest.approx(7.0)


def test_names(vocabulary_path, corpora):
    """Oracle: a name of ours, a foreign one, a misspelt one."""
    assert mixtures.use("cosmo", vocabulary_path=vocabulary_path, **corpora) == "cosmo"
    seqio.MixtureRegistry.remove("elsewhere")
    seqio.MixtureRegistry.add("elsewhere", [("soda", 1.0)])
    assert mixtures.use("elsewhere") == "elsewhere"
    seqio.MixtureRegistry.remove("elsewhere")
    with pytest.raises(DataError, match="perhaps 'cosmo'"):
        mixtures.use("cosmos")


def test_missing_data_is_reported_when_it_is_asked_for(tmp_path, vocabulary_path):
    """Oracle: the reader's error, unwrapped; a task whose data is not needed stays silent."""
    task = _use("soda", vocabulary_path, soda_path=tmp_path / "no", prosocial_path=None)
    with pytest.raises(DataError, match="no data for split 'train'"):
        task.get_dataset(None, "train")


def test_a_bad_record_keeps_its_words_through_tensorflow(tmp_path, vocabulary_path):
    """Oracle: the reader's own error text inside TensorFlow's."""
    import tensorflow as tf

    path = write_lines(tmp_path / "train.jsonl", [soda_row(), {"narrative": "x"}])
    task = _use("soda", vocabulary_path, soda_path=path)
    with pytest.raises(tf.errors.OpError) as error:
        _rows(task, None, "train")
    assert f"DataError: {path}:2: field 'dialogue' is missing: got " in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"narrative_dropout": 1.5}, "NARRATIVE_DROPOUT"),
        ({"source": "web"}, "use.source"),
        ({"source": "tfds"}, "use.tfds_data_dir"),
        ({"rates": {"soda": -1}}, "MIXTURE_RATES"),
        ({"rates": {"other": 1}}, "MIXTURE_RATES"),
    ],
)
def test_impossible_settings(vocabulary_path, settings, words):
    """Oracle: the gin name in the error."""
    with pytest.raises(ValueError, match=words):
        mixtures.use("soda", vocabulary_path=vocabulary_path, **settings)


def test_a_vocabulary_that_crosses_white_space_is_refused(tmp_path):
    """Oracle: a model trained without split_by_whitespace."""
    path = train_vocabulary(
        tmp_path / "wide", split_by_whitespace=False, user_defined_symbols=[">\u2581Hi"]
    )
    with pytest.raises(DataError, match="pieces across white space"):
        mixtures.use("soda", vocabulary_path=path)


def test_tfds_gives_the_examples_of_the_files(tmp_path, corpora, vocabulary_path):
    """Oracle: the same corpora read from files."""
    # TensorFlow Datasets 4.9.10 imports it without asking for it.
    pytest.importorskip("importlib_resources")
    import tensorflow_datasets as tfds

    from cosmo.tasks.tfds_builders.prosocial_dialog import prosocial_dialog_dataset_builder
    from cosmo.tasks.tfds_builders.soda import soda_dataset_builder

    builders = {
        "soda": (soda_dataset_builder.Builder, corpora["soda_path"]),
        "prosocial_dialog": (prosocial_dialog_dataset_builder.Builder, corpora["prosocial_path"]),
    }
    for builder, folder in builders.values():
        config = tfds.download.DownloadConfig(manual_dir=folder)
        builder(data_dir=tmp_path).download_and_prepare(download_config=config)

    def by_id(name, split, **settings):
        task = _use(name, vocabulary_path, narrative_dropout=0, **settings, instruction_dropout=0)
        return {row["id"]: row for row in _rows(task, {"inputs": 60, "targets": 16}, split)}

    for name, split in zip(builders, ("train", "validation"), strict=True):
        files = by_id(name, split, **corpora)
        built = by_id(name, split, source="tfds", tfds_data_dir=tmp_path)
        assert files.keys() == built.keys() and len(files) > 5
        for key, row in files.items():
            for feature, value in row.items():
                np.testing.assert_array_equal(value, built[key][feature])
    # Training data from TFDS is dropped from as well.
    task = _use("soda", vocabulary_path, source="tfds", tfds_data_dir=tmp_path)
    texts = [row["inputs_pretokenized"] for row in _rows(task, None, "train")]
    assert 0 < sum(b"Imagine" in text for text in texts) < len(texts)
