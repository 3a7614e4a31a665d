"""Arrays that are read piece by piece, so that a conversion never holds a whole model."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Index = tuple[slice, ...]
PIECE_BYTES = 64 * 2**20  # what one read takes at most, where an array can be cut at all


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of `shape` and `dtype` whose part at `index` (a slice an axis) `read` fetches."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """All of it, in memory."""
        return self.read(tuple(slice(0, n) for n in self.shape))

    def pieces(self) -> Iterator[tuple[Index, np.ndarray]]:
        """Consecutive parts of at most about PIECE_BYTES, in C order, with the place of each."""
        for index in self.places():
            yield index, self.read(index)

    def places(self) -> Iterator[Index]:
        """The place of each piece."""
        lengths = self.piece_shape()
        for corner in np.ndindex(*(-(-n // k) for n, k in zip(self.shape, lengths, strict=True))):
            yield tuple(
                slice(i * k, min((i + 1) * k, n))
                for i, k, n in zip(corner, lengths, self.shape, strict=True)
            )

    def piece_shape(self) -> tuple[int, ...]:
        """The shape of a piece: one layer of a stack, or as many rows of it as may be taken."""
        shape = list(self.shape)
        stack = len(shape) > 2
        if stack:
            shape[0] = 1
        for axis in range(stack, len(shape)):
            row = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            shape[axis] = min(self.shape[axis], max(1, PIECE_BYTES // max(row, 1)))
            if row <= PIECE_BYTES:
                break
        return tuple(shape)


def from_array(array: np.ndarray) -> LazyArray:
    """An array that is in memory already."""
    return LazyArray(array.shape, array.dtype, lambda index: array[index])


def astype(source: LazyArray, dtype) -> LazyArray:
    """`source` in another type; each part is converted as it is read."""
    dtype = np.dtype(dtype)
    if source.dtype == dtype:
        return source
    return LazyArray(source.shape, dtype, lambda index: source.read(index).astype(dtype))


def transposed(source: LazyArray) -> LazyArray:
    """The transpose, contiguous."""
    return LazyArray(
        source.shape[::-1],
        source.dtype,
        lambda index: np.ascontiguousarray(source.read(index[::-1]).T),
    )


def stacked(sources: Sequence[LazyArray]) -> LazyArray:
    """Arrays of one shape along a new first axis."""

    def read(index):
        parts = [source.read(index[1:]) for source in sources[index[0]]]
        return np.stack(parts) if len(parts) > 1 else parts[0][None]

    return LazyArray((len(sources), *sources[0].shape), sources[0].dtype, read)


def layer(source: LazyArray, number: int, axis: int = 0) -> LazyArray:
    """One layer of an array whose `axis` counts layers."""

    def read(index):
        full = (*index[:axis], slice(number, number + 1), *index[axis:])
        return source.read(full).squeeze(axis)

    return LazyArray((*source.shape[:axis], *source.shape[axis + 1 :]), source.dtype, read)


def reshaped(source: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    """`source` in another shape; a part of it takes reading all of it."""
    if source.shape == shape:
        return source
    return LazyArray(shape, source.dtype, lambda index: source.whole().reshape(shape)[index])
