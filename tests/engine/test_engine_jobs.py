"""Sharded, resumable answering: the files, with answers made up in Python."""

import itertools
import json
from collections import Counter

import pytest
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format
from cosmo.engine.infer import answer_files, bulk, infer
from cosmo.engine.model.decoding import DecodingConfig
from tests.engine import job_settings
from tests.engine.job_settings import records

config = pytest.fixture(job_settings.config)


@pytest.fixture
def run(config, monkeypatch, tmp_path):
    """`run(output, source, num_shards=1, ...)`: the ids answered by this call, without a model."""

    def answer(session, rows, work, on_batch):
        answered.extend(row.id for row in rows)
        on_batch(Counter(records=len(rows), new_tokens=1, cells=2, tokens=1))
        return [infer.Answer(row, (row.inputs[::-1],), (0.5,), 1) for row in rows]

    answered: list[str] = []
    monkeypatch.setattr(infer, "generation", lambda *rest: None)
    monkeypatch.setattr(infer, "answer", answer)

    def make(output, source, num_shards=1, settings=None, **sharding):
        answered.clear()
        layout = answer_files.output_files(str(output), num_shards)
        cut = bulk.Sharding(num_shards, **{"part_size": 2, **sharding})
        bulk.answer_source(settings or config(), source, layout, cut, lambda: (object(), 7))
        return list(answered)

    make.answered = answered
    return make


def contents(folder):
    """{name: bytes} of what a user sees in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def ids(folder):
    """The ids in the shards, in the order of the shards' names."""
    files = sorted(p for p in folder.iterdir() if p.name.startswith("predictions"))
    return [json.loads(line)["id"] for p in files for line in p.read_text().splitlines()]


@pytest.mark.parametrize("num_shards", [1, 2, 5, 12])
def test_shards_together_are_the_input_in_order(run, tmp_path, num_shards):
    """Property: N even, contiguous files whose concatenation has the input's order; the rejects
    have their lines; nothing else is left but the hidden folder, without parts."""
    run(tmp_path, records(11, bad=(0, 7, 8)), num_shards)
    assert ids(tmp_path) == [str(i) for i in range(11) if i not in (0, 7, 8)]
    names = [f"predictions-{i:05d}-of-{num_shards:05d}.jsonl" for i in range(num_shards)]
    assert set(contents(tmp_path)) == {*names, "rejected.jsonl"}
    rejected = [json.loads(x) for x in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejected] == [1, 8, 9]
    work = tmp_path / ".predictions.work"
    assert not [p for p in work.iterdir() if p.name.startswith(("part-", "partial-"))]


class Killed(BaseException):
    """Stands for SIGKILL: from here on nothing more is written."""


class Disk:
    """Counts what is done to files, and at event `kill_at` stops all writing for good.

    A write that is cut leaves its first half.
    """

    def __init__(self, monkeypatch, kill_at=None):
        self.events, self.kill_at = 0, kill_at
        kind = type(epath.Path("/"))
        original_open = kind.open

        def guarded(method):
            def call(path, *args, **kwargs):
                self.event()
                return method(path, *args, **kwargs)

            return call

        def opened(path, mode="r", **kwargs):
            if "w" not in mode:
                return original_open(path, mode, **kwargs)
            self.event()
            return File(original_open(path, mode, **kwargs), self)

        for name in ("replace", "unlink", "mkdir", "rmtree", "write_text", "write_bytes"):
            monkeypatch.setattr(kind, name, guarded(getattr(kind, name)))
        monkeypatch.setattr(kind, "open", opened)

    def event(self):
        self.events += 1
        if self.kill_at is not None and self.events > self.kill_at:
            raise Killed


