"""What CO3 leaves is SODA: the published fields, read by the same readers and tasks."""

import pytest

from cosmo.tasks.families import soda_file_examples
from cosmo.tasks.formatting import cosmo_input
from cosmo.tasks.readers import read_soda
from data_pipeline.co3 import schema
from tests.data_pipeline.loopback import co3, lines, teacher, write_triples
from tools.co3_demo import write_splits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder; `soda` in it has a file a split."""
    folder = tmp_path_factory.mktemp("corpus")
    write_triples(folder / "triples.jsonl", 60)
    with teacher() as (url, _):
        assert co3(folder / "triples.jsonl", folder, url) == 0
    write_splits(folder, folder / "soda")
    return folder


def test_fields_are_the_published_ones(made, shared):
    """Oracle: five published rows: names, order, and the type of each value."""
    published = lines(shared / "data/soda_rows.jsonl")[0]
    for row in lines(made / "soda.jsonl"):
        assert list(row) == list(published)
        assert [type(value) for value in row.values()] == [type(v) for v in published.values()]
        assert all(isinstance(text, str) for text in (*row["dialogue"], *row["speakers"]))


def test_readers_give_every_record_back(made):
    """Oracle: the records as plain JSON, through JSON lines and Parquet, all and by split."""
    rows = lines(made / "soda.jsonl")
    schema.write_parquet(made)
    for path in (made / "soda.jsonl", made / "soda.parquet"):
        found = [(d.narrative, [*d.dialogue], [*d.speakers]) for d in read_soda({"train": path})]
        assert found == [(r["narrative"], r["dialogue"], r["speakers"]) for r in rows]
    counts = [sum(1 for _ in read_soda(made / "soda", s)) for s in ("train", "validation")]
    ours = [sum(row["split"] == name for row in rows) for name in ("train", "valid")]
    assert counts == ours and all(counts)
    assert all(schema.soda_row(schema.from_row(row)) == row for row in rows)


def test_the_seqio_task_reads_it(made):
    """Oracle: the pure formatting of the same files; every turn but the first is a target."""
    pytest.importorskip("seqio")
    import seqio

    from cosmo.tasks import mixtures

    vocabulary = "tasks/sample/vocabulary.model"
    mixtures.use("soda", soda_path=made / "soda", vocabulary_path=vocabulary)
    task = seqio.get_mixture_or_task("soda")
    dataset = task.get_dataset(None, "validation", shuffle=False)
    found = [
        (row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())
        for row in dataset.as_numpy_iterator()
    ]
    examples = list(soda_file_examples(f"{made}/soda", "validation"))
    wanted = [(cosmo_input(e.narrative, e.instruction, e.turns), e.response) for e in examples]
    assert found == wanted
    valid = [row for row in lines(made / "soda.jsonl") if row["split"] == "valid"]
    assert len(found) == sum(len(row["dialogue"]) - 1 for row in valid)
