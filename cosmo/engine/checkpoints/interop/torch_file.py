"""Read a file that `torch.save` wrote: without torch, and without running code in its pickle.

Since torch 1.6 such a file is a zip archive of uncompressed entries. `data.pkl` is a pickle of the
saved object, whose tensors are references; `data/KEY` holds the bytes of one storage of numbers.
Source: `torch.serialization` and `torch._utils._rebuild_tensor_v2`.
"""

import dataclasses
import math
import pickletools
import struct
import threading
import zipfile
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from cosmo.engine.base.errors import MAX_GOT_CHARS, UserError, shortened, shown
from cosmo.engine.checkpoints.interop import foreign_files
from cosmo.engine.checkpoints.lazy import Index, LazyArray

PICKLE = "data.pkl"  # in the archive's one folder, as are the others
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
# A model of 11 billion parameters with its optimizer has half a megabyte. A byte of a pickle may
# take a hundred of memory.
MAX_PICKLE_BYTES = 2**23
MAX_SIZE = 2**31 - 1  # of one axis: XLA's indices
MAX_AXES = 8
CHECKSUM_BYTES = 2**22  # read at a time to compute a checksum
LOCAL_HEADER_BYTES = 30

ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
ALLOWED = {ORDERED_DICT, TENSOR, *STORAGES}


def is_torch_file(file: epath.Path) -> bool:
    """Return whether a file begins as one that `torch.save` wrote, of today's or the old form."""
    try:
        with file.open("rb") as content:
            head = content.read(len(ZIP_MAGIC))
    except OSError:
        return False
    return head == ZIP_MAGIC or head.startswith(PICKLE_MAGIC)


def read(path: str) -> Any:
    """Return the object in a file, with a LazyArray for each tensor. Reads no tensor yet.

    Containers are plain dicts, lists and tuples. Raises UserError for a damaged file, for one in
    the old form, and for one whose pickle asks for anything but tensors and plain containers.
    """
    archive = _open(path)
    pickled = archive.bytes_of(PICKLE, MAX_PICKLE_BYTES)
    if (order := archive.entries.get("byteorder")) and order.file_size <= 16:
        found = archive.bytes_of("byteorder", 16)
        if found != b"little":
            raise UserError(f"{path} was written on a machine of another byte order: {found!r}")
    try:
        return _Unpickler(archive).run(pickled)
    # pickletools raises these for bytes that are not a pickle.
    except (ValueError, struct.error, OverflowError) as error:
        reason = shortened(str(error), MAX_GOT_CHARS)  # it may hold bytes of the file
        raise UserError(f"{path} is damaged: its pickle {reason}; copy it again") from error


