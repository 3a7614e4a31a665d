"""hf:// paths, against a stand-in for the hub."""

import pathlib

import pytest

from cosmo.engine.base import files, hub
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks import families, vocabularies
from tests import hub_server

SAMPLE = pathlib.Path("tasks/sample").resolve()


@pytest.fixture(autouse=True)
def requests(tmp_path, monkeypatch):
    """Serve the sample corpus and its vocabulary; return the requests that the hub got."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "spiece.model").write_bytes((SAMPLE / "vocabulary.model").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"weights")
    repositories = {"datasets/us/soda": SAMPLE / "soda", "models/us/cosmo": model}
    hub.download.cache_clear()
    with hub_server.serve(repositories) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield asked
    hub.download.cache_clear()


def test_a_corpus_is_read_as_from_its_folder(requests):
    """Oracle: the examples of the folder that the hub serves."""
    wanted = list(families.soda_file_examples(str(SAMPLE / "soda"), "validation"))
    for path in ("hf://datasets/us/soda", "hf://datasets/us/soda@main/validation.jsonl"):
        assert list(families.soda_file_examples(path, "validation")) == wanted
    assert any("validation.jsonl" in line for line in requests)
    assert list(families.soda_file_examples("hf://datasets/us/soda/{split}.jsonl", "train"))


def test_one_file_is_downloaded_alone(requests):
    """Oracle: the vocabulary's own fingerprint; no request for another file."""
    found = vocabularies.load("hf://us/cosmo/spiece.model")
    assert found.fingerprint == vocabularies.load(SAMPLE / "vocabulary.model").fingerprint
    assert not any("pytorch_model" in line for line in requests)


def test_weights_that_nobody_reads_stay_on_the_hub(requests):
    """Oracle: the files of the local copy."""
    folder = files.resolve("hf://us/cosmo")
    assert [path.name for path in folder.iterdir()] == ["spiece.model"]
    before = len(requests)
    assert files.resolve("hf://us/cosmo") == folder
    assert len(requests) == before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hf://us/none", "gives no model us/none"),
        ("hf://datasets/us/cosmo", "gives no data set us/cosmo"),
        ("hf://us/cosmo@v9", "at v9"),
        ("hf://soda", "expected hf://OWNER/NAME"),
    ],
)
def test_a_wrong_path_is_one_clear_error(path, words):
    """Oracle: the message names the repository and the revision."""
    with pytest.raises(UserError, match=words) as error:
        files.resolve(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_the_usual_error():
    """Oracle: the error for a path without data."""
    with pytest.raises(DataError, match="no data for split 'train'"):
        list(families.soda_file_examples("hf://datasets/us/soda/none.jsonl", "train"))
