"""What the journal keeps through kills, full disks, damaged files and a change of its format."""

import asyncio
import base64
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.engine.base.errors import UserError
from data_pipeline.calls import former_journal
from data_pipeline.calls.journal import NAME, Entry, Journal, read_entries


def entry(number: int, kind: str = "answer", size: int = 40) -> Entry:
    raw = f'{{"text": "{random.Random(number).randbytes(size).hex()}"}}'
    return Entry(f"{number:032x}", f"t{number}", "dialogue", 0, kind, raw, 3, number)


def filled(folder, count: int, size: int = 40) -> None:
    with Journal(folder) as journal:
        for number in range(count):
            journal.append(entry(number, size=size))


def found(folder, count: int, size: int = 40) -> list[bool]:
    """Whether each entry is there; what is there is checked."""
    with Journal(folder) as journal:
        got = [journal.get(entry(n).key) for n in range(count)]
    assert all(e is None or e == entry(n, size=size) for n, e in enumerate(got))
    return [e is not None for e in got]


def test_entries_come_back(tmp_path):
    """Oracle: what was put in; failures are kept but never answers; sums by hand."""
    with Journal(tmp_path) as journal:
        for number in range(50):
            journal.append(entry(number, "answer" if number % 5 else "failure"))
        assert journal.get(entry(0).key) is None
        assert journal.get(entry(7).key) == entry(7)
    with Journal(tmp_path) as journal:
        assert [journal.get(entry(n).key) for n in (1, 49)] == [entry(1), entry(49)]
        assert journal.get(entry(45).key) is None and len(journal) == 40
        answers = sum(n for n in range(50) if n % 5)
        spent = {"calls": 40, "prompt_tokens": 120, "completion_tokens": answers}
        assert journal.spent()["dialogue"]["answer"] == spent
    assert [e.completion_tokens for e in read_entries(tmp_path)] == list(range(50))


def test_odd_text_comes_back(tmp_path):
    """Half a surrogate pair, as an escaped answer holds it. Oracle: the text that was put in."""
    odd = Entry("ab" * 16, "t\ud800", "head", 0, "answer", '{"text": "\ud83d"}')
    with Journal(tmp_path) as journal:
        journal.append(odd)
        assert journal.get(odd.key).raw == odd.raw


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            Entry,
            key=st.binary(min_size=16, max_size=16).map(bytes.hex),
            id=st.text(),
            stage=st.text(),
            attempt=st.integers(0, 9),
            kind=st.sampled_from(("answer", "failure")),
            raw=st.text(st.characters(codec=None)),  # with halves of surrogate pairs
            prompt_tokens=st.integers(0, 10**9),
            completion_tokens=st.integers(0, 10**9),
            reason=st.text(),
        ),
        max_size=5,
    )
)
def test_any_entries_come_back(tmp_path_factory, entries):
    """Property: what was appended is read, in its order; the last answer to a key is its answer."""
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder) as journal:
        for one in entries:
            journal.append(one)
        answers = {one.key: one for one in entries if one.kind == "answer"}
        assert all(journal.get(key) == one for key, one in answers.items())
        assert len(journal) == len(answers)
    assert read_entries(folder) == entries


def test_the_latest_answer_counts(tmp_path):
    """Both were paid for. Oracle: the second answer, and the tokens of both."""
    with Journal(tmp_path) as journal:
        for raw in ("one", "two"):
            journal.append(Entry("ab" * 16, "t", "head", 0, "answer", raw, 5, 2))
        assert journal.get("ab" * 16).raw == "two" and len(journal) == 1
        assert journal.spent()["head"]["answer"]["prompt_tokens"] == 10


@pytest.mark.parametrize("seed", range(6))
def test_changed_bytes_cost_few_answers_and_change_none(tmp_path, caplog, seed):
    """64 bytes anywhere behind the first page of 4,096 bytes. Oracle: the entries put in."""
    filled(tmp_path, 300, 400)
    path = tmp_path / NAME
    data = bytearray(path.read_bytes())
    chance = random.Random(seed)
    place = chance.randrange(4096, len(data) - 64)
    data[place : place + 64] = chance.randbytes(64)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        there = found(tmp_path, 300, 400)
    assert sum(there) >= 200
    assert all(there) or "damaged" in caplog.text or (tmp_path / "damaged").exists()
    assert found(tmp_path, 300, 400) == there  # the next start finds the same
    with Journal(tmp_path) as journal:
        for number in range(300):
            if not there[number]:
                journal.append(entry(number, size=400))
    assert all(found(tmp_path, 300, 400))


