"""Oracles: folders laid out by hand."""

import logging

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import files
from cosmo.tasks.files import files_for_split, resolve, splits_of


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _names(path, split):
    return [file.name for file in files_for_split(path, split)]


def test_a_folder_is_read_by_split_names(tmp_path):
    """Oracle: the hub's shard names, aliases, and names that only look alike."""
    _touch(tmp_path, "train-00001-of-00002.parquet", "train-00000-of-00002.parquet")
    _touch(tmp_path, "valid.jsonl.gz", "training.jsonl", "README.md", ".train.jsonl")
    assert _names(tmp_path, "train") == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert _names(tmp_path, "validation") == ["valid.jsonl.gz"]
    assert splits_of(tmp_path) == ["train", "validation"]


def test_folders_named_by_split(tmp_path):
    """Oracle: by hand."""
    _touch(tmp_path, "train/part-0.jsonl", "dev/part-0.jsonl", "dev/part-1.jsonl")
    assert _names(tmp_path, "train") == ["part-0.jsonl"]
    assert _names(tmp_path, "validation") == ["part-0.jsonl", "part-1.jsonl"]
    assert _names(f"{tmp_path}/{{split}}", "validation") == ["part-0.jsonl", "part-1.jsonl"]


def test_template_glob_and_mapping(tmp_path):
    """Oracle: by hand."""
    _touch(tmp_path, "soda_train.jsonl", "soda_val.jsonl", "test.a.jsonl", "test.b.jsonl")
    assert _names(f"{tmp_path}/soda_{{split}}.jsonl", "validation") == ["soda_val.jsonl"]
    assert _names(f"{tmp_path}/{{split}}.*.jsonl", "test") == ["test.a.jsonl", "test.b.jsonl"]
    assert _names(f"{tmp_path}/t*.jsonl", "test") == ["test.a.jsonl", "test.b.jsonl"]
    mapping = {"train": tmp_path / "soda_train.jsonl", "valid": f"{tmp_path}/test.*.jsonl"}
    assert _names(mapping, "train") == ["soda_train.jsonl"]
    assert _names(mapping, "validation") == ["test.a.jsonl", "test.b.jsonl"]
    assert splits_of(mapping) == ["train", "validation"]
    with pytest.raises(DataError, match="no path for split 'test'"):
        files_for_split(mapping, "test")


def test_one_file_serves_every_split_with_one_warning(tmp_path, caplog):
    """Oracle: by hand."""
    _touch(tmp_path, "rows.jsonl")
    path = tmp_path / "rows.jsonl"
    with caplog.at_level(logging.WARNING):
        assert _names(path, "train") == ["rows.jsonl"]
        assert splits_of(path) == ["train", "validation", "test"]
        assert not caplog.records
        for _ in range(3):
            assert _names(str(path), "validation") == ["rows.jsonl"]
    assert len(caplog.records) == 1


def test_missing_data_says_what_where_found_and_what_to_do(tmp_path, monkeypatch):
    """Oracle: the parts an error needs, by hand."""
    with pytest.raises(DataError) as error:
        files_for_split(tmp_path / "nowhere", "train")
    message = str(error.value)
    for word in ("nowhere", "no data for split 'train'", "nothing there", "SODA_PATH"):
        assert word in message
    _touch(tmp_path, "rows.csv", "notes.md")
    with pytest.raises(DataError, match=r"got the folder .* with \['notes.md', 'rows.csv'\], exp"):
        files_for_split(tmp_path, "train")
    with pytest.raises(DataError, match="nothing that the glob matches"):
        files_for_split(f"{tmp_path}/*.parquet", "train")
    with pytest.raises(DataError, match=r"dev\.txt"):
        files_for_split(f"{tmp_path}/{{split}}.txt", "validation")
    with pytest.raises(DataError, match="not set"):
        files_for_split(None, "train")
    with pytest.raises(DataError, match=r"nothing at [^,]*folder, expected"):
        files_for_split("no/such/folder", "train")
    # From another folder it is looked for in both.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"nothing at .* nor at"):
        files_for_split("no/such/folder", "train")


def test_the_same_data_twice_is_refused(tmp_path):
    """Oracle: a split as JSON lines and as Parquet would be read twice."""
    _touch(tmp_path, "train.jsonl", "train.parquet")
    with pytest.raises(DataError, match="two formats"):
        files_for_split(tmp_path, "train")


def test_relative_paths_from_the_working_directory_then_the_repository(tmp_path, monkeypatch):
    """Oracle: a file in each place."""
    repository, work = tmp_path / "repository", tmp_path / "work"
    _touch(repository, "data/train.jsonl", "data/only.jsonl", "more/train.jsonl")
    _touch(work, "data/train.jsonl")
    monkeypatch.setattr(files, "_REPOSITORY", repository)
    monkeypatch.chdir(work)
    assert resolve("data/train.jsonl").resolve() == work / "data/train.jsonl"
    assert resolve("data/only.jsonl") == repository / "data/only.jsonl"
    assert files_for_split("more", "train") == [repository / "more/train.jsonl"]
    assert files_for_split("more/t*.jsonl", "train") == [repository / "more/train.jsonl"]


def test_a_name_with_glob_characters_that_exists(tmp_path):
    """Oracle: the file itself."""
    _touch(tmp_path, "rows[1].jsonl")
    assert _names(tmp_path / "rows[1].jsonl", "train") == ["rows[1].jsonl"]
