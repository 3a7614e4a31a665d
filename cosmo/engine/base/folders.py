"""Check an output folder before hours of work, and lock it for one process at a time."""

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator

from etils import epath

from cosmo.engine.base import durable
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained, is_remote

log = logging.getLogger(__name__)


def prepare_folder(path: str, setting: str = "MODEL_DIR") -> epath.Path:
    """Create a folder and return it; UserError if it cannot be written to."""
    folder = epath.Path(path)
    # A write, because permissions show neither a read-only mount nor a quota. Its name is its own,
    # because several processes may probe at once.
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        durable.make_folder(folder)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written to ({error.strerror or error}); give another folder",
            setting=setting,
        ) from error
    return folder


@contextlib.contextmanager
def only_writer(
    folder: epath.Path, setting: str = "MODEL_DIR", name: str = ".lock"
) -> Iterator[None]:
    """Lock `folder` for this process; raise UserError if another process holds the lock.

    The lock is of the file `name` in it. It ends with the process, however it ends. Object stores
    have no locks.
    """
    if is_remote(folder):
        yield
        return
    import fcntl

    path = folder / name
    with contextlib.ExitStack() as stack:
        with explained(path, "free some space, or give another folder", setting):
            # Without a buffer, because a full disk would refuse it again when the file is closed.
            file = stack.enter_context(open(path, "ab+", buffering=0))
        try:
            # A lock of the system's: a file with a process number would outlast a kill.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise UserError(
                f"{folder} is in use by {holder or 'another process'}: stop it, or give another "
                "folder",
                setting=setting,
            ) from error
        except OSError:  # a file system without locks
            log.info("%s cannot be locked: make sure that no other process writes there", folder)
        with explained(path, "free some space, or give another folder", setting):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
