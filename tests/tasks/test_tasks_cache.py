"""Oracle of the cached path: the same task read without a cache."""

import json

import numpy as np
import pytest

from cosmo.tasks import mixtures
from tests import lazily
from tests.tasks.tasks_samples import soda_row, write_lines

seqio = lazily.importorskip("seqio")


@pytest.fixture
def cache_folder(tmp_path):
    """An empty folder that SeqIO looks for caches in, for one test."""
    before = seqio.get_global_cache_dirs()
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    yield tmp_path / "cache"
    seqio.set_global_cache_dirs(before)


def _write_cache(task, split, folder):
    """What SeqIO's cache writer writes for a split, without the Beam job around it."""
    import tensorflow as tf

    dataset = task.preprocess_precache(task.source.get_dataset(split, shuffle=False), seed=0)
    rows = list(dataset.as_numpy_iterator())
    folder.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            writer.write(seqio.utils.dict_to_tfexample(row).SerializeToString())
    features = {
        name: {"shape": [None] * spec.shape.rank, "dtype": spec.dtype.name}
        for name, spec in dataset.element_spec.items()
    }
    info = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))
    (folder / "COMPLETED").touch()


def test_shards_of_a_task_are_its_examples(tmp_path, vocabulary_path):
    """Oracle: the unsharded task; its source counts as many, without TensorFlow."""
    path = write_lines(tmp_path / "train.jsonl", [soda_row(i, turns=5) for i in range(30)])
    mixtures.use("soda", soda_path=path, vocabulary_path=vocabulary_path, narrative_dropout=0)
    task = seqio.get_mixture_or_task("soda")

    def ids(index, number):
        dataset = task.get_dataset(
            {"inputs": 24, "targets": 16},
            "train",
            shuffle=False,
            shard_info=seqio.ShardInfo(index, number),
        )
        return [example["id"] for example in dataset.as_numpy_iterator()]

    whole = ids(0, 1)
    shards = [ids(index, 3) for index in range(3)]
    assert shards == [whole[index::3] for index in range(3)]
    assert task.source.count("train") == len(whole) == 120


def test_a_cached_task_gives_the_same_examples(tmp_path, cache_folder, vocabulary_path):
    """Oracle: the live pipeline with the same seed, dropout included, at any sequence length."""
    path = write_lines(tmp_path / "train.jsonl", [soda_row(i, turns=5) for i in range(30)])
    mixtures.use("soda", soda_path=path, vocabulary_path=vocabulary_path)
    task = seqio.get_mixture_or_task("soda")
    for split in ("train", "validation"):
        _write_cache(task, split, cache_folder / "soda")
    for split, inputs in (("train", 24), ("train", 60), ("validation", 60)):
        settings = {"shuffle": False, "seed": 4}
        lengths = {"inputs": inputs, "targets": 16}
        live = task.get_dataset(lengths, split, **settings)
        cached = task.get_dataset(lengths, split, use_cached=True, **settings)
        pairs = list(zip(live.as_numpy_iterator(), cached.as_numpy_iterator(), strict=True))
        assert len(pairs) == 120
        for one, other in pairs:
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name])
