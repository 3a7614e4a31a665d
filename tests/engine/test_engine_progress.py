"""Progress lines of long work."""

import io
import logging
import time

from cosmo.engine.base import command_line, progress, silence


def test_counts_have_the_time_that_is_left(caplog, monkeypatch):
    """Oracle: by hand. Two of ten were done before; four more took 8 s, so four take 8 s."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO", "cosmo")
    note = progress.counted(logging.getLogger("cosmo"), "compiling", every_seconds=5.0)
    for seconds, done in ((0, 2), (2, 3), (8, 6), (9, 7), (16, 10)):
        now[0] = 100.0 + seconds
        note(done, 10)
    assert [record.message for record in caplog.records] == [
        "compiling: 2 of 10",
        "compiling: 6 of 10, about 8 s left",
        "compiling: 10 of 10",
    ]


def test_short_waits_in_a_row_are_no_silence(caplog, monkeypatch):
    """A wait that begins 9.9 s after the last line is logged after 0.1 s. Oracle: by hand."""
    caplog.set_level(logging.INFO, "cosmo")
    silence.line_logged()
    with progress.heartbeat("first"):
        pass
    assert not caplog.messages
    monkeypatch.setattr(silence, "_last_line", time.monotonic() - 9.9)
    deadline = time.monotonic() + 5
    with progress.heartbeat("second"):
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["second: 0 s"]


def test_every_line_on_stderr_ends_the_silence(monkeypatch):
    """Oracle: the clock before and after a line of the commands' handler."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(silence, "_last_line", time.monotonic() - 60)
    assert silence.seconds_left() == 0
    command_line._StandardError().emit(logging.makeLogRecord({"msg": "a line"}))
    assert silence.seconds_left() > 9


def test_late_rates_leave_out_the_first_units(caplog, monkeypatch):
    """Oracle: by hand. The first of ten compiles for 100 s, the second takes 1 s: 8 s are left."""
    now = [0.0]
    monkeypatch.setattr(silence, "_last_line", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "cosmo")
    shown = progress.Progress(10, unit="record", every_seconds=0, late=True)
    for seconds in (100.0, 101.0):
        now[0] = seconds
        shown.add(1)
    assert caplog.messages == [
        "record 1/10 0.00 records/s, ? left",
        "record 2/10 1.00 records/s, 0:00:08 left",
    ]
