"""Packing: several dialogues in one row must be as good as a row each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def spans(row):
    """The target positions of each example of a packed row."""
    start = 0
    for _, targets in row:
        yield slice(start, start + len(targets))
        start += len(targets)


def test_engine_packing_loss_and_gradients(model, params, packed, unpacked, loss_and_grads):
    """Three dialogues a row cost and teach what they do a row each. Oracle: the unpacked batch."""
    (together, sums), grads = loss_and_grads(model, params, packed)
    (apart, expected), expected_grads = loss_and_grads(model, params, unpacked)
    assert float(together) == pytest.approx(float(apart), rel=1e-5)
    assert sums.keys() == expected.keys()
    for name in sums:
        assert float(sums[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    assert sums["num_tokens"] == 27
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b)))),
        grads,
        expected_grads,
    )


def test_engine_packing_average_per_sequence(model, params, packed, unpacked, loss_of):
    """A mean over dialogues counts six of them, packed or not. Oracle: the unpacked batch."""
    model = dataclasses.replace(model, loss_normalizing_factor="AVERAGE_PER_SEQUENCE")
    (together, sums), (apart, expected) = (loss_of(model, params, b) for b in (packed, unpacked))
    assert float(together) == pytest.approx(float(apart), rel=1e-5)
    assert float(sums["loss_weight"]) == pytest.approx(6.0)
    assert float(expected["loss_weight"]) == pytest.approx(6.0)


def test_engine_packing_logits(model, params, packed, unpacked, examples, logits_of):
    """Every token's logits, whatever its place in the row. Oracle: the example in its own row.

    Relative positions count within a segment, since a pair's distance is the same in both.
    """
    together, apart = logits_of(model, params, packed), logits_of(model, params, unpacked)
    for r, row in enumerate([examples[:3], examples[3:]]):
        for i, span in enumerate(spans(row)):
            alone = apart[3 * r + i, : len(row[i][1])]
            np.testing.assert_allclose(together[r, span], alone, atol=2e-5)


def test_engine_packing_without_segment_ids(model, params, unpacked, logits_of):
    """A row of one example may leave its segment ids out. Oracle: the same row with ids 1 and 0."""
    bare = {k: v for k, v in unpacked.items() if "segment" not in k}
    with_ids, without = (logits_of(model, params, b) for b in (unpacked, bare))
    real = np.asarray(unpacked["decoder_target_tokens"]) > 0
    # Two programs: equal to rounding.
    np.testing.assert_allclose(np.asarray(with_ids)[real], np.asarray(without)[real], atol=2e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_engine_packing_neighbours_have_no_influence(
    model, params, packed, examples, pack, logits_of, changed
):
    """Other tokens in one segment change its logits and no other's. Property: exact equality."""
    rng = np.random.default_rng(changed)
    row = list(examples[:3])
    inputs, targets = row[changed]
    row[changed] = (rng.integers(2, 40, len(inputs)), rng.integers(2, 40, len(targets)))
    before = np.asarray(logits_of(model, params, packed))
    after = np.asarray(logits_of(model, params, pack([row, examples[3:]])))
    for i, span in enumerate(spans(row)):
        if i == changed:
            assert np.max(np.abs(before[0, span] - after[0, span])) > 0.1
        else:
            np.testing.assert_array_equal(before[0, span], after[0, span])
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_engine_packing_each_side_alone_stays_inside_its_segment(
    model, params, packed, examples, pack, logits_of, side
):
    """Cross attention and self-attention are masked each on their own. Property: exact equality."""
    inputs, targets = examples[1]
    other = (inputs[::-1], targets) if side == "inputs" else (inputs, targets[::-1])
    row = [examples[0], other, examples[2]]
    before = np.asarray(logits_of(model, params, packed))
    after = np.asarray(logits_of(model, params, pack([row, examples[3:]])))
    first, second, third = spans(row)
    np.testing.assert_array_equal(before[0, first], after[0, first])
    np.testing.assert_array_equal(before[0, third], after[0, third])
    assert np.max(np.abs(before[0, second] - after[0, second])) > 1e-2


def test_engine_packing_padding_at_the_end_changes_nothing(
    model, params, packed, examples, pack, logits_of
):
    """Longer rows of the same examples have the same logits. Property: only rounding may differ."""
    longer = pack([examples[:3], examples[3:]], source=31, target=21)
    short, long = (logits_of(model, params, batch) for batch in (packed, longer))
    real = np.asarray(packed["decoder_target_tokens"]) > 0
    np.testing.assert_allclose(np.asarray(long)[:, :16][real], np.asarray(short)[real], atol=2e-5)
