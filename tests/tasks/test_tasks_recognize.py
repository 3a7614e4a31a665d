"""Oracles: the real rows of each corpus, and first records after the publishers' formats."""

import gzip
import json

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks.conversations import read_blended, read_dailydialog, read_empathetic
from cosmo.tasks.norms import mic_examples, norm_bank_examples, social_chemistry_examples
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.recognize import looks_like

REAL = {
    "soda_rows.jsonl": "SODA",
    "prosocial_rows.jsonl": "ProsocialDialog",
    "prosocial_direct_download.json": "ProsocialDialog (direct download)",
    "dailydialog_validation.txt": "DailyDialog",
    "atomic_triples.jsonl": "ATOMIC-2020 triples",
    "toxichat_dev.jsonl": "ToxiChat",
    "sbic_dev.csv": "SBIC",
}
TRIPLE = {"head": "PersonX eats", "relation": "xNeed", "tail": "to cook"}
WRITTEN = [
    ("BlendedSkillTalk", [{"free_turker_utterance": "a", "guided_turker_utterance": "b"}]),
    ("Wizard of Wikipedia", [{"chosen_topic": "a", "persona": "b", "dialog": []}]),
    ("Topical-Chat", {"t_1": {"content": [{"message": "a", "agent": "agent_1"}]}}),
    ("ATOMIC-10X", {**TRIPLE, "rec_0.5": True, "p_valid_model": 0.9}),
    ("ATOMIC-10X with names", {**TRIPLE, "x": "Ann", "x_relations": True}),
    ('records {"turns": [...]}', {"turns": ["a"]}),
    (None, {"name": "x"}),
]
TEXTS = [
    ("EmpatheticDialogues", "conv_id,utterance_idx,context,prompt,speaker_idx,utterance\n"),
    ("Social Chemistry 101", "area\trot-agree\tsituation\trot\n"),
    ("MIC", "QA,Q,A,rot,split\n"),
    ("Commonsense Norm Bank", "\tinput_sequence\tclass_label\ttext_label\n"),
    ("Commonsense Norm Bank (relative)", "action_1\taction_2\ttargets\n"),
    ("Commonsense Norm Bank (text to text)", "inputs\ttargets\n"),
    ("PersonaChat", "1 your persona: i ski.\n2 hi\thello\t\ta|b\n"),
    ("PersonaChat", "1 hi\thello\t\ta|b\n"),
    (None, "Once upon a time.\n"),
    (None, ""),
]


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared, tmp_path, name):
    """Oracle: what the file is; the same gzipped."""
    assert looks_like(shared / "data" / name) == REAL[name]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((shared / "data" / name).read_bytes()))
    assert looks_like(packed) == REAL[name]


@pytest.mark.parametrize(("corpus", "first"), WRITTEN)
def test_first_records(tmp_path, corpus, first):
    """Oracle: FORMATS' fields, also where the record is longer than what is looked at."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(first))
    assert looks_like(path) == corpus
    path.write_text(json.dumps(first)[:-1] + " " * 100_000 + json.dumps(first)[-1])
    assert looks_like(path) == corpus


@pytest.mark.parametrize(("corpus", "text"), TEXTS)
def test_tables_and_texts(tmp_path, corpus, text):
    """Oracle: the publishers' headers and marks."""
    path = tmp_path / "x.txt"
    path.write_text(text)
    assert looks_like(path) == corpus


def test_parquet_and_missing_files(tmp_path):
    """Oracle: the columns; nothing there."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"narrative": "a", "dialogue": ["b"], "speakers": ["c"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert looks_like(tmp_path / "x.parquet") == "SODA"
    (tmp_path / "y.parquet").write_text("no Parquet")
    assert looks_like(tmp_path / "y.parquet") is None
    assert looks_like(tmp_path / "nothing.json") is None


READERS = {
    "SODA": (read_soda, "soda_rows.jsonl"),
    "ProsocialDialog": (read_prosocial, "prosocial_rows.jsonl"),
    "DailyDialog": (read_dailydialog, "dailydialog_validation.txt"),
    "EmpatheticDialogues": (read_empathetic, None),
    "BlendedSkillTalk": (read_blended, None),
    "Social Chemistry 101": (social_chemistry_examples, None),
    "MIC": (mic_examples, None),
    "Commonsense Norm Bank": (lambda p: norm_bank_examples({"yes_no": p}, "yes_no"), None),
}


@pytest.mark.parametrize("corpus", READERS)
@pytest.mark.parametrize("name", REAL)
def test_every_reader_says_what_a_mistaken_file_looks_like(shared, corpus, name):
    """Oracle: the name of the corpus in the error; a reader's own files raise none."""
    read, own = READERS[corpus]
    if name == own or (corpus, name) == ("ProsocialDialog", "prosocial_direct_download.json"):
        assert next(iter(read(shared / "data" / name)))
        return
    with pytest.raises(DataError) as error:
        list(read(shared / "data" / name))
    assert f" looks like {REAL[name]}, not like {corpus}. " in str(error.value)
