"""Reading ahead in a thread."""

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 60.0  # seconds that the end of the process waits for what is being read


class Prefetcher:
    """Runs an iterator in a thread, `depth` items ahead; its errors are raised by `next`.

    Reading starts at once, so that a slow start (importing TensorFlow) overlaps with compilation.
    """

    def __init__(self, make: Callable[[], Iterator[Any]], depth: int = 2):
        self._items: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()
        # A thread that is inside C++ when Python ends takes the process down with it.
        atexit.register(self._join)

    def _join(self):
        self.close()
        self._thread.join(PATIENCE)
        self._drop()

    def _drop(self):
        """Let go of what nobody will take: arrays on devices, which XLA's threads hold too."""
        while True:
            try:
                self._items.get_nowait()
            except queue.Empty:
                return

    def _run(self, make):
        items = None
        try:
            items = make()
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))
        finally:
            if hasattr(items, "close"):
                items.close()

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.2)
                return not self._stop.is_set()
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        if self._ended is None:
            item, self._ended = self._items.get()
            if self._ended is None:
                return item
        raise self._ended

    def is_empty(self) -> bool:
        """Whether `next` would have to wait."""
        return self._items.empty()

    def close(self) -> None:
        """Stop reading ahead; safe to call twice. Nothing can be taken afterwards."""
        self._stop.set()
        self._ended = self._ended or StopIteration()
        self._drop()
