"""Show how far long work is: a bar on a terminal, a log line now and then elsewhere."""

import contextlib
import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from cosmo.engine.base import silence

log = logging.getLogger(__name__)

# Rates count the last minutes, so that a slow start does not distort the time left for hours.
RATE_WINDOW_SECONDS = 600
TERMINAL_PERIOD_SECONDS = 0.2
# Less than a heartbeat's ten seconds: a line with a rate is worth more than one without.
LINE_SECONDS = 8.0
PLURALS = {"batch": "batches", "MiB": "MiB"}  # of units that take no s


class Progress:
    """Rate and time left of `total` units of work, of which `start` were done before.

    `total` None means unknown: no time left is shown. With `late` rates count from the first
    update: before it, programs are compiled or processes start, which no later unit pays.
    """

    def __init__(
        self,
        total: int | None,
        start: int = 0,
        *,
        unit: str = "step",
        every_seconds: float = LINE_SECONDS,
        late: bool = False,
    ):
        self.unit, self.late = unit, late
        console = rich.console.Console(stderr=True)
        # Rich follows TTY_COMPATIBLE and TERM=dumb, and takes FORCE_COLOR for a terminal.
        self.terminal = sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
        # A log keeps its lines, a terminal replaces its one: hence two periods.
        self.period_seconds = TERMINAL_PERIOD_SECONDS if self.terminal else every_seconds
        self.shown = time.monotonic()
        self.bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=console,
            # No refreshing thread: rich imports modules late, and an import in one thread is
            # unsafe while another traces.
            auto_refresh=False,
            disable=not self.terminal,
            get_time=time.monotonic,
            speed_estimate_period=RATE_WINDOW_SECONDS,
        )
        self.task = self.bar.add_task("", total=total, completed=start)
        self.bar.advance(self.task, 0)  # rates count from here

    @property
    def total(self) -> int | None:
        """The units of work, or None while their number is unknown; may be set."""
        return self.bar.tasks[0].total

    @total.setter
    def total(self, total: int | None) -> None:
        self.bar.tasks[0].total = total  # the bar's own `update` would reset its rate

    @property
    def rate(self) -> float:
        """The units a second of late, 0 while none is finished."""
        return self.bar.tasks[0].speed or 0.0

    def update(self, done: int, note: str = "", *, force: bool = False) -> None:
        """Count `done` units as finished; show it with `note` if it is time, or with `force`."""
        if self.late:
            self.late = False
            self.bar.reset(self.task, total=self.total, completed=done)
            self.bar.advance(self.task, 0)
        else:
            self.bar.update(self.task, completed=done)
        now = time.monotonic()
        # A bar is drawn by its own clock, a log line by that of all lines.
        since = now - self.shown if self.terminal else silence.seconds_without()
        if not force and since < self.period_seconds:
            return
        self.shown = now
        text = self._text(note)
        if self.terminal:
            self.bar.start()  # not before: a bar without a line yet would hide log lines
            self.bar.update(self.task, description=text, refresh=True)
        else:
            log.info(text)
            silence.line_logged()

    def add(self, number: int, note: str = "") -> None:
        """Count `number` more units as finished; see `update`."""
        self.update(self.bar.tasks[0].completed + number, note)

    def finish(self) -> None:
        """Leave the last line on the terminal."""
        self.bar.stop()

    def _text(self, note: str) -> str:
        task = self.bar.tasks[0]
        rate = f"{self.rate:.2f} {PLURALS.get(self.unit, f'{self.unit}s')}/s"
        of = "" if task.total is None else f"/{task.total}"
        if task.total is not None:
            seconds = task.time_remaining if task.speed else None
            left = "?" if seconds is None else datetime.timedelta(seconds=int(seconds))
            rate += f", {left} left"
        return " ".join(filter(None, (f"{self.unit} {task.completed}{of}", note, rate)))


@contextlib.contextmanager
def heartbeat(doing: str) -> Iterator[None]:
    """Log "`doing`: N s" after ten seconds without a line, until the block ends.

    For calls that cannot report progress themselves, such as compilation.
    """
    ended = threading.Event()
    began = time.monotonic()

    def beat() -> None:
        # Imports nothing: an import in one thread is unsafe while another traces.
        while not ended.wait(silence.seconds_left()):
            if silence.seconds_left() == 0:
                log.info("%s: %.0f s", doing, time.monotonic() - began)
                silence.line_logged()

    thread = threading.Thread(target=beat, name="cosmo-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def counted(
    to: logging.Logger, text: str, every_seconds: float = 5.0
) -> Callable[[int, int], None]:
    """Return a function of (done, total) that logs both and the time left, now and then."""
    latest = -every_seconds
    first: tuple[int, float] | None = None

    def note(done: int, total: int) -> None:
        nonlocal latest, first
        now = time.monotonic()
        first = first or (done, now)
        if done != total and now - latest < every_seconds:
            return
        latest = now
        left = ""
        if first[0] < done < total:
            seconds = (now - first[1]) / (done - first[0]) * (total - done)
            left = f", about {seconds:.0f} s left"
        to.info("%s: %d of %d%s", text, done, total, left)

    return note
