"""Croissant metadata beside the corpora that the pipelines write."""

import hashlib
import json
import pathlib

import pytest

from data_pipeline.co3 import card as co3_card
from data_pipeline.co3 import croissant, schema
from data_pipeline.prosocial import card as prosocial_card

SAMPLE = pathlib.Path("tasks/sample/prosocial")
SODA = {
    **dict.fromkeys(schema.SODA_FIELDS, ""),
    "dialogue": ["Hi!", "Hello."],
    "speakers": ["Ann", "Bob"],
    "original_index": 0,
}


@pytest.fixture
def soda(tmp_path):
    """Write a corpus of one record in SODA's form with its metadata; return the folder."""
    (tmp_path / "soda.jsonl").write_text(json.dumps(SODA) + "\n")
    co3_card.write_croissant(tmp_path, {"about": {"model": "teacher"}})
    return tmp_path


def test_checksum_and_fields_are_those_of_the_file(soda):
    """Oracle: hashlib, and the fields that SODA publishes."""
    made = json.loads((soda / croissant.NAME).read_text())
    (file,) = made["distribution"]
    assert file["sha256"] == hashlib.sha256((soda / "soda.jsonl").read_bytes()).hexdigest()
    (records,) = made["recordSet"]
    assert [field["name"] for field in records["field"]] == list(schema.SODA_FIELDS)
    lists = {field["name"] for field in records["field"] if field.get("repeated")}
    assert lists == {"dialogue", "speakers"}
    assert all(made[f"rai:{term}"] for term in ("dataCollection", "dataBiases", "dataLimitations"))
    assert "license" not in made  # which only the user can choose


def test_a_prosocial_corpus_has_a_record_set_for_each_split(tmp_path):
    """Oracle: the sample's own columns."""
    (tmp_path / "data").mkdir()
    columns = set()
    for split in ("train", "validation", "test"):
        text = (SAMPLE / f"{split}.jsonl").read_text()
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
        columns |= {name for line in text.splitlines() for name in json.loads(line)}
    prosocial_card.write_croissant(tmp_path, {"model": "m"}, scripted=True)
    made = json.loads((tmp_path / croissant.NAME).read_text())
    assert [one["@id"] for one in made["recordSet"]] == ["train", "validation", "test"]
    assert {field["name"] for field in made["recordSet"][0]["field"]} <= columns
    assert "script" in made["rai:dataCollection"]


def test_mlcroissant_reads_the_records(soda):
    """Oracle: MLCommons' own library: no error, and the record itself."""
    library = pytest.importorskip("mlcroissant")
    dataset = library.Dataset(jsonld=str(soda / croissant.NAME))
    assert not dataset.metadata.ctx.issues.errors
    (record,) = dataset.records("soda")
    assert [bytes(text) for text in record["soda/dialogue"]] == [b"Hi!", b"Hello."]
