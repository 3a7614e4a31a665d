"""What the journal keeps through kills, torn tails and flipped bits."""

import logging
import os
import random
import signal
import subprocess
import sys

import pytest

from data_pipeline.errors import UserError
from data_pipeline.journal import Entry, Journal, entries, shards


def entry(number: int, kind: str = "answer", size: int = 40) -> Entry:
    raw = f'{{"text": "{random.Random(number).randbytes(size).hex()}"}}'
    return Entry(f"{number:032x}", f"t{number}", "dialogue", 0, kind, raw, 3, number)


def filled(folder, count: int, **settings) -> None:
    with Journal(folder, **settings) as journal:
        for number in range(count):
            journal.append(entry(number))


def test_entries_come_back(tmp_path):
    """Oracle: what was put in; failures are kept but never answers; sums by hand."""
    with Journal(tmp_path, shard_bytes=2000) as journal:
        for number in range(50):
            journal.append(entry(number, "answer" if number % 5 else "failure"))
        assert journal.get(entry(0).key) is None
        assert journal.get(entry(7).key) == entry(7)
    assert len(shards(tmp_path)) > 3
    with Journal(tmp_path) as journal:
        assert [journal.get(entry(n).key) for n in (1, 49)] == [entry(1), entry(49)]
        assert journal.get(entry(45).key) is None and len(journal) == 40
        answers = sum(n for n in range(50) if n % 5)
        spent = {"calls": 40, "prompt_tokens": 120, "completion_tokens": answers}
        assert journal.spent()["dialogue"]["answer"] == spent
    assert [e.completion_tokens for e in entries(tmp_path)] == list(range(50))


@pytest.mark.parametrize("lost", [1, 7, 11, 12, 40])
def test_a_torn_tail_costs_one_entry(tmp_path, caplog, lost):
    """Oracle: the entries before the last; the torn bytes are kept aside, and it is said."""
    filled(tmp_path, 5)
    ((_, shard),) = shards(tmp_path)
    (tmp_path / "index.sqlite").unlink()
    os.truncate(shard, shard.stat().st_size - lost)
    with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
        assert [journal.get(entry(n).key) is not None for n in range(5)] == [True] * 4 + [False]
        journal.append(entry(4))
    assert "torn tail" in caplog.text and len(list((tmp_path / "quarantine").iterdir())) == 1
    assert list(entries(tmp_path)) == [entry(n) for n in range(5)]


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_flipped_bit_costs_one_entry(tmp_path, caplog, index):
    """Oracle: all entries but the damaged one, with or without an index that knows it."""
    filled(tmp_path, 9)
    ((_, shard),) = shards(tmp_path)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    if index == "lost":
        (tmp_path / "index.sqlite").unlink()
    with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
        got = [journal.get(entry(n).key) for n in range(9)]
    assert sum(e is not None for e in got) == 8 and "damaged" in caplog.text
    assert all(e is None or e == entry(n) for n, e in enumerate(got))


def test_an_index_of_other_shards_is_made_anew(tmp_path, caplog):
    """Power was lost: the index knows more than the disk has. Oracle: the shards."""
    filled(tmp_path, 9)
    ((_, shard),) = shards(tmp_path)
    os.truncate(shard, shard.stat().st_size // 2)
    with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
        assert journal.get(entry(0).key) == entry(0) and journal.get(entry(8).key) is None
    (tmp_path / "index.sqlite").write_bytes(b"no database at all" * 500)
    with Journal(tmp_path) as journal:
        assert journal.get(entry(0).key) == entry(0)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from data_pipeline.journal import Journal
from test_journal import entry
with Journal({folder!r}) as journal:
    number = 0
    while True:
        journal.append(entry(number, size=400))
        print(number, flush=True)
        number += 1
"""


def test_what_was_appended_survives_a_kill(tmp_path):
    """Oracle: every number that the killed process had printed."""
    here = os.path.dirname(__file__)
    code = KILLED.format(root=os.getcwd(), here=here, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    last = 199 + len(process.stdout.read().splitlines())
    process.wait()
    with Journal(tmp_path) as journal:
        assert all(journal.get(entry(n).key) == entry(n, size=400) for n in range(last + 1))


def test_a_disk_that_is_full_at_a_new_shard(tmp_path, monkeypatch):
    """Oracle: the error says so; with room again the journal goes on, and has every entry."""
    said = []

    def full(*_):
        raise OSError(28, "No space left on device")

    with Journal(tmp_path, shard_bytes=400) as journal:
        for number in range(60):
            with monkeypatch.context() as changed:
                if number % 2:
                    changed.setattr(os, "open", full)
                try:
                    journal.append(entry(number))
                    continue
                except UserError as error:
                    said.append(str(error))
            journal.append(entry(number))
        assert len(said) > 3 and all("No space left" in text for text in said)
        assert all(journal.get(entry(n).key) == entry(n) for n in range(60))
    assert list(entries(tmp_path)) == [entry(n) for n in range(60)]


def test_two_writers_are_refused(tmp_path):
    """Oracle: the second one's error names the folder and the first."""
    with Journal(tmp_path), pytest.raises(UserError, match="in use by process"):
        Journal(tmp_path).__enter__()
