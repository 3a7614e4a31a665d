"""Group rows into batches of about equal length, so that little computation goes to padding."""

# A row is padded to the next of a few lengths, by its own length alone: an answer must not depend
# on the rows beside it. Few lengths, because each is a shape to compile.

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cosmo.engine.data import datasets

PREFIX_STEP = 16  # prefixes are padded to multiples of so many tokens


class Group(NamedTuple):
    """Rows of one batch, their `places` in the sequence they came from, and the padded lengths.

    Lengths are in tokens. `targets_length` is None where targets are not read (generation).
    `prefix_length` is 0 where no row has a prefix, or prefixes are not read.
    """

    places: list[int]
    rows: list[datasets.Row]
    inputs_length: int
    targets_length: int | None
    prefix_length: int = 0


def buckets(length: int) -> tuple[int, ...]:
    """Return padded lengths up to `length` tokens: 32, then multiples of 16, growing by 1.5."""
    sizes, size = [], 32
    while size * 1.1 < length:  # a length hardly below the last would save nothing
        sizes.append(size)
        size = 16 * -(-size * 3 // 32)
    return (*sizes, length)


def groups(
    rows: Sequence[datasets.Row],
    batch_size: int,
    lengths: Mapping[str, int],
    *,
    targets: bool,
    bucketed: bool = True,
    prefixes: bool = False,
) -> list[Group]:
    """Return batches of at most `batch_size` rows of equal padded lengths, the longest first.

    `lengths` are the most tokens of "inputs" and "targets"; longer rows are cut. With
    `bucketed=False` all rows are padded to them. `targets` and `prefixes`: whether those are
    read.
    """
    sizes = {name: buckets(n) if bucketed else (n,) for name, n in lengths.items()}

    def padded(ids, name) -> int:
        fitting = bisect.bisect_left(sizes[name], len(ids))
        return sizes[name][min(fitting, len(sizes[name]) - 1)]

    members: dict[tuple[int, int, int], list[int]] = {}
    for place, row in enumerate(rows):
        shape = (
            padded(row.input_ids, "inputs"),
            padded(row.target_ids or (), "targets") if targets else 0,
            -(-len(row.prefix_ids) // PREFIX_STEP) * PREFIX_STEP if prefixes else 0,
        )
        members.setdefault(shape, []).append(place)  # in the order of the rows: batches repeat
    return [
        Group(places, [rows[place] for place in places], shape[0], shape[1] or None, shape[2])
        # The longest first, so that a batch too large for the memory fails at once.
        for shape in sorted(members, reverse=True)
        for places in datasets.groups(members[shape], batch_size)
    ]


def counts(group: Group, batch_size: int) -> Counter[str]:
    """Return the counts of `records`, of `cells` (positions computed) and of `tokens` in them."""
    sides = [(group.inputs_length, [row.input_ids for row in group.rows])]
    if group.targets_length is not None:
        sides.append((group.targets_length, [row.target_ids or () for row in group.rows]))
    return Counter(
        records=len(group.rows),
        cells=sum(batch_size * length for length, _ in sides),
        tokens=sum(min(len(ids), length) for length, many in sides for ids in many),
    )


def padding(totals: Mapping[str, int]) -> float:
    """Return the share of computed positions without a token, 0 to 1, from sums of `counts`."""
    return 1.0 - totals["tokens"] / totals["cells"] if totals["cells"] else 0.0
