"""Saving a run's states in the background, with errors that name the cause of a failed save.

Orbax writes into a folder of its own and renames it when everything is written. Before the rename
each process writes the checksums of its files (`integrity`): a finished checkpoint has them all.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity, run_checkpoints

log = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"  # beside FOLDER: what a run has set aside
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = ("No space left", "Disk quota exceeded", "File too large")


class CheckpointWriter:
    """Saves states of a run to MODEL_DIR/checkpoints/STEP, one at a time, in the background.

    What fails there is raised as a UserError by the next call of `save` or `wait`. `newest` is the
    newest sound checkpoint's step, or None: those that are damaged are set aside on opening. `best`
    may be set to a step whose checkpoint is not to be deleted.
    """

    def __init__(self, model_dir: str, config: "run_checkpoints.CheckpointConfig"):
        import orbax.checkpoint as ocp

        self.folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER
        self.timeout = config.save_timeout
        self.newest = _set_aside_damaged(model_dir)
        self.best: int | None = None
        self._step: int | None = None  # of the save that is going on
        self._bytes = 0
        self._failed = False
        _quiet_threads()
        several = jax.process_count() > 1
        self._manager = run_checkpoints.manager(
            model_dir,
            config.keep,
            best=lambda: self.best,
            async_options=ocp.AsyncOptions(
                timeout_secs=self.timeout,
                barrier_sync_fn=self._meet if several else None,
                post_finalization_callback=self._finish_checksums,
            ),
        )
        # Orbax would ask JAX about preemption with steps of its own, in other threads, which moves
        # the step that all processes agree to stop at (see `preemption`).
        self._manager.reached_preemption = lambda step: False

    def save(
        self,
        step: int,
        state: Any,
        description: dict[str, Any],
        progress: dict[str, Any] | None = None,
    ) -> None:
        """Start saving `state`; returns once the arrays are copied, the writing goes on behind.

        `progress` is what the run must remember beside its arrays, as JSON. Raises UserError if
        this save cannot begin or the one before it failed; of several processes, after
        `save_timeout` seconds, if one does not come to save.
        """
        self.wait()
        self._step, self._bytes = step, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._explained(), self._watched():
            if jax.process_count() > 1:
                self._meet(key=f"cosmo_save_{step}", timeout_ms=1000 * self.timeout)
            run_checkpoints.start_saving(self._manager, step, state, description, progress)

    def wait(self) -> None:
        """Wait for what is being written. Raises UserError if that failed."""
        if self._step is None or self._failed:
            return
        with self._explained(), self._watched():
            self._manager.wait_until_finished()
        if (
            self.folder / str(self._step) / run_checkpoints.COMMITTED
        ).exists():  # not if interrupted
            self.newest = self._step
        self._step = None

    def close(self) -> None:
        """Wait for what is being written and let go; an error of it is logged. Safe twice."""
        try:
            self.wait()
        except UserError as error:  # another one is on its way, or it would have come by `wait`
            log.error("%s", error)
        if not self._failed:
            self._manager.close()

    def restore(self, abstract: Any, description: dict[str, Any]) -> Any:
        """The state of `newest`, laid out as `abstract` (see `run_checkpoints.restore`)."""
        return run_checkpoints.restore(self._manager, self.newest, abstract, description)

    def progress(self) -> dict[str, Any]:
        """What `save` was given as `progress` at `newest`; empty where there is none."""
        return {} if self.newest is None else run_checkpoints.progress(self._manager, self.newest)

    def kept(self, *, wait: bool = False) -> str:
        """Which step a run that ends now goes on from, in words; `wait` for the save going on."""
        if wait:
            with contextlib.suppress(UserError):
                self.wait()
        if self.newest is None:
            return f"no checkpoint was saved yet in {self.folder}"
        return f"step {self.newest} is kept in {self.folder}"

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait at a barrier of all processes; this process's files are complete (Orbax's hook)."""
        import orbax.checkpoint as ocp

        if "async_write_complete" in key and jax.process_index() > 0:
            integrity.write(self._unfinished(), jax.process_index(), jax.process_count())
        try:
            # Orbax's barrier has a time limit; JAX's public ones have none.
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=max(timeout_ms, 1))
        except jax.errors.JaxRuntimeError as error:
            late = lagging(str(error))
            who = f"process {late} lags" if late else "a process lags or has died"
            text = (
                f"saving step {self._step} to {self.folder}: {who}: it did not arrive within "
                f"{self.timeout} s (SAVE_TIMEOUT). {self.kept()}; look at that process's log"
            )
            log.error("%s", text)
            raise UserError(text) from error

    def _finish_checksums(self) -> None:
        integrity.write(self._unfinished(), 0, jax.process_count())

    def _unfinished(self) -> epath.Path:
        """Where Orbax is writing: a folder beside the final one, in a bucket that one itself."""
        for path in self.folder.glob(f"{self._step}{integrity.PARTIAL}*"):
            return path
        return self.folder / str(self._step)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what can go wrong with a save into a UserError, and removes what it has left."""
        try:
            yield
        except Exception as error:
            self._failed = True
            text = self._explanation(error)
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):
                    _remove_unfinished(self.folder)
            raise UserError(text) from error

    def _explanation(self, error: BaseException) -> str:
        chain = list(_chain(error))
        for link in chain:
            if isinstance(link, UserError) and "lags" in str(link):
                return str(link)
        where = f"checkpoint {self.folder}/{self._step} could not be written"
        texts = [str(link) for link in chain]
        full = any(getattr(link, "errno", None) in FULL for link in chain)
        if full or any(words in text for words in FULL_TEXTS for text in texts):
            space = "" if is_remote(self.folder) else f", {_free(self.folder)} free there"
            return (
                f"{where}: the disk is full or a file too large for it. The checkpoint takes up to "
                f"{_megabytes(self._bytes)}{space}. {self.kept()}. Free some space (or lower "
                "--gin.KEEP_CHECKPOINTS for the next run) and give the same command again"
            )
        if any(isinstance(link, TimeoutError) for link in chain):
            return f"{where} within {self.timeout} s (SAVE_TIMEOUT). {self.kept()}"
        first = next((text for text in texts if text.strip()), type(error).__name__)
        return f"{where}: {first.strip().splitlines()[0]}. {self.kept()}"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Ends the process if this takes twice the timeout: a wait in C++ hears no exception."""

        def end():
            print(
                f"error: saving step {self._step} to {self.folder} hangs in process "
                f"{jax.process_index()}: not finished within {2 * self.timeout} s "
                f"(SAVE_TIMEOUT). {self.kept()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

        timer = threading.Timer(2 * self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def lagging(message: str) -> str:
    """The processes that a failed barrier of JAX's misses, such as "1, 3"; empty if unknown."""
    names = re.search(r"task names:\s*(.*?)(?:\n\s*\n|$)", message, re.S)
    found = re.findall(r"(\d+)\s*$", names.group(1), re.M) if names else []
    return ", ".join(found)


def _set_aside_damaged(model_dir: str) -> int | None:
    """The newest sound checkpoint's step; damaged newer ones, and unfinished ones, are moved away.

    Of several processes each reads its part of the checksums, the first moves.
    """
    folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER
    first = jax.process_index() == 0
    if first and folder.exists():
        _remove_unfinished(folder)
        done = set(run_checkpoints.completed_steps(model_dir))
        for path in folder.iterdir():  # Orbax would take it for a checkpoint
            if path.name.isdigit() and int(path.name) not in done:
                _set_aside(path, f"it was not finished (no {run_checkpoints.COMMITTED})")
    moved = False
    while True:
        steps = run_checkpoints.completed_steps(model_dir) if first else []
        step = _of_the_first(steps[-1] if steps else -1)
        if step < 0 and moved:
            raise UserError(
                f"every checkpoint of {model_dir} was damaged, and is now in {DAMAGED}/ there; "
                "give another MODEL_DIR, or the same command again to start anew"
            )
        if step < 0:
            return None
        path = folder / str(step)
        found = integrity.problem(path, jax.process_index(), jax.process_count())
        if first and not integrity.has_manifest(path):
            log.info("%s has no checksums: its arrays are read once, to see that they can be", path)
            found = run_checkpoints.unreadable(model_dir, step)
        if found:
            log.warning("checkpoint %s is damaged: %s", path, found)
        if not anywhere(found is not None):
            return step
        if first:
            _set_aside(path, found or "another process found it damaged")
        moved = True
        anywhere(False)  # all wait for the move


def _set_aside(path: epath.Path, why: str) -> None:
    target = path.parent.parent / DAMAGED / path.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{path.name}-{number}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} is damaged ({why}) and cannot be moved to {target} "
            f"({error.strerror or error}): remove it"
        ) from error
    log.warning(
        "checkpoint %s is not used: %s. It is now %s (remove it when you have seen it); the run "
        "goes on from an earlier one, if there is one, and saves this step again",
        path,
        why,
        target,
    )


def _remove_unfinished(folder: epath.Path) -> None:
    for partial in folder.glob(f"*{integrity.PARTIAL}*"):
        partial.rmtree()


def _of_the_first(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all wait for all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it holds and what caused it, outermost first."""
    seen, todo = set(), [error]
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [*getattr(link, "exceptions", ()), link.__cause__, link.__context__]


def _quiet_threads() -> None:
    """Threads of Orbax and TensorStore print stacks of errors that are raised here too: not so."""
    for name in ("absl", "concurrent.futures", "asyncio"):
        logging.getLogger(name).addFilter(_not_orbax)
    sys.unraisablehook = _unraisable


def _unraisable(report, show=sys.unraisablehook) -> None:
    # TensorStore's other writes, when one has failed, come back to a loop that is closed.
    if str(report.exc_value) != "Event loop is closed":
        show(report)


def _not_orbax(record: logging.LogRecord) -> bool:
    if record.name == "absl":
        return f"{os.sep}orbax{os.sep}" not in record.pathname
    text = record.getMessage()
    return "exception calling callback" not in text and "never retrieved" not in text


def _free(folder: epath.Path) -> str:
    try:
        return _megabytes(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number of bytes"


def _megabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
