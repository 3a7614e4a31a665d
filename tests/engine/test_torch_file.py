"""Files of `torch.save`, read without torch: tensors, refused pickles, damaged files.

`tests/golden/torch_views.pt` was written by torch 2.13; the other files by `torch_files`.
"""

import builtins
import io
import os
import pathlib
import pickle
import random
import sys
import zipfile
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints.interop import torch_file
from cosmo.engine.checkpoints.lazy import LazyArray
from tests.engine import torch_files
from tests.engine.torch_files import Raw, Tensor, called, number, text

VIEWS = pathlib.Path(__file__).parents[1] / "golden/torch_views.pt"
NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def written(tmp_path):
    """`written(value, storages, ...)`: the path of a file whose object is `value`."""

    def write(value, storages=None, **how):
        torch_files.save(tmp_path / "file", value, storages or {"0": NUMBERS}, **how)
        return str(tmp_path / "file")

    return write


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whole", NUMBERS.reshape(4, 6)),
        ("transposed", NUMBERS.reshape(4, 6).T),
        ("columns", NUMBERS.reshape(4, 6)[:, 2:5]),
        ("every_other", NUMBERS.reshape(4, 6)[::2, 1::2]),
        ("offset", NUMBERS[7:]),
        ("scalar", NUMBERS[5]),
        ("empty", np.zeros((0, 3), np.float32)),
        ("half", NUMBERS.astype(np.float16)),
        ("bfloat16", NUMBERS.astype(ml_dtypes.bfloat16)),
        ("double", NUMBERS.astype(np.float64)),
        ("long", np.array([1])),
        ("cube", NUMBERS.reshape(2, 3, 4).transpose(2, 0, 1)),
    ],
)
def test_views_that_torch_wrote(name, expected):
    """Oracle: numpy's views of the same numbers; a part of each is that part of the whole."""
    tensor = torch_file.read(str(VIEWS))["model"][name]
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(tensor.whole(), expected)
    index = tuple(slice(size // 3, size - size // 4) for size in expected.shape)
    part = tensor.read(index)
    np.testing.assert_array_equal(part, expected[index])
    assert part.flags.c_contiguous


def test_the_rest_of_a_file_that_torch_wrote():
    """Oracle: what was saved. A module's state has attributes beside its tensors."""
    found = torch_file.read(str(VIEWS))
    assert {k: v for k, v in found.items() if k not in ("model", "state")} == {
        "updates": 3,
        "rate": 0.5,
        "none": None,
        "list": [1, (2, "é")],
    }
    assert list(found["state"]) == ["weight", "bias"]
    np.testing.assert_array_equal(found["state"]["weight"].whole(), np.arange(6.0).reshape(3, 2))


def test_equal_places_are_equal_without_reading(written):
    """Oracle: the places in the file."""
    whole, again, other = (Tensor("0", (4, 6), (6, 1), offset) for offset in (0, 0, 1))
    other.shape = (3, 6)
    found = torch_file.read(written({"a": whole, "b": again, "c": other}))
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]


def test_a_part_reads_its_rows_alone(written, monkeypatch):
    """Oracle: the bytes of the rows. The rest of the storage may be larger than memory."""
    found = torch_file.read(written({"a": Tensor("0", (4, 6), (6, 1))}))["a"]
    found.read((slice(0, 1), slice(0, 6)))  # the checksum reads it all, piece by piece
    asked = []
    part = torch_file._Archive.part
    monkeypatch.setattr(torch_file._Archive, "part", lambda *a: asked.append(a[2:]) or part(*a))
    np.testing.assert_array_equal(
        found.read((slice(1, 3), slice(0, 6))), NUMBERS.reshape(4, 6)[1:3]
    )
    assert asked == [(6 * 4, 12 * 4)]


# Of pickles that torch would not write: (opcodes, words of the error).
FOREIGN = {
    "os.system": (called("posix.system") + b"(" + text("touch OWNED") + b"tR", "posix.system"),
    "eval": (called("builtins.eval") + b"(" + text("1") + b"tR", "builtins.eval"),
    "a name alone": (called("numpy.core.multiarray.scalar"), "numpy.core.multiarray.scalar"),
    "protocol 4": (
        b"\x8c\x02os\x8c\x06system\x93(" + text("touch OWNED") + b"tR",
        "os.system",
    ),
    "no text for a name": (b"K\x01K\x02\x93", "'1.2'"),
    "INST": (b"(" + text("touch OWNED") + b"ios\nsystem\n", "os.system"),
    "OBJ": (b"(" + called("collections.OrderedDict") + b"o", "opcode OBJ"),
    "NEWOBJ": (called("collections.OrderedDict") + b")\x81", "opcode NEWOBJ"),
    "dotted": (called("torch._utils._rebuild_tensor_v2.__globals__"), "__globals__"),
    "extension": (b"\x82\x01", "EXT1"),
    "a call of a dict": (b"})R", "not a function"),
    "a call with a list": (called("collections.OrderedDict") + b"]R", "not a function"),
    "a dict with items": (
        called("collections.OrderedDict") + b"](" + b"(" + text("a") + b"K\x01te\x85R",
        "calls collections.OrderedDict",
    ),
    "a storage's call": (called("torch.FloatStorage") + b")R", "calls torch.FloatStorage"),
    "BUILD of a list": (b"]}b", "holds no dict"),
    "BUILD of a class": (called("collections.OrderedDict") + b"}b", "holds no dict"),
    "BUILD of a tuple of states": (b"}(}}tb", "attributes"),
    "BUILD of nothing": (b"00b", "where there is none"),
    "a persistent id that is a text": (text("0") + b"Q", "expected a storage"),
    "a persistent id of other parts": (
        b"(" + text("module") + called("torch.FloatStorage") + text("0") * 2 + b"K\x01tQ",
        "expected a storage",
    ),
    "a storage of an unknown type": (
        b"(" + text("storage") + called("collections.OrderedDict") + text("0") * 2 + b"K\x01tQ",
        "expected a storage",
    ),
    "a storage with a number as its key": (
        b"(" + text("storage") + called("torch.FloatStorage") + b"K\x00" + text("cpu") + b"K\x18tQ",
        "expected a storage",
    ),
    "a storage of fewer numbers": (
        b"(" + text("storage") + called("torch.FloatStorage") + text("0") * 2 + b"K\x17tQ",
        "96 bytes",
    ),
    "a storage outside of the archive": (
        b"(" + text("storage") + called("torch.FloatStorage") + text("../../x") * 2 + b"K\x18tQ",
        "no entry",
    ),
    "a key that is a deep tuple": (b"})" + b"\x85" * 100_000 + b"K\x01s", "key of type tuple"),
    "nothing on the stack": (b"00", "where there is none"),
    "a group that did not begin": (b"t", "did not begin"),
    "an unknown memo": (b"h\x07", "value 7"),
    "a memo of nothing": (b"0q\x07", "holds no object"),
    "an odd number of items": (b"}(" + text("a") + b"u", "without a value"),
    "an unknown opcode": (b"\xff", "opcode"),
    "a text that ends early": (b"X\xff\xff\xff\x7fabc", "damaged"),
    "a number of 5,000 digits": (b"\x8b\x20\x10\x00\x00" + b"\x7f" * 4128 + b"Q", "too large"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_pickles_are_refused_and_named(written, name, tmp_path, monkeypatch):
    """Oracle: the class or fault in the error; and the command of the pickle has not run."""
    monkeypatch.chdir(tmp_path)
    opcodes, words = FOREIGN[name]
    with pytest.raises(UserError, match=words) as error:
        torch_file.read(written({"model": Raw(opcodes)}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "OWNED").exists()


def test_a_pickle_of_python_with_reduce_is_refused(tmp_path):
    """An object with `__reduce__`, as `pickle` writes it. Oracle: the name, and no call."""
    called_with = []

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    data = pickle.dumps({"model": Evil()}, protocol=2)
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(UserError, match=r"asks for '(posix|nt)\.system'"):
        torch_file.read(str(tmp_path / "file"))
    assert not called_with


def test_deep_containers(written):
    """A list in a list, 100,000 deep. Oracle: read like any other, and let go of."""
    found = torch_file.read(written({"a": Raw(b"]" * 100_001 + b"a" * 100_000)}))
    assert isinstance(found["a"][0][0], list)
    with pytest.raises(UserError, match="expected a storage"):
        torch_file.read(written({"a": Raw(b"]" * 100_001 + b"a" * 100_000 + b"Q")}))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Tensor("0", (5, 6), (6, 1)), "goes beyond the 24 numbers"),
        (Tensor("0", (4, 6), (6, 1), offset=1), "goes beyond"),
        (Tensor("0", (2, 2), (100, 1)), "goes beyond"),
        (Tensor("0", (2**30, 2**30), (0, 0)), "goes beyond"),
        (Tensor("0", (4, 6), (6, 1), offset=-1), "begins at number -1"),
        (Tensor("0", (4, 6), (-6, 1), offset=18), "strides"),
        (Tensor("0", (-4, 6), (6, 1)), "shape"),
        (Tensor("0", (4,), (6, 1)), "shape"),
        (Tensor("0", (2**40,), (0,)), "shape"),
        (Tensor("0", (1,) * 9, (1,) * 9), "shape"),
    ],
)
def test_tensors_outside_of_their_storage(written, tensor, words):
    """Oracle: the words; a stride of 0 would make a tensor of any size of one number."""
    with pytest.raises(UserError, match=words):
        torch_file.read(written({"model": tensor}))


def rezipped(path: str, change) -> None:
    """Write the archive again with its entries as `change({name: data})` leaves them."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_damaged_archives(written, tmp_path):
    """Oracle: the words of each error."""
    value = {"a": Tensor("0", (4, 6), (6, 1))}

    def fails(words, path, read=False):
        def whole():
            found = torch_file.read(path)
            return read and found["a"].whole()

        with pytest.raises(UserError, match=words) as error:
            whole()
        assert "\n" not in str(error.value)

    path = written(value)
    whole = pathlib.Path(path).read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 40, 4):
        pathlib.Path(path).write_bytes(whole[:size])
        fails("is damaged|no file of torch's", path)
    pathlib.Path(path).write_bytes(b"")
    fails("no file of torch's", path)
    # A bit of a weight.
    place = whole.index(NUMBERS.tobytes()) + 17
    pathlib.Path(path).write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    fails("another checksum", path, read=True)
    # The header before the bytes of an entry.
    begin = whole.index(b"PK\x03\x04", 10)
    while begin > 0:
        pathlib.Path(path).write_bytes(whole[:begin] + b"XX" + whole[begin + 2 :])
        fails("is damaged", path, read=True)
        begin = whole.find(b"PK\x03\x04", begin + 1)
    fails("is compressed", written(value, compression=zipfile.ZIP_DEFLATED))
    rezipped(written(value), lambda e: e.pop("archive/data/0"))
    fails("no entry 'data/0'", path)
    rezipped(written(value), lambda e: e.update({"archive/data/0": b"1234"}))
    fails("has 4 bytes", path)
    rezipped(written(value), lambda e: e.update({"archive/byteorder": b"big"}))
    fails("byte order", path)
    rezipped(written(value), lambda e: e.pop("archive/data.pkl"))
    fails("0 entries data.pkl", path)
    rezipped(written(value), lambda e: e.update({"other/data.pkl": b"N."}))
    fails("2 entries data.pkl", path)
    rezipped(written(value), lambda e: e.update({"archive/data.pkl": b"N" * (2**23) + b"."}))
    fails("at most 8388608", path)
    rezipped(written(value), lambda e: e.update({"archive/data.pkl": b"\x80\x02N"}))
    fails("pickle", path)
    pathlib.Path(path).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    fails("LFS|pointer", path)


def test_a_zip_bomb_takes_no_memory(tmp_path):
    """An entry that unpacks to 256 MiB. Oracle: refused by its kind, before it is unpacked."""
    archive = zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("archive/data.pkl", "w", force_zip64=True) as out:
        for _ in range(256):
            out.write(b"N" * 2**20)
    with pytest.raises(UserError, match="is compressed"):
        torch_file.read(str(tmp_path / "file"))


def test_the_old_form_has_the_command_that_converts_it(tmp_path):
    """A file from before torch 1.6 is several pickles. Oracle: the command in the error."""
    file = tmp_path / "model"
    file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(UserError, match="old form") as error:
        torch_file.read(str(file))
    assert f"torch.save(torch.load('{file}', map_location='cpu', weights_only=True)" in str(
        error.value
    )


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The archive with damage: bytes, cuts, moved pieces; or its pickle so, zipped anew."""
    if chance.random() < 0.5:
        return damaged(content, chance)
    entries = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            entries[name] = archive.read(name)
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    if chance.random() < 0.2:  # the bytes of two entries
        one, other = chance.sample(sorted(entries), 2)
        entries[one], entries[other] = entries[other], entries[one]
    else:
        entries[pickled] = damaged(entries[pickled], chance)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


OPCODES = b"(tu}]e)RbQc\x93\x85\x86\x87qrhjXKJMG.\x88\x89N\x94\x80\x8a\x8bsa0o\x81i"
PIECES = (called("os.system"), called("builtins.exec"), b"\x8b\xff\xff\xff\x7f", number(2**70))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with up to five changes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice(OPCODES)
        elif kind == 2:
            del data[place : place + chance.choice((1, 4, 40))]
        elif kind == 3:
            data[place:place] = chance.choice(PIECES)
        elif kind == 4:
            data[place : place + 8] = chance.randbytes(8)
        elif kind == 5:
            data[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0" * 4))
        elif chance.random() < 0.2:
            del data[place + 1 :]
        data = data or bytearray(b" ")
    return bytes(data)


def leaves(value):
    """Yield the tensors in nested containers. Equal parts once, as a pickle may repeat them."""
    left, seen = [value], set()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, LazyArray):
            yield node
        elif isinstance(node, dict):
            left += node.values()
        elif isinstance(node, list | tuple):
            left += node


def outcomes(tmp_path, content: bytes, number_: int, monkeypatch) -> Counter:
    """How many of `number_` mutations were read, and how many were one error."""
    file, found = tmp_path / "file", Counter()
    ran = []
    for module, name in ((builtins, "eval"), (builtins, "exec"), (os, "system")):
        monkeypatch.setattr(module, name, ran.append)
    file.write_bytes(content)
    torch_file.read(str(file))  # reading any file may import, as etils does to ask for its size
    modules = set(sys.modules)
    for seed in range(number_):
        file.write_bytes(mutated(content, random.Random(seed)))
        try:
            for tensor in leaves(torch_file.read(str(file))):
                if tensor.nbytes < 2**24:
                    tensor.whole()
            found["read"] += 1
        except UserError as error:
            found["one line" if "\n" not in str(error) else f"several lines, seed {seed}"] += 1
    monkeypatch.undo()
    assert set(sys.modules) == modules
    assert found.keys() <= {"read", "one line"}
    assert not ran
    return found


def test_some_damaged_files(tmp_path, monkeypatch):
    """Property: no error but UserError, of one line; nothing is imported or executed."""
    assert outcomes(tmp_path, VIEWS.read_bytes(), 300, monkeypatch)["one line"] > 150


@pytest.mark.slow
def test_many_damaged_files(tmp_path, monkeypatch):
    """20,000 mutations. Property: as above."""
    assert outcomes(tmp_path, VIEWS.read_bytes(), 20_000, monkeypatch)["one line"] > 10_000
