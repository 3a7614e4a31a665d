"""Reading a cache of packed rows: its format, the order of reading, positions, and damage."""

import dataclasses
import json
import logging
import shutil
from collections import Counter

import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import cache_reading, datasets, reader
from cosmo.engine.data.cache_reading import Cache, RowFormat
from cosmo.engine.data.packing import Counts, Packer, occurrences

FORM = RowFormat(inputs=24, targets=16, packed=True, dtype="uint16")


@dataclasses.dataclass
class Words:
    """What the engine asks of a vocabulary."""

    fingerprint: str = "abc"
    path: str = "words.model"
    size: int = 40


def write(folder, counts=(5, 0, 6), form=FORM):
    """A cache whose row i holds the tokens 2 + i, in shards of `counts` rows."""
    from array_record.python import array_record_module

    folder.mkdir()
    shards, number = [], 0
    for shard, count in enumerate(counts):
        path = folder / cache_reading.shard_name(shard, len(counts))
        file = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(count):
            row = np.zeros(form.width, np.int64)
            row[0] = row[form.inputs] = 2 + number
            if form.packed:
                row[form.inputs + form.targets] = row[2 * form.inputs + form.targets] = 1
            file.write(form.encode(row, [f"example-{number}"]))
            number += 1
        file.close()
        size = path.stat().st_size
        shards.append({"file": path.name, "rows": count, "bytes": size, "sha256": f"{shard}"})
    manifest = {
        "version": cache_reading.VERSION,
        "name": "numbers",
        "split": "train",
        "epochs": 1,
        "format": dataclasses.asdict(form),
        "features": form.feature_names,
        "vocabulary": dataclasses.asdict(Words()),
        "totals": {"examples": number, "input_tokens": number, "target_tokens": number},
        "shards": shards,
    }
    manifest["fingerprint"] = cache_reading.fingerprint(manifest)
    (folder / cache_reading.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of 11 rows; tests copy it before they harm it."""
    return write(tmp_path_factory.mktemp("cache") / "rows")


def config(folder, **changes):
    settings = {"batch_size": 4, "seed": 3, "cache_path": str(folder), **changes}
    return datasets.DatasetConfig("numbers", {"inputs": 24, "targets": 16}, **settings)


def test_engine_rows_features_are_those_of_the_packed_examples(pack, examples):
    """Oracle: the conftest's packing, written out by hand from the same examples."""
    packer, records = Packer(FORM), []
    for i, (inputs, targets) in enumerate(examples):
        records += packer.add(inputs, targets, f"id-{i}")
    records += packer.finish()
    assert [FORM.names(record) for record in records] == [
        ["id-0", "id-1", "id-2"],
        ["id-3", "id-4", "id-5"],
    ]
    batch = FORM.features(FORM.decode(records))
    expected = pack([examples[:3], examples[3:]], count=2)
    assert batch.keys() == expected.keys() == set(FORM.feature_names) == set(datasets.FEATURES)
    for name, array in batch.items():
        assert array.dtype == np.int32 and array.flags.c_contiguous, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_engine_rows_unpacked_and_wide(examples):
    """One example a row without segments, ids beyond 16 bits. Oracle: `datasets.make_batch`."""
    form = RowFormat(24, 16, packed=False, dtype="int32")
    packer, records = Packer(form), []
    wide = [(inputs * 100_000, targets) for inputs, targets in examples]
    for inputs, targets in wide:
        records += packer.add(inputs, targets, "")
    records += packer.finish()
    batch = form.features(form.decode(records))
    lines = [datasets.Row("", "", tuple(i.tolist()), "", tuple(t.tolist())) for i, t in wide]
    expected = datasets.make_batch(lines, len(lines), 24, 16)
    assert batch.keys() == expected.keys()
    for name, array in batch.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_engine_rows_counts_leave_separators_and_eos_out():
    """Oracle: counted by hand; 2 is unknown, 1 EOS, (3, 2, 7) a separator."""
    counts = Counts(["a", "b"], limit=100, eos_id=1, unk_id=2, apart=[(3, 2, 7)])
    inputs = np.array([5, 3, 2, 7, 2, 1, 6, 3, 2, 1])
    counts.add(np.array([0, 1]), {"inputs": (inputs, np.array([6, 4]))})
    assert counts.sums["a"] == {"examples": 1, "inputs_tokens": 6, "pieces": 2, "unknown": 1}
    assert counts.sums["b"] == {"examples": 1, "inputs_tokens": 4, "pieces": 3, "unknown": 1}
    assert occurrences(np.array([3, 2]), (3, 2, 7)).tolist() == [False, False]
    with pytest.raises(UserError, match="token id 100; it must be below 100"):
        counts.add(np.array([0]), {"inputs": (np.array([100]), np.array([1]))})


def test_engine_rows_order_is_a_permutation_each_time():
    """Property: all rows once, another order each time and for each seed, one for the same."""
    for count in (1, 2, 11, 1000):
        orders = [
            cache_reading.row_numbers(epoch * count, (epoch + 1) * count, count, seed=seed)
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        for order in orders:
            assert sorted(order) == list(range(count))
        if count == 1000:
            assert len({order.tobytes() for order in orders}) == 4
            again = cache_reading.row_numbers(1000, 2000, count, seed=0)
            np.testing.assert_array_equal(again, orders[1])
            # Neither sorted nor nearly: a uniform order has 1000^2/3 on average.
            assert 300_000 < np.abs(orders[0] - np.arange(1000)).sum() < 366_000
    assert cache_reading.row_numbers(9, 13, 11, seed=None).tolist() == [9, 10, 0, 1]


def take(settings, count, position, num_shards):
    """`count` batches as `num_shards` processes read them: (row numbers seen, position)."""
    readers = [
        reader.train_batches(settings, position=position, shard=shard, num_shards=num_shards)
        for shard in range(num_shards)
    ]
    seen: list[int] = []
    for _ in range(count):
        parts = [next(reader) for reader in readers]
        tokens = [part.arrays["encoder_input_tokens"][:, 0] - 2 for part in parts]
        assert all(len(t) == settings.batch_size // num_shards for t in tokens)
        batch = np.concatenate(tokens)
        for part in parts:  # each process knows the whole batch
            np.testing.assert_array_equal(part.rows, batch)
            assert part.rows.dtype == np.int64 and part.position == parts[0].position
        seen += batch.tolist()
        position = json.loads(json.dumps(parts[0].position))
    for open_reader in readers:
        open_reader.close()
    return seen, position


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_engine_rows_every_row_once_whoever_reads(folder, num_shards):
    """33 rows are three times through 11, across the ends of epochs. Property: a multiset, and the
    order of a single reader."""
    settings = config(folder)
    alone, _ = take(settings, 9, None, 1)
    seen, position = take(settings, 9, None, num_shards)
    assert seen == alone
    assert position["rows"] == 36
    for epoch in range(3):
        assert sorted(seen[11 * epoch : 11 * (epoch + 1)]) == list(range(11))
    assert seen[:11] != seen[11:22]


def test_engine_rows_readers_and_batch_size_may_change(folder):
    """Other numbers of readers and other batches between runs, in mid-epoch. Oracle: one run."""
    whole, _ = take(config(folder, batch_size=2), 22, None, 1)
    seen, position = [], None
    changes = [(4, 2, 4), (2, 1, 1), (6, 1, 2), (8, 1, 4), (1, 2, 1), (4, 3, 2), (2, 1, 2)]
    for batch_size, count, num_shards in changes:
        part, position = take(config(folder, batch_size=batch_size), count, position, num_shards)
        seen += part
    assert len(seen) == 40 and seen == whole[: len(seen)]
    assert Counter(seen[:33]) == dict.fromkeys(range(11), 3)


def test_engine_rows_says_what_it_reads(folder, caplog):
    """Oracle: the cache's numbers, by hand: 11 rows, of 40 positions each 2 filled."""
    caplog.set_level(logging.INFO, logger="cosmo")
    next(reader.train_batches(config(folder), num_steps=11))
    said = "\n".join(caplog.messages)
    assert "11 rows of numbers, train (1 epoch, 1.00 examples a row, 95.0% padding)" in said
    assert "the run needs 44 rows, the cache has 11: reading it 4.0 times" in said


def test_engine_rows_position_of_another_cache_or_seed(folder, tmp_path, caplog):
    """A checkpoint of another cache starts this one anew, and says so; a new seed goes on."""
    other = write(tmp_path / "other", counts=(7,), form=dataclasses.replace(FORM, dtype="int32"))
    _, position = take(config(folder), 2, None, 1)
    seen, after = take(config(other), 1, position, 1)
    assert "another cache" in caplog.text and after["rows"] == 4
    assert seen == take(config(other), 1, None, 1)[0]
    _, after = take(config(folder, seed=4), 1, position, 1)
    assert "another RANDOM_SEED" in caplog.text and after["rows"] == 12
    assert (
        cache_reading.starting_count(Cache(str(folder)), None, 3) == 0
    )  # a run that read live SeqIO


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        (
            {},
            Words("xyz", "other.model", 50),
            ["vocabulary mismatch", "words.model", "other.model"],
        ),
        ({"pack": False}, None, ["other packing: True there, False here"]),
        ({"split": "validation"}, None, ["other split: train there, validation here"]),
        ({"task_feature_lengths": {"inputs": 24, "targets": 32}}, None, ["other lengths", "32"]),
    ],
)
def test_engine_rows_refuses_another_cache_than_wanted(folder, changes, words, said):
    """Oracle: the words that each difference is to be named by."""
    with pytest.raises(UserError) as error:
        cache_reading.open_cache(dataclasses.replace(config(folder), **changes), words)
    assert all(word in str(error.value) for word in [*said, "CACHE_PATH"]), error.value


def test_engine_rows_missing_or_unfinished(tmp_path):
    """Oracle: the words for each state of a folder."""
    with pytest.raises(UserError, match="no cache in"):
        Cache(str(tmp_path))
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="is not finished"):
        Cache(str(tmp_path))
    (tmp_path / cache_reading.MANIFEST).write_text('{"version": 99}')
    with pytest.raises(UserError, match="format 99"):
        Cache(str(tmp_path))
    (tmp_path / cache_reading.MANIFEST).write_text('{"ver')
    with pytest.raises(UserError, match="cannot read"):
        Cache(str(tmp_path))
    with pytest.raises(UserError, match="local or mounted"):
        Cache("gs://bucket/rows")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: flip(path, 100), "is damaged"),
        (lambda path: flip(path, path.stat().st_size - 65536), "is damaged"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "is damaged"),
    ],
    ids=["missing", "truncated", "a record", "the index", "zeros"],
)
def test_engine_rows_damage_names_the_shard(folder, tmp_path, harm, said):
    """Oracle: the file that was harmed, and no other, stands in one line. Sizes are compared when a
    cache is opened, records when they are read."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / cache_reading.shard_name(2, 3)
    harm(path)
    with pytest.raises(UserError) as error:
        next(reader.train_batches(config(copy, batch_size=12)))
    assert path.name in str(error.value) and said in str(error.value)
    assert "python -m cosmo cache" in str(error.value)
