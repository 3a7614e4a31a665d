"""Writing a cache: what its rows hold, how often an epoch reads a task, and what is refused."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import cache_reading, cache_writing, datasets, epoch_slices
from tests import lazily

seqio = lazily.importorskip("seqio")

LENGTHS = {"inputs": 24, "targets": 16}


@dataclasses.dataclass
class Words:
    """Token ids below 1,000; text is numbers with spaces."""

    fingerprint: str = "abc"
    path: str = "words.model"
    size: int = 1000
    eos_id: int = 1
    unk_id: int = 2

    def encode(self, text):
        return [int(word) for word in text.split()]


def register(name, number, *, first=10, unknown=0, steps=(), shuffle_buffer_size=50):
    """A task of `number` examples: targets [first + i, 1], inputs so many tokens as i says."""
    import tensorflow as tf

    feature = seqio.Feature(seqio.PassThroughVocabulary(1000, eos_id=1), add_eos=False)

    def examples(split, shuffle_files, seed=None):
        def make():
            for i in range(number):
                words = [first + i] * (1 + i % 9)
                yield {"inputs": [*words, *[2] * unknown, 1], "targets": [first + i, 1]}

        spec = tf.TensorSpec([None], tf.int32)
        return tf.data.Dataset.from_generator(
            make, output_signature={"inputs": spec, "targets": spec}
        )

    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(examples, splits=["train"]),
        preprocessors=list(steps),
        output_features={"inputs": feature, "targets": feature},
        shuffle_buffer_size=shuffle_buffer_size,
    )
    return name


def mix(name, tasks):
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, tasks)
    return name


def settings(name, **changes):
    return cache_writing.CacheConfig(
        datasets.DatasetConfig(name, LENGTHS, seed=5, **changes), Words()
    )


def examples_of(made, epoch=None):
    """(inputs, targets) of every segment of every row, EOS included, by hand from the features."""
    found = []
    for number in range(made.rows):
        shard, _ = made.place(number)
        if epoch not in (None, shard["epoch"]):
            continue
        batch = made.format.features(made.format.decode(made.records([number])))
        for segment in range(1, batch["encoder_segment_ids"].max() + 1):
            sides = [
                tuple(batch[tokens][batch[ids] == segment].tolist())
                for tokens, ids in (
                    ("encoder_input_tokens", "encoder_segment_ids"),
                    ("decoder_target_tokens", "decoder_segment_ids"),
                )
            ]
            found.append(tuple(sides))
    return found


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_engine_cache_rows_are_seqio_s(tmp_path):
    """Oracle: SeqIO's converter over the same examples in the same order, all its features.

    SeqIO ends a row after every max(lengths) examples too, so there are fewer.
    """
    name = register("cache_a", 23)
    made = cache_writing.write_cache(settings(name, shuffle=False), str(tmp_path / "c"))
    dataset = seqio.get_dataset(
        name, LENGTHS, seqio.EncDecFeatureConverter(pack=True), shuffle=False, verbose=False
    )
    expected = list(dataset.as_numpy_iterator())
    batch = made.format.features(made.format.decode(made.records(range(made.rows))))
    assert made.rows == len(expected)
    assert set(batch) == {f for f in expected[0] if "positions" not in f} == set(datasets.FEATURES)
    for feature, array in batch.items():
        np.testing.assert_array_equal(array, [row[feature] for row in expected], err_msg=feature)


def test_engine_cache_unpacked(tmp_path):
    """Oracle: SeqIO's converter without packing."""
    name = register("cache_a", 9)
    made = cache_writing.write_cache(settings(name, shuffle=False, pack=False), str(tmp_path / "c"))
    converter = seqio.EncDecFeatureConverter(pack=False)
    dataset = seqio.get_dataset(name, LENGTHS, converter, shuffle=False, verbose=False)
    expected = list(dataset.as_numpy_iterator())
    batch = made.format.features(made.format.decode(made.records(range(made.rows))))
    assert set(batch) == set(expected[0])
    for feature, array in batch.items():
        np.testing.assert_array_equal(array, [row[feature] for row in expected], err_msg=feature)