class File:
    """A file open for writing, as a context manager."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, data):
        try:
            self.disk.event()
        except Killed:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise
        return self.file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.file.close()


def test_a_kill_at_any_moment_neither_loses_nor_repeats(run, tmp_path):
    """Property: killed at every single change to the files, in the middle of every write, and once
    more while going on, the final bytes are those of an uninterrupted run, and no window whose
    part was finished is answered again."""
    source = records(9, bad=(1, 8))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run(tmp_path / "whole", source, 2)
    expected, events = contents(tmp_path / "whole"), disk.events
    assert events > 40
    for first in range(events):
        # The second command is killed too, at a moment that varies; the third is left alone.
        for kills in ([first], [first, 3 + first % 17]):
            folder = tmp_path / f"killed-{first}-{len(kills)}"
            parts_done: set[str] = set()
            for kill_at in [*kills, None]:
                with pytest.MonkeyPatch.context() as patch:
                    Disk(patch, kill_at)
                    try:
                        run(folder, source, 2)
                    except Killed:
                        assert kill_at is not None
                answered = run.answered
                assert not parts_done & set(answered)
                parts_done |= finished_ids(folder)
            assert contents(folder) == expected, kills
            assert run(folder, source, 2) == []  # complete


def finished_ids(folder):
    """Ids of records whose window, or whole shard, is in place."""
    work = folder / ".predictions.work"
    parts = list(work.glob("part-*")) if work.exists() else []
    lines = itertools.chain.from_iterable(p.read_text().splitlines()[1:] for p in parts)
    in_parts = {record["id"] for record in map(json.loads, lines) if "id" in record}
    return in_parts | set(ids(folder) if folder.exists() else [])


def test_processes_may_take_shards_in_any_order(run, tmp_path):
    """Property: several commands with shards of their own, two of them with the same, leave the
    bytes of one command."""
    source = records(23, bad=(0, 10, 22))
    run(tmp_path / "one", source, 5)
    for chosen in ("3", "0-1,4", "3,2", "1"):
        run(tmp_path / "many", source, 5, chosen=chosen)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_same_shard_in_two_processes(run, tmp_path, monkeypatch):
    """Property: a command that finds its shard finished under its hands (parts gone) ends well."""
    source = records(6, bad=(2,))
    write_part, calls = answer_files.write_part, []

    def slower(layout, span, *rest):
        write_part(layout, span, *rest)
        if not calls:
            calls.append(span)
            run(tmp_path / "twice", source)  # the other process overtakes

    run(tmp_path / "once", source)
    monkeypatch.setattr(answer_files, "write_part", slower)
    run(tmp_path / "twice", source)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    work = tmp_path / "twice/.predictions.work"
    assert not list(work.glob("part*"))


def test_a_resume_keeps_the_window_whatever_the_batch_size(run, config, tmp_path, monkeypatch):
    """Property: the manifest's window is used, so finished windows fit."""
    source = records(20)
    original, written = answer_files.write_part, []

    def stop_after_two(*rest):
        original(*rest)
        written.append(rest)
        if len(written) == 2:
            raise Killed

    monkeypatch.setattr(bulk, "PART_BATCHES", 2)
    monkeypatch.setattr(answer_files, "write_part", stop_after_two)
    with pytest.raises(Killed):
        run(tmp_path, source, settings=config(batch_size=3), part_size=None)
    monkeypatch.setattr(answer_files, "write_part", original)
    again = run(tmp_path, source, settings=config(batch_size=5), part_size=None)
    assert again == [str(i) for i in range(12, 20)]
    assert ids(tmp_path) == [str(i) for i in range(20)]


