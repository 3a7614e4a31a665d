"""Handle SIGTERM (a scheduler's notice that this machine will be taken away) and Ctrl-C.

Between steps `Notice.reached` returns whether the run should save and stop. Before the first step
there is nothing to save: the process ends at once, even out of a compilation. An evaluation is left
by the exception `Stopped`. Ctrl-C is handled like SIGTERM, and a second one ends the process.

No process of several may stop alone. JAX carries SIGTERM to all, and they stop after the same
step; they finish compilations and evaluations. Ctrl-C ends only the process that receives it.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised in a block of `Notice.interrupting` by a signal."""

    # A BaseException, because no handler of errors in the block may swallow it.


class Notice:
    """Whether this process was asked to stop; `listen` makes one."""

    def __init__(self):
        self.given = self.interrupted = False  # interrupted: by Ctrl-C
        self.several = jax.process_count() > 1
        self._leave: Callable[[], str] | None = None
        self._interrupting = False

    def reached(self, step: int) -> bool:
        """Return whether to save and stop after `step`; every process calls it after each step."""
        if self.several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.given

    def leave_at_once(self, text: Callable[[], str] | None) -> None:
        """Let SIGTERM end the process at once, with exit code 0 and the printed line `text()`.

        For phases in which there is nothing to save. None ends such a phase. It has no effect
        in a run of several processes.
        """
        self._leave = None if self.several else text
        if self.given and self._leave:
            _end(self._leave())

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise `Stopped` in this block, which must change no state.

        In a run of several processes the block is never interrupted.
        """
        if self.given and not self.several:
            raise Stopped
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _handle(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self.given or self._leave is not None:
                signal.default_int_handler(number, frame)
            # Not an exception now: in the middle of a save, or of a queue's lock, it could leave
            # other threads waiting for ever.
            self.interrupted = True
        if not self.given:
            self.given = True
            log.info("%s: saving and stopping", signal.Signals(number).name)
        if self._interrupting:
            self._interrupting = False
            raise Stopped

    def _watch(self, pipe: int) -> None:
        """Read signal numbers from `pipe` until it closes, and end the process if it may end."""
        # In a thread: Python runs a handler only after the compiler, in C++, has returned.
        while signals := os.read(pipe, 64):
            if not {*signals}.intersection(HANDLED):
                continue  # another library handles this signal
            leave = self._leave
            if signal.SIGTERM in signals and leave is not None:
                _end(leave())
            # If another thread took the signal, the main one may still sleep: this wakes it.
            time.sleep(0.05)
            if leave is None and not self.given:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _end(text: str) -> None:
    print(text, flush=True)
    sys.stderr.flush()
    os._exit(0)  # not sys.exit: a thread calls this, and the main one is inside the compiler


@contextlib.contextmanager
def listen() -> Iterator[Notice]:
    """Yield a Notice that SIGTERM and Ctrl-C set during this block.

    Outside of the main thread, where Python allows no handlers, it is never set.
    """
    notice = Notice()
    # With several processes JAX's own handler, in place since they connected, must stay.
    if notice.several or threading.current_thread() is not threading.main_thread():
        yield notice
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, notice._handle) for number in HANDLED}
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=notice._watch, args=(reading,), daemon=True)
    watcher.start()
    try:
        yield notice
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(writing)  # the watcher then reads the end of the pipe
        watcher.join()
        os.close(reading)
