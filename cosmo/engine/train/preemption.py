"""SIGTERM, a scheduler's notice that this machine will be taken away, and Ctrl-C, heard in time.

Between steps: `Notice.reached` says that the run should save and stop. Before the first step, when
there is nothing to save, the process ends at once, even out of a compilation; an evaluation is left
by the exception `Stopped`. Ctrl-C is heard like SIGTERM, and a second one at once: an exception in
the middle of a save or of a queue's lock can leave others waiting for ever.

Of several processes none may stop alone: JAX carries SIGTERM to all, which stop after the same
step, and finish compilations and evaluations. Ctrl-C ends the process that it is given to.
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


HEARD = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised out of a block of `Notice.interrupting`."""


class Notice:
    """Whether this process was asked to stop; see `listen`."""

    def __init__(self):
        self.given = self.interrupted = False  # interrupted: by Ctrl-C
        self.several = jax.process_count() > 1
        self._leave: Callable[[], str] | None = None
        self._interrupting = False

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; call it after each step, in every process."""
        if self.several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.given

    def leave_at_once(self, say: Callable[[], str] | None) -> None:
        """Let SIGTERM end the process at once, with exit code 0 and the line `say()`.

        For phases in which there is nothing to save. None ends such a phase. Only of a run of one
        process.
        """
        self._leave = None if self.several else say
        if self.given and self._leave:
            _end(self._leave())

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block that changes no state: SIGTERM raises `Stopped` in it. A single process's."""
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
            self.interrupted = True
        if not self.given:
            self.given = True
            log.info("%s: saving and stopping", signal.Signals(number).name)
        if self._interrupting:
            self._interrupting = False
            raise Stopped

    def _watch(self, pipe: int) -> None:
        """In a thread: a handler of Python's would wait until the compiler, in C++, is done."""
        while signals := os.read(pipe, 64):
            if not {*signals}.intersection(HEARD):
                continue  # that of a handler of somebody else's
            leave = self._leave
            if signal.SIGTERM in signals and leave is not None:
                _end(leave())
            # Where another thread took the signal, the main one may sleep on: this wakes it.
            time.sleep(0.05)
            if leave is None and not self.given:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _end(text: str) -> None:
    print(text, flush=True)
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def listen() -> Iterator[Notice]:
    """Hear SIGTERM and Ctrl-C in this block (of the main thread: others have no handlers)."""
    notice = Notice()
    # With several processes JAX's own handler, in place since they found each other, must stay.
    if notice.several or threading.current_thread() is not threading.main_thread():
        yield notice
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, notice._handle) for number in HEARD}
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=notice._watch, args=(reading,), daemon=True)
    watcher.start()
    try:
        yield notice
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(writing)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(reading)