def test_other_settings_are_refused_by_name(run, config, tmp_path):
    """Oracle: the name of the setting, both values and the remedies; --overwrite starts anew."""
    source = records(5)
    run(tmp_path, source, 2)
    before = contents(tmp_path)
    changes = {
        "seed=0": dict(settings=config(random_seed=1)),
        "decoding.max_new_tokens=128": dict(settings=config(decoding=DecodingConfig(9))),
        "mode='predict'": dict(settings=config(mode="score")),
        "num_shards=2": dict(num_shards=3),
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=f"(?s)begun with {name}.*overwrite it") as caught:
            run(tmp_path, source, **{"num_shards": 2, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"begun with input.count=5, this command has 6"):
        run(tmp_path, records(6), 2)
    assert contents(tmp_path) == before
    run(tmp_path, records(6), 3, overwrite=True)
    assert len(contents(tmp_path)) == 3
    assert ids(tmp_path) == [str(i) for i in range(6)]


def test_a_newer_checkpoint_is_another_setting(run, config, tmp_path, monkeypatch):
    """Property: answers of two checkpoints are never mixed."""
    run(tmp_path, records(3))
    monkeypatch.setattr(any_format, "locate", lambda path: any_format.Located(path, 8, "cosmo"))
    with pytest.raises(UserError, match=r"checkpoint.step=7, this command has 8"):
        run(tmp_path, records(3))


def test_a_run_that_finishes_removes_what_killed_ones_left(run, tmp_path):
    """Oracle: the names in the work folder."""
    run(tmp_path, records(4), 2)
    work = tmp_path / ".predictions.work"
    (work / "partial-of-a-killed-run").write_text("half a line")
    run(tmp_path, records(4), 2)
    assert not [p for p in work.iterdir() if p.name.startswith("partial-")]


def test_files_of_somebody_else_are_not_replaced(run, tmp_path):
    """A file that no manifest describes is kept, unless --overwrite is given."""
    output = tmp_path / "answers.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UserError, match=r"answers.jsonl exists .* overwrite it"):
        run(output, records(3))
    assert output.read_text() == "precious\n"
    run(output, records(3), overwrite=True)
    assert len(output.read_text().splitlines()) == 3


def test_every_record_rejected(run, tmp_path):
    """An error, after the reasons are written; again when the command is repeated."""
    for _ in range(2):
        with pytest.raises(UserError, match="no record of records could be used"):
            run(tmp_path, records(3, bad=(0, 1, 2)))
        assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3


def test_an_interrupt_says_how_to_go_on(run, tmp_path, monkeypatch):
    """Ctrl-C in the third window: two are kept, and only the rest is answered afterwards."""
    answer = infer.answer

    def interrupted(session, rows, *rest):
        if rows[0].id == "4":
            raise KeyboardInterrupt
        return answer(session, rows, *rest)

    monkeypatch.setattr(infer, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt, match="2 of 5 parts were finished"):
        run(tmp_path, records(10))
    monkeypatch.setattr(infer, "answer", answer)
    assert run(tmp_path, records(10)) == [str(i) for i in range(4, 10)]


def test_a_full_disk_keeps_what_is_done(run, tmp_path, monkeypatch):
    """One line with the reason; what is finished is not done again."""
    original, room = answer_files.write_part, [2]

    def full(*rest):
        room[0] -= 1
        if room[0] < 0:
            with answer_files.explained("/disk"):
                raise OSError(28, "No space left on device")
        original(*rest)

    monkeypatch.setattr(answer_files, "write_part", full)
    with pytest.raises(UserError, match="No space left on device; what is finished is kept"):
        run(tmp_path, records(10))
    monkeypatch.setattr(answer_files, "write_part", original)
    assert run(tmp_path, records(10)) == [str(i) for i in range(4, 10)]


@pytest.mark.parametrize("text", ["5", "0-5", "3-1", "a", "", "-1", "1,,2"])
def test_bad_shards(text):
    """Out of range, backwards, or no number: the flag is named."""
    with pytest.raises(UserError, match="shards="):
        bulk.Sharding(5, text)


def test_shard_numbers():
    """Oracle: by hand."""
    assert answer_files.parse_shards("0-2,4", 5) == [0, 1, 2, 4]
    assert answer_files.parse_shards("4,1,1", 5) == [1, 4]
    assert answer_files.parse_shards(None, 3) == [0, 1, 2]
    sizes = [
        sum(s.stop - s.start for s in answer_files.part_spans(11, 4, 2, [i])) for i in range(4)
    ]
    assert sum(sizes) == 11
    assert max(sizes) - min(sizes) <= 1


def test_outputs_that_cannot_be(run, tmp_path):
    """A folder below a file, shards in one file, a folder named like a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*; give another folder"):
        run(tmp_path / "file" / "out", records(3))
    with pytest.raises(UserError, match="num_shards=2 files do not fit"):
        run(tmp_path / "out.jsonl", records(3), 2)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        run(tmp_path / "folder.jsonl", records(3))


def test_overwriting_touches_nothing_elsewhere(run, tmp_path):
    """A copied output is overwritten in its place. Oracle: the original's files."""
    import shutil

    run(tmp_path / "first", records(4), num_shards=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir() if p.is_file()}
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    run(tmp_path / "second", records(4), num_shards=2, overwrite=True)
    after = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir() if p.is_file()}
    assert after == before
    assert any(name.startswith("predictions") for name in before)


@pytest.mark.parametrize("per_place", [1, 3])
def test_progress_counts_places_of_the_source(config, monkeypatch, tmp_path, per_place):
    """Property: it rises to the source's count and never beyond, whatever a place holds."""
    seen = []
    monkeypatch.setattr(
        bulk.Progress, "update", lambda bar, done, note="", **_: seen.append((done, bar.total))
    )

    def answer(session, rows, work, on_batch):
        for _ in rows:
            on_batch(Counter(records=1, cells=1))
        return [infer.Answer(row, ("",), (0.0,)) for row in rows]

    monkeypatch.setattr(infer, "generation", lambda *rest: None)
    monkeypatch.setattr(infer, "answer", answer)
    made = records(6)

    def several(spans):
        for items in made.read(spans):
            yield [item for item in items for _ in range(per_place)]

    layout = answer_files.output_files(str(tmp_path / "out.jsonl"), 1)
    cut = bulk.Sharding(part_size=2)
    bulk.answer_source(config(), made._replace(read=several), layout, cut, lambda: (object(), 7))
    assert [done for done, _ in seen[per_place * 2 - 1 :: per_place * 2]] == [2, 4, 6]
    assert all(done <= total == 6 for done, total in seen)
