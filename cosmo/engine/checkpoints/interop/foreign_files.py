"""Check the small files of a checkpoint that another system wrote, before anything relies on them.

Such a folder may come from anywhere. Its files may be damaged, or of another kind than their names,
or they may name files outside of the folder.
"""

from collections.abc import Iterable
from typing import Any

from etils import epath

from cosmo.engine.base import files, json_lines
from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.checkpoints.lazy import LazyArray

MAX_SIZE = 2**31 - 1  # of one axis or a number of layers: XLA's indices
MAX_JSON_BYTES = 2**28  # the index of a model of a million tensors has half of it


def check_no_pointer(file: epath.Path) -> None:
    """Raise UserError if a file only points to its content, as `git clone` without LFS leaves."""
    with file.open("rb") as content:
        files.refuse_pointer(file, content.read(files.HEAD_BYTES))


def read_json_object(file: epath.Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError if there is none that can be read."""
    try:
        check_no_pointer(file)
        with file.open("rb") as content:
            # One byte more shows that there is more, without reading a file of any size.
            data = content.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(
                f"{file} has more than {MAX_JSON_BYTES} bytes: it is no index or config"
            )
        value = json_lines.value(data)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; copy the whole folder again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {shown(value)}, expected a JSON object")
    return value


def check_inside(where: str, name: Any) -> str:
    """Return the name of a file in a folder. Raise UserError unless it stays in that folder.

    `where` begins the error: the file that has the name.
    """
    # Any other name would read files of the user's that do not belong to the checkpoint.
    inside = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not inside or "/" in name or "\\" in name:
        raise UserError(f"{where} names the file {shown(name)}, expected a file in its own folder")
    return name


def check_size(where: str, name: str, value: Any) -> int:
    """Return a setting that is a size; UserError for anything else. `where` begins the error."""
    # A bool is an int in Python.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise UserError(
            f"{where}: {name}={shown(value)}, expected a whole number from 1 to {MAX_SIZE}"
        )
    return value


def layers_in(tensors: Iterable[str], begin: str) -> int:
    """Return the number of layers with tensors. Their names are `begin`, a number, a dot, more."""
    found = (name.removeprefix(begin) for name in tensors if name.startswith(begin))
    return len({name.split(".")[0] for name in found})


def check_layers(where: str, side: str, layers: int, tensors: Iterable[str], begin: str) -> None:
    """Raise UserError unless the encoder or decoder (`side`) has tensors of `layers` layers."""
    stored = layers_in(tensors, begin)
    if layers != stored:
        raise UserError(
            f"{where} has {layers} {side} layers, the tensors are of {stored}: copy all files of "
            "one model"
        )


def check_shape(where: str, name: str, tensor: LazyArray | None, shape: tuple[int, ...]) -> None:
    """Raise UserError unless there is a tensor of the shape that a model's settings describe."""
    if tensor is None:
        raise UserError(f"{where}: the model lacks {name}; copy all files of one model")
    if tensor.shape != shape:
        raise UserError(
            f"{where}: {name} is {tensor.shape}, expected {shape}: copy all files of one model"
        )


def check_heads(where: str, name: str, size: int, heads_name: str, heads: int) -> None:
    """Raise UserError unless BlenderBot can divide vectors of `size` among heads."""
    # Even, because half of a position's code is sines.
    if size % heads or size % 2:
        raise UserError(
            f"{where}: {name}={size}, expected an even multiple of {heads_name}={heads}"
        )


def check_rate(where: str, name: str, value: Any) -> float:
    """Return a setting that is a rate of dropout; UserError for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise UserError(f"{where}: {name}={shown(value)}, expected a number from 0 to less than 1")
    return float(value)
