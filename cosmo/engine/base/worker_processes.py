"""Spread jobs over worker processes of one machine."""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.errors import UserError

REPORT_SECONDS = 0.5

# `do(job, report)` does one job. It calls `report` with the units of work done since the last call.
Report = Callable[[int], None]
Do = Callable[[Any, Report], None]


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has not
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(do: Do, jobs: Sequence[Any], processes: int, report: Report, *, kept: str) -> None:
    """Do the jobs in at most `processes` processes at once. `do` and the jobs are pickled.

    Raises the first error of a job and ends the other workers at once. Raises UserError, which
    names what is `kept`, if a worker is killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    # One count a job, written by the worker that does it: no lock that a killed worker could keep.
    counts = context.RawArray("q", len(jobs))
    # No worker holds the writing end, so its closing, or our death, ends them all. An executor
    # alone would leave them waiting for ever for a parent that was killed.
    alive, stop = context.Pipe(duplex=False)
    quiet = logging.getLogger("cosmo").getEffectiveLevel() > logging.INFO
    # Pickled here, so that a worker first watches `alive` and then imports what the function needs.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), context, _start_worker, (pickle.dumps(do), counts, alive, quiet)
    )
    reported, finished = 0, False
    try:
        with _interrupts_blocked():
            waiting = {pool.submit(_do_job, place, job) for place, job in enumerate(jobs)}
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, REPORT_SECONDS, concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                future.result()
            total = sum(counts)
            if total > reported:
                report(total - reported)
                reported = total
        finished = True
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed or could not start (out of memory?); {kept}, and the "
            "same command continues; fewer processes need less memory",
            setting="processes",
        ) from error
    finally:
        if not finished:  # jobs under way are lost anyway: there is nothing to wait for
            stop.close()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Have processes that start in this block take no Ctrl-C: their parent ends them."""
    # A mask is inherited, so it holds from the first import on. Our own Ctrl-C is only delayed.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def set_up_worker(quiet: bool) -> None:
    """Set up logging in a worker process, and keep JAX off the devices: they are the parent's."""
    command_line.set_up_logging(quiet=quiet)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the variable before
        sys.modules["jax"].config.update("jax_platforms", "cpu")


_worker: tuple[Do, Any]  # in a worker: the function, and the counts of all jobs


def _start_worker(do: bytes, counts: Any, alive: Any, quiet: bool) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.dup2(2, 1)  # libraries print, and standard output is the command's result
    set_up_worker(quiet)
    _worker = pickle.loads(do), counts


def _end_with_parent(alive: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _do_job(place: int, job: Any) -> None:
    do, counts = _worker

    def report(number: int) -> None:
        counts[place] += number

    do(job, report)
