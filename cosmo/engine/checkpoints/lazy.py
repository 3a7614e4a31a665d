"""Read arrays in pieces, so that a conversion never holds a whole model in memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cosmo.engine.base.errors import UserError

Index = tuple[slice, ...]  # one slice an axis

# Pieces of this size keep memory small, and are long enough that seeking costs nothing.
PIECE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of `shape` and `dtype`. `read(index)` returns the part at `index` as numpy."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        return self.size * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """Return the whole array, in memory."""
        return self.read(tuple(slice(0, n) for n in self.shape))

    def pieces(self) -> Iterator[tuple[Index, np.ndarray]]:
        """Yield (index, part) for consecutive parts of about PIECE_BYTES, in C order."""
        for index in self.piece_indices():
            yield index, self.read(index)

    def piece_indices(self) -> Iterator[Index]:
        """Yield the index of each piece, in C order."""
        lengths = self.piece_shape()
        # -(-n // k) rounds up: the last piece of an axis may be shorter.
        for corner in np.ndindex(*(-(-n // k) for n, k in zip(self.shape, lengths, strict=True))):
            yield tuple(
                slice(i * k, min((i + 1) * k, n))
                for i, k, n in zip(corner, lengths, self.shape, strict=True)
            )

    def piece_shape(self) -> tuple[int, ...]:
        """Return the shape of a piece: one layer of a stack, or as many of its rows as fit."""
        shape = list(self.shape)
        # Three axes and more are a stack of layers. Other formats store its layers apart.
        stack = len(shape) > 2
        if stack:
            shape[0] = 1
        # Cut the outermost axis whose rows fit into a piece; the axes before it become 1.
        for axis in range(stack, len(shape)):
            row = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            shape[axis] = min(self.shape[axis], max(1, PIECE_BYTES // max(row, 1)))
            if row <= PIECE_BYTES:
                break
        return tuple(shape)


def equal(one: LazyArray, other: LazyArray | None) -> bool:
    """Return whether two arrays are equal, comparing them piece by piece."""
    if one == other:  # two names of the same stored numbers
        return True
    if other is None or one.shape != other.shape:
        return False
    return all(np.array_equal(part, other.read(index)) for index, part in one.pieces())


def from_array(array: np.ndarray) -> LazyArray:
    """Return a LazyArray over an array that is in memory already."""
    return LazyArray(array.shape, array.dtype, lambda index: array[index])


def astype(source: LazyArray, dtype) -> LazyArray:
    """Return `source` in another type. Each part is converted as it is read."""
    dtype = np.dtype(dtype)
    if source.dtype == dtype:
        return source
    return LazyArray(source.shape, dtype, lambda index: source.read(index).astype(dtype))


def finite(source: LazyArray, name: str) -> LazyArray:
    """Return `source`, with each part checked as it is read: UserError for NaN or infinity.

    `name` begins the error.
    """

    def read(index):
        part = source.read(index)
        bad = part.size - int(np.count_nonzero(np.isfinite(part)))
        if bad:
            # Training would skip every step, and inference answer nonsense, without a word.
            raise UserError(
                f"{name} holds NaN or infinity ({bad} of {part.size} numbers): copy the checkpoint "
                "again, or import it with these numbers allowed",
                setting="allow_nonfinite",
            )
        return part

    return LazyArray(source.shape, source.dtype, read)


def transposed(source: LazyArray) -> LazyArray:
    """Return the transpose. Its parts are contiguous, as writers of raw bytes need them."""
    return LazyArray(
        source.shape[::-1],
        source.dtype,
        lambda index: np.ascontiguousarray(source.read(index[::-1]).T),
    )


def stacked(sources: Sequence[LazyArray]) -> LazyArray:
    """Return arrays of one shape as one array with a new first axis."""

    def read(index):
        parts = [source.read(index[1:]) for source in sources[index[0]]]
        # np.stack copies, and most parts are of one layer: [None] is a view.
        return np.stack(parts) if len(parts) > 1 else parts[0][None]

    return LazyArray((len(sources), *sources[0].shape), sources[0].dtype, read)


def layer(source: LazyArray, number: int, axis: int = 0) -> LazyArray:
    """Return one layer of an array whose `axis` counts layers."""

    def read(index):
        # A slice of length 1 keeps the number of axes, as an Index needs; then the axis goes.
        full = (*index[:axis], slice(number, number + 1), *index[axis:])
        return source.read(full).squeeze(axis)

    return LazyArray((*source.shape[:axis], *source.shape[axis + 1 :]), source.dtype, read)


def layers(source: LazyArray) -> list[LazyArray]:
    """Return every layer of a stack, whose first axis counts them."""
    return [layer(source, number) for number in range(source.shape[0])]


def reshaped(source: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    """Return `source` in another shape. Reading any part reads all of `source`."""
    if source.shape == shape:
        return source
    # A part of the new shape may be scattered over the old one. Used for small arrays alone.
    return LazyArray(shape, source.dtype, lambda index: source.whole().reshape(shape)[index])
