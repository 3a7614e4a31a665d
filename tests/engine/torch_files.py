"""Write files as `torch.save` does, without torch: a zip archive with a pickle of protocol 2."""

import dataclasses
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

TYPES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "float64": "DoubleStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
FOLDER = "archive"


@dataclasses.dataclass
class Tensor:
    """A tensor over the numbers of entry `key`."""

    key: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclasses.dataclass
class Raw:
    """Opcodes that stand in a pickle as they are."""

    opcodes: bytes


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def called(name: str) -> bytes:
    """Opcode GLOBAL."""
    module, _, part = name.rpartition(".")
    return f"c{module}\n{part}\n".encode()


def opcodes(value: Any, storages: dict[str, np.ndarray]) -> bytes:
    """The opcodes of a value."""

    def all_of(values) -> bytes:
        return b"".join(opcodes(v, storages) for v in values)

    match value:
        case Raw():
            return value.opcodes
        case Tensor():
            numbers = storages[value.key]
            kind = called(f"torch.{TYPES[numbers.dtype.name]}")
            storage = b"(" + text("storage") + kind + text(value.key) + text("cpu")
            storage += number(numbers.size) + b"tQ"
            hooks = called("collections.OrderedDict") + b")R"
            shapes = all_of([value.offset, tuple(value.shape), tuple(value.strides)])
            made = called("torch._utils._rebuild_tensor_v2")
            return made + b"(" + storage + shapes + b"\x89" + hooks + b"tR"
        case dict():
            return b"}(" + all_of(x for item in value.items() for x in item) + b"u"
        case list():
            return b"](" + all_of(value) + b"e"
        case tuple():
            return b"(" + all_of(value) + b"t"
        case str():
            return text(value)
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return number(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case None:
            return b"N"
    raise TypeError(type(value))


def save(
    file: pathlib.Path,
    value: Any,
    storages: dict[str, np.ndarray],
    *,
    compression: int = zipfile.ZIP_STORED,
    further: dict[str, bytes] | None = None,
) -> None:
    """Write a file whose object is `value`, with the bytes of `storages` by their key."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{FOLDER}/data.pkl", b"\x80\x02" + opcodes(value, storages) + b".")
        archive.writestr(f"{FOLDER}/byteorder", b"little")
        for key, numbers in storages.items():
            archive.writestr(f"{FOLDER}/data/{key}", numbers.tobytes())
        for name, data in (further or {}).items():
            archive.writestr(f"{FOLDER}/{name}", data)


def save_state(file: pathlib.Path, tensors: dict[str, np.ndarray | str], **further: Any) -> None:
    """Write {"model": tensors, **further}. A tensor that is a name is that tensor once more."""
    storages, state = {}, {}
    for name, array in tensors.items():
        if isinstance(array, str):
            state[name] = state[array]
            continue
        key = str(len(storages))
        storages[key] = np.ascontiguousarray(array).reshape(-1)
        strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
        state[name] = Tensor(key, array.shape, strides if array.shape else ())
    save(file, {"model": state, **further}, storages)
