"""Properties of packed rows, for any examples: hypothesis draws them."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.engine.data.cache_reading import RowFormat
from cosmo.engine.data.packing import Packer

INPUTS, TARGETS = 12, 7


def tokens(most: int):
    """Draw a sequence of 1 to `most` token ids, none of them padding."""
    return st.lists(st.integers(1, 60_000), min_size=1, max_size=most)


EXAMPLES = st.lists(st.tuples(tokens(INPUTS), tokens(TARGETS), st.text(max_size=5)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(EXAMPLES, st.sampled_from(["uint16", "int32"]), st.booleans())
def test_every_example_comes_back_from_its_row_in_order(examples, dtype, packed):
    """Oracle: the examples, cut out of the rows by their segment numbers; their names."""
    form = RowFormat(INPUTS, TARGETS, packed, dtype)
    packer, records = Packer(form), []
    for inputs, targets, name in examples:
        records += packer.add(np.array(inputs), np.array(targets), name)
    records += packer.finish()
    found = []
    for record in records:
        features = {k: v[0] for k, v in form.features(form.decode([record])).items()}
        names = form.names(record)
        source, target = features["encoder_input_tokens"], features["decoder_target_tokens"]
        if packed:
            segments = features["encoder_segment_ids"], features["decoder_segment_ids"]
        else:
            segments = (source > 0).astype(int), (target > 0).astype(int)
        count = int(segments[0].max(initial=0))
        for number in range(1, count + 1):
            sides = (source[segments[0] == number], target[segments[1] == number])
            found.append(tuple(side.tolist() for side in sides))
        assert len(names) == count or not any(names)
        # The decoder reads its targets one position later, from 0 at each segment's start.
        before = features["decoder_input_tokens"]
        starts = np.flatnonzero(np.diff(segments[1], prepend=0) > 0)
        assert not before[starts].any()
    assert found == [(inputs, targets) for inputs, targets, _ in examples]


@settings(max_examples=100, deadline=None)
@given(EXAMPLES)
def test_a_row_ends_only_where_the_next_example_does_not_fit(examples):
    """Oracle: the lengths of each row's examples and of the first of the next row."""
    form = RowFormat(INPUTS, TARGETS, True, "uint16")
    packer, rows = Packer(form), [[]]
    for inputs, targets, _ in examples:
        ended = len(list(packer.add(np.array(inputs), np.array(targets), "")))
        rows += [[]] * ended
        rows[-1] = [*rows[-1], (len(inputs), len(targets))]
    for row, following in itertools.pairwise(rows):
        sums = np.sum([*row, following[0]], axis=0)
        assert sums[0] > INPUTS or sums[1] > TARGETS
    for row in filter(None, rows):
        assert (np.sum(row, axis=0) <= [INPUTS, TARGETS]).all()
