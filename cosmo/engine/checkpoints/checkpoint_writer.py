"""Write a run's checkpoints in the background, with errors that name the cause of a failed save.

Orbax writes into a folder of its own and renames it when everything is written. Before the rename
each process writes the checksums of its files (`integrity`), so a finished checkpoint has them all.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity, run_checkpoints

log = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"  # beside FOLDER: damaged checkpoints are moved there, not deleted
MISNAMED = ".misnamed"  # ends the name of a checkpoint that is being renamed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# TensorStore raises ValueErrors without an errno: their texts are all there is.
DISK_FULL_TEXTS = ("No space left", "Disk quota exceeded", "File too large")


class LateProcessError(UserError):
    """Another process did not reach a barrier in time."""


class CheckpointWriter:
    """Saves states of a run to MODEL_DIR/checkpoints/STEP, one at a time, in the background.

    If a save fails there, the next call of `save` or `wait` raises UserError. `newest` is the step
    of the newest sound checkpoint, or None; opening moves damaged ones aside. A step that is set as
    `best` keeps its checkpoint.
    """

    def __init__(self, model_dir: str, config: run_checkpoints.CheckpointConfig):
        import orbax.checkpoint as ocp

        self.folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER
        self.timeout = config.save_timeout
        self.newest = _newest_sound_step(model_dir)
        self._run = integrity.read_run_id(model_dir)
        self._has_run_id = self._run is not None
        if self._run is None and self.newest is not None:
            # `checkpoints/` alone was copied here.
            self._run = integrity.run_of(self.folder / str(self.newest))
        self.best: int | None = None
        self._step: int | None = None  # of the save in progress
        self._bytes = 0  # of its arrays, before compression: for an error of a full disk
        self._failed = False
        run_checkpoints.quiet_orbax()
        several = jax.process_count() > 1
        self._manager = run_checkpoints.manager(
            model_dir,
            config.keep,
            best=lambda: self.best,
            async_options=ocp.AsyncOptions(
                timeout_secs=self.timeout,
                barrier_sync_fn=self._meet if several else None,
                post_finalization_callback=lambda: self._write_checksums(0),
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
        """Start to save `state`. Return once the arrays are copied; writing continues meanwhile.

        `progress` is JSON that a resumed run needs beside its arrays. Raises UserError if this
        save cannot begin or the one before it failed, or if another process does not come to save
        within `save_timeout` seconds.
        """
        self.wait()
        self._step, self._bytes = step, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._explained(), self._watched():
            # A barrier of ours, with a time limit: Orbax begins with collectives, which wait in C++
            # for ever for a process that was killed.
            if jax.process_count() > 1:
                self._meet(key=f"cosmo_save_{step}", timeout_ms=1000 * self.timeout)
            # Not earlier: a run that has saved nothing leaves nothing that looks like a run.
            if jax.process_index() == 0 and not self._has_run_id:
                self._run = self._run or uuid.uuid4().hex[:12]
                write_atomic(self.folder.parent / integrity.RUN_ID, f"{self._run}\n")
                self._has_run_id = True
            run_checkpoints.start_saving(self._manager, step, state, description, progress)

    def wait(self) -> None:
        """Wait until the save in progress is complete. Raises UserError if it failed."""
        if self._step is None or self._failed:
            return
        with self._explained(), self._watched():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._sync_names()
        # An interrupted save leaves no mark, and raises nothing.
        if (self.folder / str(self._step) / run_checkpoints.COMMITTED).exists():
            self.newest = self._step
        self._step = None

    def _sync_names(self) -> None:
        """Put on the disk what Orbax writes last: its mark, its metadata, the folder's name."""
        path = self.folder / str(self._step)
        with contextlib.suppress(FileNotFoundError):  # an interrupted save
            for name in path.iterdir():
                if name.is_file():
                    durable.sync(name)
            durable.sync(path)
        durable.sync(self.folder)
        durable.sync(self.folder.parent)

    def close(self) -> None:
        """Wait for the save in progress, log its error, and release Orbax. Safe to call twice."""
        # Logged, not raised: another error is on its way, or `wait` would have raised this one.
        try:
            self.wait()
        except UserError as error:
            log.error("%s", error)
        if not self._failed:
            self._manager.close()

    def restore(self, abstract: Any, description: dict[str, Any]) -> Any:
        """Return the state of `newest`, laid out as `abstract` (see `run_checkpoints`)."""
        return run_checkpoints.restore_state(self._manager, self.newest, abstract, description)

    def read_progress(self) -> dict[str, Any]:
        """Return the `progress` that was saved at `newest`; empty if there is none."""
        if self.newest is None:
            return {}
        return run_checkpoints.read_progress(self._manager, self.newest)

    def kept(self, *, wait: bool = False) -> str:
        """Return in words from which step a run that ends now would resume.

        With `wait`, first wait for the save in progress.
        """
        if wait:
            with contextlib.suppress(UserError):
                self.wait()
        if self.newest is None:
            return f"no checkpoint was saved yet in {self.folder}"
        return f"step {self.newest} is kept in {self.folder}"

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait at a barrier of all processes. Orbax calls this too, as its hook."""
        import orbax.checkpoint as ocp

        # At this barrier of Orbax's the process has written all its files, and the rename follows.
        if "async_write_complete" in key and jax.process_index() > 0:
            self._write_checksums(jax.process_index())
        try:
            # Orbax's barrier has a time limit; JAX's public ones have none.
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=max(timeout_ms, 1))
        except jax.errors.JaxRuntimeError as error:
            late = late_processes(str(error))
            who = f"process {late} lags" if late else "a process lags or has died"
            text = (
                f"saving step {self._step} to {self.folder}: {who}: it did not arrive within "
                f"{self.timeout} s (SAVE_TIMEOUT). {self.kept()}; look at that process's log"
            )
            log.error("%s", text)
            raise LateProcessError(text) from error

    def _write_checksums(self, process: int) -> None:
        # Orbax writes into a folder beside the final one; in a bucket, into the final one.
        partial = next(iter(self.folder.glob(f"{self._step}{integrity.PARTIAL}*")), None)
        folder = partial or self.folder / str(self._step)
        integrity.write_manifest(folder, self._step, self._run, process, jax.process_count())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of a save into a UserError, and remove the files that it has left."""
        try:
            yield
        except Exception as error:
            self._failed = True
            text = self._explanation(error)
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):
                    run_checkpoints.remove_unfinished(self.folder)
            raise UserError(text) from error

    def _explanation(self, error: BaseException) -> str:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, LateProcessError):
                return str(cause)
        where = f"checkpoint {self.folder}/{self._step} could not be written"
        texts = [str(cause) for cause in causes]
        full = any(getattr(cause, "errno", None) in DISK_FULL for cause in causes)
        if full or any(words in text for words in DISK_FULL_TEXTS for text in texts):
            space = "" if is_remote(self.folder) else f", {_free(self.folder)} free there"
            return (
                f"{where}: the disk is full or a file too large for it. The checkpoint takes up to "
                f"{_size_text(self._bytes)}{space}. {self.kept()}. Free some space (or lower "
                "KEEP_CHECKPOINTS for the next run) and give the same command again"
            )
        if any(isinstance(cause, TimeoutError) for cause in causes):
            return f"{where} within {self.timeout} s (SAVE_TIMEOUT). {self.kept()}"
        first = next((text for text in texts if text.strip()), type(error).__name__)
        return f"{where}: {first.strip().splitlines()[0]}. {self.kept()}"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """End the process if this block takes twice the timeout."""

        # Exceptions do not reach a thread that waits in C++, so only an exit ends the wait. At a
        # normal exit JAX would wait for the other processes, for minutes.
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
        timer.daemon = True  # it must not keep a finished process running
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def late_processes(message: str) -> str:
    """Return the processes that a failed barrier of JAX's names, such as "1, 3"; "" if unknown."""
    # JAX offers no list: its text names them one a line, as /job:jax_worker/.../task:1.
    names = re.search(r"task names:\s*(.*?)(?:\n\s*\n|$)", message, re.S)
    found = re.findall(r"(\d+)\s*$", names.group(1), re.M) if names else []
    return ", ".join(found)


