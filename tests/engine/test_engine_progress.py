"""What long work logs of how far it is."""

import logging

from cosmo.engine.base import progress


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
