"""Host-side batches, the reading thread, and the files that a run writes."""

import json
import logging
import math

import numpy as np
import pytest

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import prepare_folder
from cosmo.engine.base.progress import Progress
from cosmo.engine.data.datasets import Row, groups, make_batch, pad_rows
from cosmo.engine.train.metric_files import MetricWriter

SOON = 10.0  # seconds; nothing here waits as long unless it hangs


def test_engine_data_make_batch():
    """Two rows in a batch of three: cut, padded, shifted, weighted. Oracle: by hand."""
    rows = [
        Row("a", "", (5, 6, 1), "", (7, 8, 9, 1)),
        Row("b", "", (2, 3, 4, 5, 1), "", (4, 1)),
    ]
    batch = make_batch(rows, batch_size=3, inputs_length=4, targets_length=3)
    expected = {
        "encoder_input_tokens": [[5, 6, 1, 0], [2, 3, 4, 5], [0, 0, 0, 0]],
        "decoder_target_tokens": [[7, 8, 9], [4, 1, 0], [0, 0, 0]],
        "decoder_input_tokens": [[0, 7, 8], [0, 4, 1], [0, 0, 0]],
        "decoder_loss_weights": [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for name, array in batch.items():
        assert array.dtype == np.int32, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_engine_data_make_batch_without_targets():
    """For generation there is no decoder's side; a row without targets is empty there. By hand."""
    batch = make_batch([Row("a", "", (5, 1))], 1, 3, None)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "encoder_input_tokens": [[5, 1, 0]]
    }
    batch = make_batch([Row("a", "", (5, 1))], 1, 3, 2)
    assert batch["decoder_target_tokens"].tolist() == [[0, 0]]


def test_engine_data_pad_rows():
    """Zero rows at the end, up to a number, in any rank and type. Oracle: by hand."""
    assert pad_rows(np.array([[1, 2], [3, 4]]), 4).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert pad_rows(np.array([7.5]), 2).tolist() == [7.5, 0.0]
    full = np.ones((2, 3), np.int32)
    assert pad_rows(full, 2).tolist() == full.tolist()
    assert pad_rows(full, 3).dtype == np.int32


def test_engine_data_groups():
    """Consecutive lists, the last one shorter, nothing lost, no item read too soon. By hand."""
    assert list(groups(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(groups(iter("abcd"), 2)) == [["a", "b"], ["c", "d"]]
    assert list(groups([], 3)) == []
    source = iter(range(10))
    assert next(groups(source, 4)) == [0, 1, 2, 3]
    assert next(source) == 4


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_engine_data_metric_writer_appends_lines(tmp_path):
    """One JSON line a call, at once on disk, in order; a second run appends. Oracle: by hand."""
    writer = MetricWriter(str(tmp_path))
    writer.write(1, {"loss": 2.5, "rate": np.float32(0.5)})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "rate": 0.5}]
    writer.write(2, {"loss": 2})
    writer.close()
    writer = MetricWriter(str(tmp_path), start_step=2)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_engine_data_metric_writer_drops_later_lines_on_resumption(tmp_path):
    """Resumed at step 20, lines of steps above 20 and half a line go. Oracle: by hand."""
    old = "".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in (10, 20, 30, 40))
    (tmp_path / "metrics.jsonl").write_text(old + '{"step": 5, "lo')
    writer = MetricWriter(str(tmp_path), start_step=20)
    writer.write(25, {"loss": 9.0})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 25, "loss": 9.0},
    ]


def test_engine_data_metric_writer_writes_null_for_what_is_not_finite(tmp_path):
    """NaN and infinities are no JSON: they become null. Oracle: a strict JSON parser."""
    writer = MetricWriter(str(tmp_path))
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": None, "d": 0.0}


def test_engine_data_write_atomic(tmp_path, monkeypatch):
    """The whole new text or the whole old one, whatever fails between. Property."""
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]  # no leftovers

    def cut_short(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", cut_short)
    with pytest.raises(UserError) as error:
        write_atomic(path, "newer")
    monkeypatch.undo()
    assert path.read_text() == "new"
    assert str(path) in str(error.value) and "No space left" in str(error.value)


def test_engine_data_prepare_folder(tmp_path):
    """Makes the folder with its parents and leaves nothing in it. Property."""
    folder = prepare_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir() and str(folder) == str(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    prepare_folder(str(tmp_path / "a" / "b"))  # again is fine


@pytest.mark.parametrize("name", ["MODEL_DIR", "OUTPUT_DIR"])
def test_engine_data_prepare_folder_error_names_the_setting(tmp_path, name):
    """A folder below a file cannot be made: the value and the gin name. Oracle: DESIGN, habit 3."""
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "run")
    with pytest.raises(UserError) as error:
        prepare_folder(path, **({} if name == "MODEL_DIR" else {"setting": name}))
    assert f"{path} cannot be written to" in str(error.value)
    assert error.value.settings == (name,)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("cosmo.engine.base.progress.time.monotonic", lambda: Clock.now)
    return Clock


def test_engine_data_progress_line(clock, caplog):
    """Rate counts this run's steps alone; time left follows from it. Oracle: by hand.

    From step 100 of 400, 50 steps in 25 s are 2 a second: 250 steps more take 125 s.
    """
    caplog.set_level(logging.INFO, logger="cosmo")
    progress = Progress(400, start=100, every_seconds=30)
    progress.terminal = False
    clock.now += 25
    progress.update(150, "loss 2.0")
    assert caplog.messages == []  # not yet time for a line
    progress.update(150, "loss 2.0", force=True)
    assert caplog.messages == ["step 150/400 loss 2.0 2.00 steps/s, 0:02:05 left"]
    clock.now += 31
    progress.update(151)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    "seconds, shown",
    [(5, "0:00:05"), (3599, "0:59:59"), (3600, "1:00:00"), (90061, "1 day, 1:01:01")],
)
def test_engine_data_progress_clock(clock, caplog, seconds, shown):
    """Times left from seconds to days, at one step a second. Oracle: by hand."""
    caplog.set_level(logging.INFO, logger="cosmo")
    progress = Progress(10 + seconds, unit="row")
    progress.terminal = False
    clock.now += 10
    progress.update(10, force=True)
    assert caplog.messages[0].endswith(f"1.00 rows/s, {shown} left")


def test_engine_data_progress_before_the_first_step(clock, caplog):
    """Nothing done yet: no rate to tell the time from, and no division by zero. Property."""
    caplog.set_level(logging.INFO, logger="cosmo")
    progress = Progress(10)
    progress.terminal = False
    progress.update(0, force=True)
    assert "0.00 steps/s, ? left" in caplog.messages[0]
