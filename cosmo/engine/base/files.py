"""One way to open a text file, whatever its compression and its byte order mark.

Compression is told by a file's first bytes, never by its name.
"""

import contextlib
import io
import lzma
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from cosmo.engine.base.errors import UserError

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which Notepad and PowerShell write
ENDINGS = ("gz", "bz2", "xz", "zst")  # the usual names of compressed files
# What reading a compressed file that is cut short or damaged raises; bz2 and zstd raise OSError.
CORRUPT = (EOFError, zlib.error, lzma.LZMAError, OSError)
# The remedy of an error in resumable work.
KEPT = "what is finished is kept, and the same command continues"


def is_remote(path: Any) -> bool:
    """Return whether `path` lies in an object store (gs://, s3://)."""
    return "://" in str(path)


def resolve(path: Any) -> Any:
    """Return `path` as a path object: etils' for a remote one (gs://), else pathlib's."""
    if hasattr(path, "open"):  # a path object already, or what stands for one
        return path
    if is_remote(path):
        from etils import epath  # remote file systems only: most runs never need it

        return epath.Path(path)
    return pathlib.Path(path).expanduser()


@contextlib.contextmanager
def opened(path: Any) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if it is gzip, bzip2, xz or zstd.

    The stream can seek; in a compressed file that costs reading up to the place. Raises UserError
    for zstd where no library reads it. Reading raises one of CORRUPT for a damaged file.
    """
    with resolve(path).open("rb") as raw:
        head = raw.read(10)
        raw.seek(0)
        yield _decompressed(raw, head, path)


def _decompressed(raw: BinaryIO, head: bytes, path: Any) -> BinaryIO:
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head.startswith(b"BZh") and head[4:] == b"1AY&SY":
        import bz2

        return io.BufferedReader(bz2.BZ2File(raw))
    if head.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(raw))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(_Zstd(raw, path))
    return raw


class _Zstd(io.RawIOBase):
    """A zstd stream as pyarrow reads it, with the seeking that pyarrow's lacks."""

    def __init__(self, raw: BinaryIO, path: Any):
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(
                f"{path} is compressed with zstd, which needs pyarrow: pip install pyarrow, or "
                "decompress the file (zstd -d)"
            ) from error
        self._raw, self._pyarrow = raw, pyarrow
        self._rewind()

    def _rewind(self) -> None:
        self._raw.seek(0)
        source = self._pyarrow.PythonFile(self._raw, mode="r")
        self._stream = self._pyarrow.CompressedInputStream(source, "zstd")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place counted from the start or from here, by reading up to it."""
        target = offset if whence == io.SEEK_SET else self._position + offset
        if target < self._position:
            self._rewind()
        while self._position < target:
            data = self._stream.read(min(target - self._position, 1 << 20))
            if not data:
                break
            self._position += len(data)
        return self._position

    def tell(self) -> int:
        return self._position


@contextlib.contextmanager
def explained(path: Any, remedy: str = KEPT, setting: str | Sequence[str] = ()) -> Iterator[None]:
    """Turn an error of the file system into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; {remedy}"
        raise UserError(text, setting=setting) from error
