"""Worker processes on one machine: a command of ours, told over a pipe what to do next."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from cosmo.engine.base.errors import UserError


def serve(job: Callable[[int, Callable[[int], None]], None]) -> None:
    """Be a worker: do `job(number, more)` for each number on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who gives the work says when to stop
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever libraries print

        def tell(**message) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        for line in sys.stdin:
            try:
                job(int(line), lambda number: tell(more=number))
            except UserError as error:
                tell(error=str(error))
                return
            tell(done=int(line))


def run(
    command: Sequence[str], todo: Sequence[int], processes: int, more: Callable[[int], None]
) -> None:
    """Have `processes` workers do the jobs `todo`, each the next one when it is free.

    `command` starts a worker, which calls `serve`; it is given --worker=PROCESSES. `more` is told
    how much has been done. Raises the first worker's UserError, and ends the others.
    """
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for shard in todo:
        jobs.put(shard)
    errors: list[BaseException] = []
    running: list[subprocess.Popen] = []

    def drive(process: subprocess.Popen) -> None:
        try:
            while not errors:
                try:
                    shard = jobs.get_nowait()
                except queue.Empty:
                    return
                _give(process, shard, more)
        except BaseException as error:
            errors.append(error)

    count = min(processes, len(todo))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        running += [
            subprocess.Popen([*command, f"--worker={count}"], **pipes) for _ in range(count)
        ]
        threads = [threading.Thread(target=drive, args=(p,), daemon=True) for p in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.2)
        if errors:
            raise errors[0]
        for process in running:
            process.stdin.close()
            process.wait()
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _give(process: subprocess.Popen, shard: int, more: Callable[[int], None]) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{shard}\n")
        process.stdin.flush()
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            raise UserError(message["error"])
        if "done" in message:
            return
        more(message["more"])
    raise UserError(
        f"a worker process stopped with exit code {process.wait()}; its own message stands above"
    )
