"""Measure the time without a log line: long work logs one after ten seconds.

All loggers share this clock, so that several short waits in a row are no long silence.
"""

import time

HEARTBEAT_SECONDS = 10.0

_last_line = time.monotonic()


def line_logged() -> None:
    """Note that a line is logged now. `command_line` calls this for every line on stderr."""
    global _last_line
    _last_line = time.monotonic()


def seconds_without() -> float:
    """Return the seconds since the last line."""
    return time.monotonic() - _last_line


def seconds_left() -> float:
    """Return the seconds until HEARTBEAT_SECONDS will have passed without a line, 0 at least."""
    return max(0.0, HEARTBEAT_SECONDS - seconds_without())
