"""hf:// paths, against a stand-in for the hub."""

import pathlib

import pytest

from cosmo.__main__ import main
from cosmo.engine.base import files, hub
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks import families, vocabularies
from tests import hub_server

SAMPLE = pathlib.Path("tasks/sample").resolve()


@pytest.fixture(autouse=True)
def served(tmp_path, monkeypatch):
    """Serve the sample corpus and its vocabulary; return (requests to the hub, uploads)."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "spiece.model").write_bytes((SAMPLE / "vocabulary.model").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"weights")
    repositories = {"datasets/us/soda": SAMPLE / "soda", "models/us/cosmo": model}
    hub.download.cache_clear()
    with hub_server.serve(repositories) as (address, asked, uploaded):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield asked, uploaded
    hub.download.cache_clear()


@pytest.fixture
def requests(served):
    """Return the requests that the hub got."""
    return served[0]


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


def test_a_corpus_is_pushed_without_its_private_files(served, tmp_path, capsys):
    """Oracle: the files that the hub received; a private repository."""
    asked, uploaded = served
    corpus = tmp_path / "corpus"
    published = {"README.md", "soda.jsonl", "croissant.json", "data/train.jsonl"}
    for name in (*published, "journal/calls.sqlite", "judges.csv", "answers/ann.jsonl"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(name)
    push = ["push", f"--folder={corpus}", "--to=hf://datasets/us/new"]
    assert main(push) == 0
    assert set(uploaded) == published
    assert any('"private":true' in line or '"visibility":"private"' in line for line in asked)
    assert f"/datasets/us/new/commit/{hub_server.COMMIT}" in capsys.readouterr().out
    (corpus / "README.md").unlink()
    assert main(push) == 1
    assert "has no README.md" in capsys.readouterr().err
