"""A log line while one call takes long, so that nobody waits in silence."""

import contextlib
import threading
import time
from collections.abc import Iterator

from cosmo.engine.base.writer import log

PERIOD_SECONDS = 10.0


@contextlib.contextmanager
def heartbeat(doing: str) -> Iterator[None]:
    """Log "`doing`: N s" every PERIOD_SECONDS until the block ends.

    For calls that cannot report progress themselves, such as compilation.
    """
    ended = threading.Event()
    began = time.monotonic()

    def beat() -> None:
        # Imports nothing: an import in one thread is unsafe while another traces.
        while not ended.wait(PERIOD_SECONDS):
            log.info("%s: %.0f s", doing, time.monotonic() - began)

    thread = threading.Thread(target=beat, name="cosmo-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
