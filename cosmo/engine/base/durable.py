"""Make changes of local files survive a power loss.

A written file is on the disk only after its fsync, and its name only after an fsync of its folder.
Object stores do both themselves.
"""

import contextlib
import errno
import os
import pathlib
from typing import Any

from cosmo.engine.base.files import is_remote

# Some file systems (of networks, or in user space) cannot sync a folder.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def sync(path: Any) -> None:
    """Put a file's bytes, or the names in a folder, on the disk. Raises OSError."""
    if is_remote(path):
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (error.errno in _NO_FOLDER_SYNC and os.path.isdir(path)):
            raise
    finally:
        os.close(number)


def sync_tree(folder: Any) -> None:
    """Put all files and folders below `folder`, and itself, on the disk. Raises OSError."""
    if is_remote(folder):
        return
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a temporary file that is gone
                sync(os.path.join(path, name))
        sync(path)


def make_folder(path: Any) -> None:
    """Create a folder and its missing parents, with their names on the disk. Raises OSError."""
    if is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    folder = pathlib.Path(path).absolute()
    missing = [folder, *folder.parents]
    while missing and missing[-1].exists():
        missing.pop()
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)