@pytest.mark.parametrize("damage", ["cut", "no database", "empty page"])
def test_a_damaged_database_is_kept_aside_and_read(tmp_path, caplog, damage):
    """Oracle: the bytes of before; answers in what is left are not asked again."""
    filled(tmp_path, 300, 400)
    path = tmp_path / NAME
    data = path.read_bytes()
    if damage == "cut":
        data = data[: len(data) // 2 // 4096 * 4096]
    elif damage == "no database":
        data = b"no database at all" * 500
    else:
        middle = len(data) // 2 // 4096 * 4096
        data = data[:middle] + bytes(4096) + data[middle + 4096 :]
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        there = found(tmp_path, 300, 400)
    assert (tmp_path / "damaged" / f"{NAME}.000").read_bytes() == data
    assert "is damaged" in caplog.text and "asked again" in caplog.text
    if damage == "empty page":
        assert there[0] and there[-1] and 250 < sum(there) < 300
    else:
        assert sum(there) < 300
    assert found(tmp_path, 300, 400) == there


KILLED = """
import sys
import time
sys.path[:0] = [{root!r}]
from data_pipeline.calls.journal import Journal
from tests.data_pipeline.test_journal import entry
with Journal({folder!r}) as journal:
    number = 0
    while True:
        journal.append(entry(number, size=400))
        print(number, flush=True)
        number += 1
"""


def test_what_was_appended_survives_a_kill(tmp_path):
    """Oracle: every number that the killed process had printed."""
    code = KILLED.format(root=os.getcwd(), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    last = 199 + len(process.stdout.read().splitlines())
    process.wait()
    assert all(found(tmp_path, last + 1, 400))


def test_a_torn_log_costs_its_end_alone(tmp_path):
    """The log of commits, cut anywhere. Oracle: the first entries, none missing in between."""
    copy = tmp_path / "copy"
    with Journal(tmp_path / "journal") as journal:
        for number in range(40):
            journal.append(entry(number))
        shutil.copytree(tmp_path / "journal", copy)  # as a kill leaves it
    assert all(found(copy, 40))
    with Journal(tmp_path / "journal") as journal:
        for number in range(40, 80):
            journal.append(entry(number))
        for part in (3, 2, 1):
            shutil.rmtree(copy)
            shutil.copytree(tmp_path / "journal", copy)
            log = copy / f"{NAME}-wal"
            os.truncate(log, log.stat().st_size * part // 4)
            there = found(copy, 80)
            assert there == sorted(there, reverse=True) and 40 <= sum(there) < 80


def test_a_full_disk_at_every_page(tmp_path):
    """Oracle: each error names the cause; with room again the journal has every entry."""
    errors = []
    with Journal(tmp_path) as journal:
        pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
        for number in range(150):
            journal._database.execute(f"PRAGMA max_page_count = {pages}")
            try:
                journal.append(entry(number, size=400))
                continue
            except UserError as error:
                errors.append(str(error))
            pages += 1
            journal._database.execute("PRAGMA max_page_count = 100000")
            journal.append(entry(number, size=400))
            pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
    assert len(errors) > 10 and all("disk is full" in text for text in errors)
    assert [e.id for e in read_entries(tmp_path)] == [f"t{n}" for n in range(150)]
    assert all(found(tmp_path, 150, 400))


NO_ROOM = """
import resource, signal, sys
from cosmo.engine.base.errors import UserError
from data_pipeline.calls.journal import Journal
from tests.data_pipeline.test_journal import entry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with Journal(sys.argv[1]) as journal:
        for number in range(200):
            journal.append(entry(number, size=400))
            print(number, flush=True)
except UserError as error:
    print("error:", error)
"""


def test_no_file_can_grow(tmp_path):
    """The limit on file sizes fails real writes. Oracle: one error, and what was kept before it."""
    sizes = (0, 10, 5_000, 20_000, 100_000)
    for size in sizes:
        folder = tmp_path / str(size)
        command = [sys.executable, "-c", NO_ROOM, str(folder), str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        *kept, last = done.stdout.splitlines()
        assert last.startswith("error: ") and str(folder) in last and not done.stderr
        assert all(found(folder, len(kept), 400))
    assert len(kept) > 5


def test_two_writers_are_refused(tmp_path):
    """Oracle: the second one's error names the folder and the first."""
    with Journal(tmp_path), pytest.raises(UserError, match="in use by process"):
        Journal(tmp_path).__enter__()


def former_frame(entry: Entry) -> bytes:
    """An entry as the former format had it."""
    text = json.dumps(vars(entry), ensure_ascii=False).encode("utf-8", "surrogatepass")
    squeeze = zlib.compressobj(4, zdict=former_journal._DICTIONARY)
    body = squeeze.compress(text) + squeeze.flush()
    return struct.pack("<4sII", b"\x93CO3", len(body), zlib.crc32(body)) + body


FRAME = "k0NPMzQAAAChp3eSeH10AjN7g6eRxCT8EJGGSgyxpiJCCQIRl8QGcCRITW1sLbZUY4wj1YBSE1J6qwUAmodFmw=="


def test_a_frame_of_the_former_format():
    """Oracle: bytes that the former code wrote."""
    raw = '{"choices": [{"index": 0, "text": " Yes"}]}'
    one = Entry("ab" * 16, "t1", "head", 0, "answer", raw, 3, 1)
    assert base64.b64decode(FRAME) == former_frame(one)


def test_answers_of_the_former_format_are_taken_over(tmp_path, caplog):
    """Two files, one damaged and torn. Oracle: the entries written, less the damaged two; once."""
    frames = [former_frame(entry(n, "answer" if n % 7 else "failure")) for n in range(20)]
    (tmp_path / "shard-00000.co3j").write_bytes(b"CO3 journal 1\n" + b"".join(frames[:10]))
    bad = bytearray(frames[12])
    bad[30] ^= 4
    rest = [*frames[10:12], bytes(bad), *frames[13:19], frames[19][:-1]]
    (tmp_path / "shard-00001.co3j").write_bytes(b"CO3 journal 1\n" + b"".join(rest))
    with caplog.at_level(logging.INFO, "data_pipeline"), Journal(tmp_path) as journal:
        assert len(journal) == 20 - 3 - 2  # failures 0, 7, 14; damaged 12, torn 19
        assert journal.spent()["dialogue"]["failure"]["calls"] == 3
    assert "former format" in caplog.text and "bytes are damaged" in caplog.text
    for _ in range(2):
        there = found(tmp_path, 20)
        assert [n for n in range(20) if not there[n]] == [0, 7, 12, 14, 19]
    # A damaged database: what it lost is taken over again, and nothing is counted twice.
    (tmp_path / NAME).write_bytes(b"no database at all" * 500)
    assert sum(found(tmp_path, 20)) == 15
    with contextlib.closing(sqlite3.connect(tmp_path / NAME)) as database:
        assert database.execute("SELECT COUNT(*) FROM calls").fetchone() == (15,)


def test_one_sync_serves_all_that_wait(tmp_path, monkeypatch):
    """Oracle: by hand: a sync in progress and one more, for a hundred answers at once. Property:
    each returns after a sync that began after its answer was committed."""
    began = []
    real = os.fdatasync

    def slow(number):
        began.append(time.monotonic())
        time.sleep(0.05)
        real(number)

    monkeypatch.setattr(os, "fdatasync", slow)

    async def one(journal, number):
        journal.append(entry(number))
        committed = time.monotonic()
        await journal.sync()
        assert any(committed <= start for start in began)

    async def run(journal):
        first = asyncio.create_task(one(journal, 0))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, *(one(journal, number) for number in range(1, 101)))

    with Journal(tmp_path) as journal:
        asyncio.run(run(journal))
        asyncio.run(one(journal, 101))  # the journal outlives a loop
    assert len(began) == 3
    assert len(read_entries(tmp_path)) == 102


def test_a_sync_that_fails_is_an_error(tmp_path, monkeypatch):
    """Oracle: the error's words by hand."""

    def broken(number):
        raise OSError(5, "Input/output error")

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(UserError, match=r"cannot use .*Input/output error"):
            asyncio.run(journal.sync())