def _newest_sound_step(model_dir: str) -> int | None:
    """Return the newest sound checkpoint's step. Move damaged newer and unfinished ones away.

    Each of several processes reads its part of the checksums; the first moves.
    """
    folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER
    first = jax.process_index() == 0
    if first and folder.exists():
        run_checkpoints.remove_unfinished(folder)
        _restore_names(folder)
        done = set(run_checkpoints.completed_steps(model_dir))
        # Orbax takes any folder with a number for a checkpoint, finished or not, and would silently
        # not save that step again.
        for path in folder.iterdir():
            if path.name.isdigit() and int(path.name) not in done:
                _move_away(path, f"it was not finished (no {run_checkpoints.COMMITTED})")
    moved = False
    while True:
        steps = run_checkpoints.completed_steps(model_dir) if first else []
        # A bucket may list files differently to each process: the first one's list decides.
        step = steps[-1] if steps else -1
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0 and moved:
            raise UserError(
                f"every checkpoint of {model_dir} was damaged, and is now in {DAMAGED}/ there; "
                "give another MODEL_DIR, or the same command again to start anew"
            )
        if step < 0:
            return None
        path = folder / str(step)
        found = integrity.find_damage(path, jax.process_index(), jax.process_count())
        if first and not integrity.has_manifest(path):
            log.info(
                "%s has no checksums: reading its arrays once, to check that they can be", path
            )
            found = run_checkpoints.find_unreadable(model_dir, step)
        if found:
            log.warning("checkpoint %s is damaged: %s", path, found)
        if not any_process(found is not None):
            return step
        if first:
            _move_away(path, found or "another process found it damaged")
        moved = True
        any_process(False)  # a barrier: all wait for the move


