"""Foreign checkpoints with damaged bytes: what cannot be read is one line, never a traceback."""

import pathlib
import random
import shutil
from collections import Counter

import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format

PIECES = (b"[", b"null", b"-1", b"1e999", b'"', b"\\ud800", b"NaN", b"9" * 20, b"true", b"../")
CASES = {
    "config.json": "hf/t5_v1_1/config.json",
    "weights": "hf/t5_v1_1/model.safetensors",
    "index": "t5_1_1_tiny_t5x_ckpt/checkpoint_5/checkpoint",
    "array": "t5_1_1_tiny_t5x_ckpt/checkpoint_5/target.encoder.encoder_norm.scale/.zarray",
    "list of arrays": "t5x_orbax/checkpoint_12/state/_METADATA",
    "database": "t5x_orbax/checkpoint_12/state/manifest.ocdbt",
}
HEAD_BYTES = 6000  # of a file of weights: its header is damaged, not its numbers


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with up to five changes: bits, bytes, removed and inserted pieces, a cut."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(min(len(data), HEAD_BYTES))
        kind = chance.randrange(6)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice(b'\x00\xff"{}[],:0-9.eN')
        elif kind == 2:
            del data[place : place + chance.choice((1, 4, 40))]
        elif kind == 3:
            data[place:place] = chance.choice(PIECES)
        elif kind == 4:
            data[place : place + 8] = chance.randbytes(8)
        elif chance.random() < 0.1:
            del data[place + 1 :]
        data = data or bytearray(b" ")
    return bytes(data)


def outcomes(golden, tmp_path, name: str, number: int) -> Counter:
    """How many of `number` mutations were read, and how many were one error."""
    file = pathlib.Path(CASES[name])
    copy = pathlib.Path(shutil.copytree(golden / file.parts[0], tmp_path / file.parts[0]))
    file = tmp_path / file
    folder = copy / "t5_v1_1" if copy.name == "hf" else copy
    original, found = file.read_bytes(), Counter()
    for seed in range(number):
        file.write_bytes(mutated(original, random.Random(f"{name} {seed}")))
        try:
            for array in any_format.open_source(str(folder)).params.values():
                array.whole()
            found["read"] += 1
        except UserError as error:
            found["one line" if "\n" not in str(error) else f"several lines, seed {seed}"] += 1
    assert found.keys() <= {"read", "one line"}
    return found


@pytest.mark.parametrize("name", CASES)
def test_some_damaged_files(golden, tmp_path, name):
    """Property: no error but UserError, and it has one line."""
    assert outcomes(golden, tmp_path, name, 40)["one line"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_damaged_files(golden, tmp_path, name):
    """2,500 mutations of each file. Property: as above."""
    assert outcomes(golden, tmp_path, name, 2500)["one line"] > 500