class _Archive:
    """The entries of a zip archive by their name in its one folder. They may share nothing else."""

    def __init__(self, path: str, size: int, entries: dict[str, zipfile.ZipInfo]):
        self.path, self.size, self.entries = path, size, entries
        self.checked: set[str] = set()  # entries whose checksum was right
        self.lock = threading.Lock()

    def entry(self, name: str) -> zipfile.ZipInfo:
        """Return an entry; UserError if there is none, or its bytes are not as they are stored."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"{self.path} has no entry {shown(name)}: copy the file again")
        # torch never compresses. So no entry can be larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UserError(f"{self.path}: entry {shown(name)} is compressed: torch wrote no such")
        return entry

    def place(self, name: str) -> int:
        """Return where the bytes of an entry begin in the file. Raises UserError."""
        entry = self.entry(name)
        head = self._read(entry.header_offset, LOCAL_HEADER_BYTES)
        if len(head) < LOCAL_HEADER_BYTES or not head.startswith(ZIP_MAGIC):
            raise UserError(f"{self.path}: entry {shown(name)} is damaged: copy the file again")
        # Two lengths end the header: of the entry's name, and of what pads its bytes to 64.
        start = entry.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", head[26:]))
        if start + entry.file_size > self.size:
            raise UserError(f"{self.path} ends within entry {shown(name)}: copy the file again")
        return start

    def bytes_of(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small entry. Raises UserError for more than `limit`."""
        size = self.entry(name).file_size
        if size > limit:
            raise UserError(f"{self.path}: entry {name} has {size} bytes, expected at most {limit}")
        self.check(name)
        return self.part(name, 0, size)

    def part(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of an entry from its byte `start`."""
        data = self._read(self.place(name) + start, count)
        if len(data) != count:
            raise UserError(f"{self.path} ends within entry {shown(name)}: copy the file again")
        return data

    def _read(self, start: int, count: int) -> bytes:
        """Return up to `count` bytes of the file from byte `start`."""
        # Opened for each part: a model has thousands of readers.
        try:
            with open(self.path, "rb") as content:
                content.seek(start)
                return content.read(count)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error

    def check(self, name: str) -> None:
        """Raise UserError if the bytes of an entry are not those of its checksum. Once an entry."""
        with self.lock:
            if name in self.checked:
                return
        entry, found, place = self.entry(name), 0, self.place(name)
        for start in range(0, entry.file_size, CHECKSUM_BYTES):
            count = min(CHECKSUM_BYTES, entry.file_size - start)
            found = zlib.crc32(self._read(place + start, count), found)
        if found != entry.CRC:
            raise UserError(
                f"{self.path}: entry {shown(name)} has another checksum than was stored with it: "
                "copy or download the file again"
            )
        with self.lock:
            self.checked.add(name)


def _open(path: str) -> _Archive:
    """Return the archive in a file. Raises UserError if it is damaged, or in the old form."""
    file = epath.Path(path)
    try:
        foreign_files.check_no_pointer(file)
        with file.open("rb") as content:
            head = content.read(len(ZIP_MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if head.startswith(PICKLE_MAGIC):
        raise UserError(
            f"{path} is in torch's old form, which is not a zip archive and is not loaded. Where "
            'torch is installed, convert it once: python -c "import torch; '
            f"torch.save(torch.load('{path}', map_location='cpu', weights_only=True), "
            f"'{path}.zip')\", then give its copy the name of the old file"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile raises errors of many kinds for bytes that no zip archive has.
    except Exception as error:
        raise UserError(
            f"{path} is no file of torch's, or is damaged: {error}; copy or download it again"
        ) from error
    pickles = [info.filename for info in infos if info.filename.split("/", 1)[-1] == PICKLE]
    if len(pickles) != 1:
        raise UserError(
            f"{path} is a zip archive with {len(pickles)} entries {PICKLE}, expected one: it is no "
            "file of torch's"
        )
    folder = pickles[0].removesuffix(PICKLE)
    inside = [info for info in infos if info.filename.startswith(folder)]
    entries = {info.filename.removeprefix(folder): info for info in inside}
    return _Archive(path, file.stat().length, entries)


class _Global(NamedTuple):
    """A class or function that a pickle names. It is never looked up, so nothing of it runs."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A reference to the numbers in one entry."""

    dtype: np.dtype
    key: str
    count: int


# Compared by value: two tensors over the same numbers are equal, and are not read to know it.
@dataclasses.dataclass(frozen=True)
class _Reader:
    """The function that reads a part of one tensor. Offset and strides count numbers."""

    archive: _Archive
    storage: _Storage
    offset: int
    strides: tuple[int, ...]

    def __call__(self, index: Index) -> np.ndarray:
        shape = tuple(part.stop - part.start for part in index)
        dtype = self.storage.dtype
        if 0 in shape:
            return np.empty(shape, dtype)
        name = f"data/{self.storage.key}"
        # Before the first part: a damaged weight is a number like any other.
        self.archive.check(name)
        parts = list(zip(index, self.strides, strict=True))
        first = self.offset + sum(part.start * stride for part, stride in parts)
        last = self.offset + sum((part.stop - 1) * stride for part, stride in parts)
        size = dtype.itemsize
        data = self.archive.part(name, first * size, (last - first + 1) * size)
        strides = tuple(stride * size for stride in self.strides)
        numbers = np.frombuffer(data, dtype)
        # Within `numbers` by the lines above: strides are not negative.
        view = np.lib.stride_tricks.as_strided(numbers, shape, strides, writeable=False)
        return np.array(view, order="C")


class _Unpickler:
    """A machine for the opcodes of torch's pickles, that makes tensors and plain containers alone.

    Python's own `pickle` would import and call what a pickle names.
    """

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks that a MARK has set aside
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return what a pickle describes. Raises ValueError, and UserError for a foreign class."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.pop()
            self.do(opcode.name, argument)
        raise ValueError("has no end")

    def pop(self) -> Any:
        """Return the value on top of the stack, and remove it."""
        if not self.stack:
            raise ValueError("takes a value where there is none")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """Return the values since the last MARK, and remove them."""
        if not self.below:
            raise ValueError("ends a group that did not begin")
        values, self.stack = self.stack, self.below.pop()
        return values

    def do(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                self.stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES":
                self.stack.append(argument)
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE":
                values = self.since_mark()
                self.stack.append(tuple(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [self.pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(values)))
            case "APPEND" | "APPENDS":
                values = [self.pop()] if name == "APPEND" else self.since_mark()
                self.top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.since_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
                self.set_items(values)
            case "POP":
                self.pop()
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"refers to value {argument}, which it does not hold")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(self.named(".".join(argument.split(" ", 1))))
            case "STACK_GLOBAL":
                part, module = self.pop(), self.pop()
                self.stack.append(self.named(f"{shown_name(module)}.{shown_name(part)}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                self.stack.append(self.call(function, arguments))
            case "BUILD":
                # torch keeps the versions of modules as an attribute of the dict of tensors.
                state = self.pop()
                if not isinstance(self.top(dict), dict) or not isinstance(state, dict):
                    raise ValueError("sets attributes of something that is not a dict")
            case "BINPERSID":
                self.stack.append(self.storage(self.pop()))
            case "INST" | "OBJ" | "NEWOBJ" | "NEWOBJ_EX":
                made = ".".join(argument.split(" ", 1)) if name == "INST" else f"opcode {name}"
                raise _refused(self.archive.path, made)
            case _:
                raise ValueError(f"holds the opcode {name}, which torch does not write")

    def top(self, kind: type) -> Any:
        """Return the value on top of the stack, which stays there. ValueError for another kind."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"holds no {kind.__name__} where it needs one")
        return self.stack[-1]

    def set_items(self, values: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack."""
        target = self.top(dict)
        if len(values) % 2:
            raise ValueError("holds a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # The hash of a deep tuple would exhaust the stack of the process.
            if not isinstance(key, str | int | float):
                raise ValueError(f"holds a key of type {type(key).__name__}")
            target[key] = value

    def named(self, name: str) -> _Global:
        """Return a class or function by its full name; UserError if it is not ALLOWED."""
        if name not in ALLOWED:
            raise _refused(self.archive.path, name)
        return _Global(name)

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what a call of an allowed name makes. Raises ValueError for any other call."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("calls something that is not a function")
        if function.name == ORDERED_DICT and not arguments:
            return {}
        if function.name != TENSOR:
            raise ValueError(f"calls {function.name} with {len(arguments)} values")
        if len(arguments) not in (6, 7):  # ..., requires_grad, hooks and, in torch 2, metadata
            raise ValueError(f"makes a tensor of {len(arguments)} values, expected 6 or 7")
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("makes a tensor without a storage")
        if not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides):
            raise ValueError(f"makes a tensor of shape {shown(shape)} and strides {shown(strides)}")
        if not _is_size(offset):
            raise ValueError(f"makes a tensor that begins at number {shown(offset)}")
        steps = zip(shape, strides, strict=True)
        last = offset + sum((size - 1) * stride for size, stride in steps)
        size = math.prod(shape)
        # A stride of 0 repeats numbers: a small file could describe a tensor of any size.
        if size > storage.count or (size and last >= storage.count):
            raise ValueError(
                f"makes a tensor of shape {shape}, which goes beyond the {storage.count} numbers "
                "of its storage"
            )
        reader = _Reader(self.archive, storage, offset, strides)
        return LazyArray(shape, storage.dtype, reader)

    def storage(self, reference: Any) -> _Storage:
        """Return a storage by its reference ("storage", type, key, device, count). ValueError."""
        right = isinstance(reference, tuple) and len(reference) == 5
        if not right or reference[0] != "storage" or not isinstance(reference[1], _Global):
            raise ValueError(f"refers to {shown(reference)}, expected a storage")
        _, kind, key, _, count = reference
        dtype = STORAGES.get(kind.name)
        if dtype is None or not isinstance(key, str) or not _is_size(count, 2**63):
            raise ValueError(f"refers to {shown(reference)}, expected a storage")
        stored = self.archive.entry(f"data/{key}").file_size
        if stored != count * dtype.itemsize:
            raise ValueError(
                f"refers to a storage of {count} numbers ({dtype}), and its entry data/{key} has "
                f"{stored} bytes"
            )
        return _Storage(dtype, key, count)


def shown_name(name: Any) -> str:
    """Return a part of a class's name as text, whatever a pickle holds in its place."""
    return name if isinstance(name, str) else shown(name)


def _is_size(value: Any, limit: int = 2**63) -> bool:
    """Return whether a value is a whole number from 0 to below `limit`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _sizes(values: Any) -> bool:
    """Return whether a value is a tuple of sizes or strides of a few axes."""
    few = isinstance(values, tuple) and len(values) <= MAX_AXES
    return few and all(_is_size(value, MAX_SIZE) for value in values)


def _refused(path: str, name: str) -> UserError:
    return UserError(
        f"{path}: its pickle asks for {shown(name)}, which is refused: only tensors and plain "
        "containers are loaded. Do not load it by torch either unless you trust who made it; they "
        "can save its entry 'model' alone"
    )
