"""Open a data file, whatever its compression and its byte order mark.

A file's first bytes decide its compression and its kind, never its name.
"""

import contextlib
import io
import lzma
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from cosmo.engine.base import hub
from cosmo.engine.base.errors import DataError, UserError

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which Notepad and PowerShell write
ENDINGS = ("gz", "bz2", "xz", "zst")  # the usual names of compressed files
# Errors of reading a compressed file that is cut short or damaged; bz2 and zstd raise OSError.
CORRUPT = (EOFError, zlib.error, lzma.LZMAError, OSError)
# At least 262: a tar archive has its mark that far in.
HEAD_BYTES = 512  # the first bytes, by which a file's kind is known
PARQUET = b"PAR1"
# The two forms of Arrow: a file that can seek, and a stream (what `datasets` saves).
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
DOWNLOAD_AGAIN = "Download or write the file again."
_UNPACK = "Unpack it and give the file inside."
_CONVERT = "Convert it to JSON lines."
_AS_UTF8 = "Save it as UTF-8 (iconv -f UTF-16 -t UTF-8)."
# (first bytes, kind, remedy) of files that are often given in place of text.
_NOT_TEXT = (
    (PARQUET, "a Parquet file", _CONVERT),
    (ARROW_FILE, "an Arrow file", _CONVERT),
    (ARROW_STREAM, "an Arrow stream", _CONVERT),
    (b"\xff\xfe", "text in UTF-16", _AS_UTF8),
    (b"\xfe\xff", "text in UTF-16", _AS_UTF8),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "a file compressed with lz4", "Decompress it (lz4 -d)."),
    (b"\x1f\x9d", "a file compressed with compress", "Decompress it (gunzip reads it)."),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet or document of Microsoft Office", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (b"\x80\x04\x95", "a Python pickle", _CONVERT),
    (b"%PDF-", "a PDF", _CONVERT),
)
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a block's start, and the end of an empty file
_TAR_PLACE = slice(257, 262)  # where a tar archive has "ustar"
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "git lfs pull"),
    (b"version https://hawser.github.com/spec/", "a Git LFS pointer", "git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer", "git annex get ."),
)
# The remedy of an error in resumable work.
KEPT = "what is finished is kept, and the same command continues"


def is_remote(path: Any) -> bool:
    """Return whether `path` is in an object store (gs://, s3://)."""
    return "://" in str(path)


def resolve(path: Any) -> Any:
    """Return `path` as a path object: etils' for a remote one (gs://), else pathlib's.

    Download an hf:// path first, and return the local copy.
    """
    if hasattr(path, "open"):  # a path object already, or what stands for one
        return path
    path = hub.local(path)
    if is_remote(path):
        from etils import epath  # remote file systems only: most runs never need it

        return epath.Path(path)
    return pathlib.Path(path).expanduser()


@contextlib.contextmanager
def opened(path: Any, *, text: bool = True) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if it is gzip, bzip2, xz or zstd.

    The stream can seek; in a compressed file that costs reading up to the place. Raises DataError
    for the pointer that Git LFS leaves in place of a file. With `text` it also raises it for a file
    that is not text by its first bytes. Raises UserError for zstd where no library reads it.
    Opening and reading raise one of CORRUPT for a damaged file.
    """
    with resolve(path).open("rb") as raw:
        head = _head(raw)
        refuse_pointer(path, head)
        stream = _decompressed(raw, head, path)
        if text:
            _refuse_other_kinds(path, head if stream is raw else _head(stream))
        yield stream


def _head(stream: BinaryIO) -> bytes:
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    return head


def refuse_pointer(path: Any, head: bytes, setting: str | tuple[str, ...] = ()) -> None:
    """Raise DataError, with `setting`, if a file with these first bytes points to its content."""
    for start, kind, command in _POINTERS:
        if head.startswith(start):
            raise DataError.at(
                path,
                None,
                "not the file itself",
                got=kind,
                expected="the content that it points to",
                remedy=f"Run `{command}` in its repository, or download the file.",
                setting=setting,
            )


def _refuse_other_kinds(path: Any, head: bytes) -> None:
    """Raise DataError, with the kind, if a file with these first bytes is no text."""
    found = next((kind for kind in _NOT_TEXT if head.startswith(kind[0])), (b"", "", ""))[1:]
    if head[_TAR_PLACE] == b"ustar":
        found = "a tar archive", _UNPACK
    # Browsers and curl save such a page where a site asks for a login.
    elif head.lstrip(MARK + b" \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        found = "a web page", "Download the file again, with a login if its site asks for one."
    kind, remedy = found
    if kind:
        raise DataError.at(
            path, None, "not a text file", got=kind, expected="text in UTF-8", remedy=remedy
        )


def _decompressed(raw: BinaryIO, head: bytes, path: Any) -> BinaryIO:
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    # A text may begin with BZh; a block's start after it is no text.
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        import bz2

        return io.BufferedReader(bz2.BZ2File(raw))
    if head.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(raw))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(_Zstd(raw, path))
    return raw


class _KeptOpen:
    """A file that `close` leaves open: pyarrow closes it with the stream that is replaced."""

    def __init__(self, raw: BinaryIO):
        self.read, self.seek, self.tell, self.closed = raw.read, raw.seek, raw.tell, False

    def close(self) -> None:
        """Do nothing."""


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
        source = self._pyarrow.PythonFile(_KeptOpen(self._raw), mode="r")
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
    """Turn an error of the file system into one line with the remedy."""
    try:
        yield
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; {remedy}"
        raise UserError(text, setting=setting) from error