def test_engine_cache_every_example_once_an_epoch(tmp_path):
    """Oracle: SeqIO's own examples of the tasks, counted. Rates as the sizes: a concatenation."""
    name = mix("cache_m", [(register("cache_a", 40), 40), (register("cache_b", 10, first=100), 10)])
    made = cache_writing.write_cache(
        settings(name), str(tmp_path / "c"), epochs=2, shards_per_epoch=3
    )
    live = [
        (tuple(x["inputs"].tolist()), tuple(x["targets"].tolist()))
        for task in ("cache_a", "cache_b")
        for x in seqio.TaskRegistry.get(task).get_dataset(LENGTHS).as_numpy_iterator()
    ]
    for epoch in (0, 1):
        assert Counter(examples_of(made, epoch)) == Counter(live)
    tasks = made.manifest["tasks"]
    assert [tasks[t]["cached"]["examples"] for t in ("cache_a", "cache_b")] == [80, 20]
    tokens = sum(len(inputs) for inputs, _ in live)
    assert made.manifest["totals"]["input_tokens"] == 2 * tokens
    assert len({shard["seed"] for shard in made.manifest["shards"]}) == 6
    orders = [examples_of(made, epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_engine_cache_rates_read_a_task_more_often(tmp_path):
    """Rates 1:1 for 40 and 16 examples: 16 are read 2.5 times, everyone 5 times in two epochs."""
    name = mix("cache_m", [(register("cache_a", 40), 1), (register("cache_b", 16, first=100), 1)])
    made = cache_writing.write_cache(
        settings(name), str(tmp_path / "c"), epochs=2, shards_per_epoch=2
    )
    for epoch in (0, 1):
        read = Counter(targets[0] for _, targets in examples_of(made, epoch))
        assert all(read[10 + i] == 1 for i in range(40))
        assert {read[100 + i] for i in range(16)} == {2, 3}
        assert abs(sum(read[100 + i] for i in range(16)) - 40) <= 1
    total = Counter(targets[0] for _, targets in examples_of(made))
    assert all(abs(total[100 + i] - 5) <= 1 for i in range(16))


def test_engine_cache_times_an_epoch():
    """Oracle: by hand. Published rates are rounded: within 2% they mean a concatenation."""
    times = epoch_slices.times_an_epoch({"a": 3.0, "b": 1.0}, {"a": 4188, "b": 1099})
    assert times == {"a": 1.0, "b": pytest.approx(1 / 1099 / (3 / 4188))}
    sizes = {"a": 7_800_000, "b": 120_236}
    assert epoch_slices.times_an_epoch({"a": 7_864_441.2, "b": 120_236.0}, sizes) == {
        "a": 1.0,
        "b": 1.0,
    }
    for fraction in (0.01, 0.27, 0.5, 0.9):
        k = np.arange(1000.0)
        chosen = np.array([epoch_slices.is_extra(k, epoch, fraction) for epoch in range(20)])
        assert np.all(np.abs(chosen.sum(1) - 1000 * fraction) <= 3)  # of each epoch
        assert np.all(np.abs(chosen.sum(0) - 20 * fraction) <= 1)  # of each example


def test_engine_cache_preprocessors_that_multiply(tmp_path):
    """Rates are of examples after preprocessing. Oracle: 20 become 40, beside 40 at equal rates."""

    import tensorflow as tf

    def twice(dataset):
        return dataset.flat_map(lambda x: tf.data.Dataset.from_tensors(x).repeat(2))

    name = mix(
        "cache_m",
        [(register("cache_a", 20, steps=[twice]), 1), (register("cache_b", 40, first=100), 1)],
    )
    made = cache_writing.write_cache(settings(name), str(tmp_path / "c"))
    assert {entry["times"] for entry in made.manifest["tasks"].values()} == {1.0}
    assert made.manifest["totals"]["examples"] == 80


def test_engine_cache_rate_zero_is_left_out(tmp_path, caplog):
    """Oracle: SeqIO's mixture, which never draws from such a task."""
    caplog.set_level("INFO", logger="cosmo")
    name = mix("cache_m", [(register("cache_a", 4), 1), (register("cache_b", 4), 0)])
    made = cache_writing.write_cache(settings(name), str(tmp_path / "c"))
    assert list(made.manifest["tasks"]) == ["cache_a"] and "cache_b has rate 0" in caplog.text


@pytest.mark.parametrize("how", ["source", "filter"])
def test_engine_cache_empty_task_is_named(tmp_path, how):
    """Oracle: the task's name and its split stand in the error, and no cache is there."""
    steps = [lambda dataset: dataset.filter(lambda x: False)] if how == "filter" else []
    empty = register("cache_empty", 0 if how == "source" else 5, steps=steps)
    name = mix("cache_m", [(register("cache_a", 4), 1), (empty, 1)])
    with pytest.raises(UserError, match="task 'cache_empty' has no examples in split 'train'"):
        cache_writing.write_cache(settings(name), str(tmp_path / "c"))
    with pytest.raises(UserError, match="is not finished"):
        cache_reading.Cache(str(tmp_path / "c"))


def test_engine_cache_unknown_pieces(tmp_path):
    """One of about five pieces unknown is an error with the task's name, and may be allowed; one
    that stands in a separator does not count. Oracle: by hand."""
    name = register("cache_a", 20, unknown=1)
    with pytest.raises(UserError, match=r"of task 'cache_a' are unknown .*words.model"):
        cache_writing.write_cache(settings(name), str(tmp_path / "c"))
    made = cache_writing.write_cache(settings(name), str(tmp_path / "c"), allow_unknown=True)
    pieces = sum(1 + i % 9 + 1 + 1 for i in range(20))  # words, unknown, target
    assert made.manifest["tasks"]["cache_a"]["unknown_share"] == pytest.approx(20 / pieces)
    apart = dataclasses.replace(settings(name), apart=("2",))
    made = cache_writing.write_cache(apart, str(tmp_path / "d"))
    assert made.manifest["tasks"]["cache_a"]["unknown_share"] == 0


def test_engine_cache_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Finished shards are kept as they are, damaged and missing ones come back the same; a note
    without its file counts for nothing. Oracle: the bytes of a run that was not stopped."""
    name = register("cache_a", 60)
    whole = tmp_path / "whole"
    cache_writing.write_cache(settings(name), str(whole), epochs=2, shards_per_epoch=3)
    stopped, written = tmp_path / "stopped", []

    def write(config, units, plan, processes, shard, report):
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(shard)
        original(config, units, plan, processes, shard, report)

    original, limit = cache_writing._write_shard, 3
    monkeypatch.setattr(cache_writing, "_write_shard", write)
    with pytest.raises(KeyboardInterrupt, match="finished shards are kept"):
        cache_writing.write_cache(settings(name), str(stopped), epochs=2, shards_per_epoch=3)
    with pytest.raises(UserError, match="is not finished"):
        cache_reading.Cache(str(stopped))
    (stopped / cache_reading.shard_name(1, 6)).unlink()
    (stopped / cache_reading.WORK / "partial-123").write_text("half a shard")
    limit = 99
    cache_writing.write_cache(settings(name), str(stopped), epochs=2, shards_per_epoch=3)
    assert written == [0, 1, 2, 1, 3, 4, 5]
    assert files(stopped) == files(whole)
    damaged = stopped / cache_reading.shard_name(4, 6)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    cache_writing.write_cache(settings(name), str(stopped), epochs=2, shards_per_epoch=3)
    assert written[7:] == [4] and files(stopped) == files(whole)
    assert not (stopped / cache_reading.WORK).exists()


def test_engine_cache_other_settings_and_occupied_folders(tmp_path):
    """Oracle: the setting that differs, with both values; a folder of other files stays whole."""
    name, folder = register("cache_a", 9), tmp_path / "c"
    cache_writing.write_cache(settings(name), str(folder), recipe="A = 1\nB = 2")
    for said, changes in (
        ("begun with epochs=1, this command has 2", {"epochs": 2}),
        (
            r"begun with recipe=\['B = 2'\], this command has \['B = 3'\]",
            {"recipe": "A = 1\nB = 3"},
        ),
    ):
        with pytest.raises(UserError, match=said):
            cache_writing.write_cache(
                settings(name), str(folder), **{"recipe": "A = 1\nB = 2", **changes}
            )
    cache_writing.write_cache(settings(name), str(folder), epochs=2, overwrite=True)
    # Modules may be renamed, values may not.
    recipes = [
        f"from x import {module}\n{module}.Config.path = {path!r}\nb.c = @{module}.Config()"
        for module, path in (("old", "a.txt"), ("new_name", "a.txt"), ("new_name", "b.txt"))
    ]
    again = {"overwrite": True, "epochs": 2}
    cache_writing.write_cache(settings(name), str(folder), recipe=recipes[0], **again)
    cache_writing.write_cache(settings(name), str(folder), recipe=recipes[1], epochs=2)
    with pytest.raises(UserError, match=r"recipe=\[\"Config.path = 'a.txt'\"\], this command"):
        cache_writing.write_cache(settings(name), str(folder), recipe=recipes[2], epochs=2)
    assert json.loads((folder / cache_reading.MANIFEST).read_text())["epochs"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.txt and no cache"):
        cache_writing.write_cache(settings(name), str(tmp_path / "mine"))
    cache_writing.write_cache(settings(name), str(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "mine" / cache_reading.WORK).exists()
    with pytest.raises(UserError, match=r"cannot write .*give another output"):
        cache_writing.write_cache(settings(name), str(tmp_path / "mine" / "thesis.txt"))
