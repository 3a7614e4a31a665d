"""How far a run is: a line rewritten on a terminal, a plain one now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

log = logging.getLogger("data_pipeline")


class Progress:
    """Says how many of `total` triples are done, and what `note()` adds.

    Rates are of the last minute, so that answers from the journal do not flatter the rest.
    """

    def __init__(self, total: int | None, start: int, note: Callable[[], str], every: float = 20):
        self.total, self.note, self.every = total, note, every
        self.terminal = sys.stderr.isatty()
        self.printed = time.monotonic()
        self.points = [(self.printed, start, 0)]  # (time, triples, calls)
        self.dirty = False

    def update(self, done: int, calls: int, *, force: bool = False) -> None:
        """Say where it stands, if it is time."""
        now = time.monotonic()
        if not force and now - self.printed < (0.5 if self.terminal else self.every):
            return
        self.printed = now
        self.points.append((now, done, calls))
        while len(self.points) > 2 and now - self.points[0][0] > 60:
            self.points.pop(0)
        before, first, called = self.points[0]
        seconds = max(now - before, 1e-9)
        rate = (done - first) / seconds
        of, left = "", ""
        if self.total:
            of = f"/{self.total} ({100 * done / self.total:.1f}%)"
            left = f", {_clock((self.total - done) / rate)} left" if rate else ""
        text = f"triples {done}{of}, {(calls - called) / seconds:.0f} calls/s, {self.note()}{left}"
        if self.terminal:
            sys.stderr.write("\r\x1b[K" + text[:200])
            sys.stderr.flush()
            self.dirty = True
        else:
            log.info(text)

    def finish(self) -> None:
        """Leave the last line standing."""
        if self.dirty:
            sys.stderr.write("\n")
            self.dirty = False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h" if days else f"{hours}:{minutes:02d}:{seconds:02d}"
