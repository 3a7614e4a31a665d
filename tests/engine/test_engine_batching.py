"""Batches of like length."""

import itertools

import numpy as np
import pytest

from cosmo.engine.data import datasets
from cosmo.engine.infer import batching


def rows(lengths, targets=None):
    """Rows of so many tokens."""
    targets = [None] * len(lengths) if targets is None else [(7,) * n for n in targets]
    return [
        datasets.Row(str(i), "", (5,) * n, "", ids)
        for i, (n, ids) in enumerate(zip(lengths, targets, strict=True))
    ]


@pytest.mark.parametrize("length", [1, 16, 31, 62, 64, 256, 512, 1000])
def test_buckets(length):
    """Property: ascending to the length itself, multiples of 16 but for it, at most 1.8 apart."""
    found = batching.buckets(length)
    assert found[-1] == length
    assert all(size % 16 == 0 for size in found[:-1])
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert all(1.0 < ratio <= 1.8 for ratio in ratios)


def test_buckets_of_t5():
    """Oracle: by hand, each 1.5 times the one before, rounded up to 16."""
    assert batching.buckets(512) == (32, 48, 80, 128, 192, 288, 432, 512)


def test_every_row_is_in_one_batch_that_it_fits():
    """Property: places are a permutation; a row is padded to the least bucket that holds it."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 300, 200).tolist()
    many = rows(lengths, random.integers(1, 100, 200).tolist())
    groups = batching.groups(many, 8, {"inputs": 256, "targets": 64}, targets=True)
    assert sorted(place for group in groups for place in group.places) == list(range(200))
    for group in groups:
        assert 1 <= len(group.rows) <= 8
        for place, row in zip(group.places, group.rows, strict=True):
            assert row is many[place]
            for ids, size, longest in (
                (row.input_ids, group.inputs_length, 256),
                (row.target_ids, group.targets_length, 64),
            ):
                fitting = [b for b in batching.buckets(longest) if b >= min(len(ids), longest)]
                assert size == fitting[0]


def test_the_padded_length_does_not_depend_on_the_neighbours():
    """Property: alone or among others, a row has the same padded length."""
    many = rows([3, 40, 200, 90, 90, 17, 31, 33])
    lengths = {"inputs": 256, "targets": 64}
    together = {
        place: group.inputs_length
        for group in batching.groups(many, 4, lengths, targets=False)
        for place in group.places
    }
    for place, row in enumerate(many):
        (alone,) = batching.groups([row], 4, lengths, targets=False)
        assert alone.inputs_length == together[place]


def test_without_buckets_rows_stay_in_order():
    """Property: batches of neighbours, all of the full length."""
    many = rows([3, 200, 5, 90, 1])
    groups = batching.groups(many, 2, {"inputs": 256, "targets": 8}, targets=False, bucketed=False)
    assert [group.places for group in groups] == [[0, 1], [2, 3], [4]]
    assert {group.inputs_length for group in groups} == {256}


def test_padding_is_counted():
    """Oracle: by hand. Two rows of 20 and 30 tokens in a batch of 4 x 32 fill 50 of 128 places."""
    (group,) = batching.groups(rows([20, 30]), 4, {"inputs": 64, "targets": 8}, targets=False)
    counts = batching.counts(group, 4)
    assert counts == {"records": 2, "cells": 128, "tokens": 50}
    assert batching.padding(counts) == pytest.approx(1 - 50 / 128)
