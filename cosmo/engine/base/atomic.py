"""Write files atomically: a reader, or a run after a kill, finds the whole old or new content."""

import contextlib
from collections.abc import Iterator
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote, resolve


@contextlib.contextmanager
def replacing(path: Any, partial: Any = None, remedy: str = "") -> Iterator[Any]:
    """Yield a path to write to, which replaces `path` when the block succeeds.

    It is `partial`, by default .NAME.partial beside `path`: only one process may write it. It is
    removed when the block fails. Raises UserError with the `remedy` if the file system refuses.
    """
    path = resolve(path)
    if partial is None and is_remote(path):
        partial = path  # an object store shows an object when it is whole
    elif partial is None:
        # A fixed name: what a kill leaves behind is overwritten by the next try.
        partial = path.parent / f".{path.name}.partial"
    try:
        yield partial
        durable.sync(partial)  # else a power loss could leave the new name without the bytes
        if partial != path:
            partial.replace(path)
            # And the old name, or none, although a later step was built on this file.
            durable.sync(path.parent)
    except BaseException as error:
        if partial != path:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot write {path}: {error.strerror or error}"
            raise UserError(f"{reason}; {remedy}" if remedy else reason) from error
        raise


def write_atomic(path: Any, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: all of it, or nothing and UserError."""
    with replacing(path) as partial:
        partial.write_bytes(json_lines.encode(content) if isinstance(content, str) else content)