def _restore_names(folder: epath.Path) -> None:
    """Rename each checkpoint in `folder` that has another step's name to its own step.

    A copy, whose own name is taken, is moved away.
    """
    misnamed = {}
    for path in sorted(folder.iterdir()):
        step = integrity.step_of(path) if path.name.removesuffix(MISNAMED).isdigit() else None
        if step is not None and path.name != str(step):
            misnamed[path] = step
    # All are set aside first, because two may have each other's names. A start after a kill finds
    # them by the ending.
    aside = {}
    for path, step in misnamed.items():
        hidden = path.with_name(path.name.removesuffix(MISNAMED) + MISNAMED)
        aside[path.rename(hidden) if path != hidden else path] = step
    for path, step in aside.items():
        target = folder / str(step)
        if target.exists():
            _move_away(path, f"it is the checkpoint of step {step} under another step's name")
            continue
        path.rename(target)
        log.warning(
            "checkpoint %s was under another step's name, %s, and is renamed",
            target,
            path.name.removesuffix(MISNAMED),
        )


def _move_away(path: epath.Path, why: str) -> None:
    # Moved, not deleted: a person may want to look. Out of `checkpoints/`, which Orbax lists.
    named = path.with_name(path.name.removesuffix(MISNAMED))
    target = path.parent.parent / DAMAGED / named.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{named.name}-{number}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    except OSError as error:
        raise UserError(
            f"checkpoint {named} is damaged ({why}) and cannot be moved to {target} "
            f"({error.strerror or error}): remove it"
        ) from error
    log.warning(
        "checkpoint %s is not used: %s. It is now %s (remove it when you have seen it); the run "
        "continues from an earlier one, if there is one, and saves this step again",
        named,
        why,
        target,
    )


def any_process(flag: bool) -> bool:
    """Return whether `flag` is true in any process. Every process must call this; all wait."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, the errors grouped in it and its causes, outermost first."""
    # Orbax wraps errors of its threads several times, also in groups.
    seen, todo = set(), [error]
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [*getattr(link, "exceptions", ()), link.__cause__, link.__context__]


def _free(folder: epath.Path) -> str:
    try:
        return _size_text(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number of bytes"


def _size_text(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
