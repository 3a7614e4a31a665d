"""Losses, their normalisation, and learning rate schedules, against formulas in numpy."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.model.losses import cross_entropy, loss_weights
from cosmo.engine.model.optimizer import FACTORS, LearningRateSchedule


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).standard_normal((2, 5, 11)) * 3


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(1).integers(0, 11, (2, 5))


def log_softmax(logits):
    """In float64, straight from the definition."""
    return np.log(np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_engine_losses_cross_entropy(logits, targets):
    """-log softmax(logits)[target]. Oracle: the definition in numpy, float64."""
    loss, z = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert np.all(z == 0.0)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_engine_losses_label_smoothing(logits, targets, smoothing):
    """Cross entropy against the smoothed distribution, less that distribution's entropy.

    Oracle: the full [V] soft target in numpy; `smoothing` is spread over the 10 other tokens.
    """
    soft = np.full(logits.shape, smoothing / 10)
    np.put_along_axis(soft, targets[..., None], 1 - smoothing, -1)
    assert np.allclose(soft.sum(-1), 1.0)
    expected = -np.sum(soft * log_softmax(logits), -1) + np.sum(soft * np.log(soft), -1)
    loss, _ = cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(targets), label_smoothing=smoothing
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


def test_engine_losses_label_smoothing_is_zero_at_its_target():
    """Predicting the smoothed distribution itself costs nothing. Property."""
    soft = np.full((1, 1, 11), 0.02)
    soft[0, 0, 4] = 0.8
    loss, _ = cross_entropy(
        jnp.log(jnp.asarray(soft, jnp.float32)), jnp.array([[4]]), label_smoothing=0.2
    )
    assert float(loss[0, 0]) == pytest.approx(0.0, abs=1e-6)


def test_engine_losses_z_loss(logits, targets):
    """z_loss * log(sum(exp(logits))) ** 2 is added and returned. Oracle: numpy."""
    logits = logits + 2.0
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(targets)
    plain, _ = cross_entropy(*args)
    loss, z = cross_entropy(*args, z_loss=0.01)
    expected = 0.01 * np.log(np.sum(np.exp(logits), -1)) ** 2
    np.testing.assert_allclose(z, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, plain + expected, rtol=1e-5)


def test_engine_losses_large_logits_stay_finite():
    """Logits of 1e4 do not overflow. Oracle: hand calculation (the gap to the largest)."""
    logits = jnp.array([[[1e4, 1e4 - 5.0, -1e4]]])
    loss, _ = cross_entropy(logits, jnp.array([[1]]))
    assert float(loss[0, 0]) == pytest.approx(5.0 + math.log1p(math.exp(-5)), abs=1e-2)


# Row 0 packs examples of 3 and 1 target tokens and a pad; row 1 one of 2 with a token that does not
# count, and two pads; row 2 is empty.
WEIGHTS = [[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
SEGMENTS = [[1, 1, 1, 2, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
THIRD, HALF = 1 / 3, 1 / 2


@pytest.mark.parametrize(
    "normalization, weights, total",
    [
        (None, WEIGHTS, 1.0),
        (7.5, WEIGHTS, 7.5),
        (3, WEIGHTS, 3.0),
        ("NUM_REAL_TARGET_TOKENS", WEIGHTS, 6.0),
        ("NUM_TOTAL_TARGET_TOKENS", WEIGHTS, 15.0),
        (
            "AVERAGE_PER_SEQUENCE",
            [[THIRD, THIRD, THIRD, 1, 0], [HALF, 0, HALF, 0, 0], [0] * 5],
            3.0,
        ),
    ],
)
def test_engine_losses_weights_of_packed_rows(normalization, weights, total):
    """Token weights and divisor of every loss_normalizing_factor. Oracle: hand calculation."""
    ours, divisor = loss_weights(
        normalization, jnp.asarray(WEIGHTS, jnp.float32), jnp.asarray(SEGMENTS)
    )
    np.testing.assert_allclose(ours, weights, rtol=1e-6)
    assert float(divisor) == pytest.approx(total)


def test_engine_losses_average_per_sequence_without_segments():
    """Without segment ids a row is one sequence. Oracle: hand calculation."""
    ours, divisor = loss_weights("AVERAGE_PER_SEQUENCE", jnp.asarray(WEIGHTS, jnp.float32), None)
    quarter = [[0.25] * 4 + [0], [HALF, 0, HALF, 0, 0], [0] * 5]
    np.testing.assert_allclose(ours, quarter)
    assert float(divisor) == 2.0


def test_engine_losses_average_per_sequence_is_the_mean_of_means():
    """The divided loss is the mean over sequences of each one's mean. Oracle: numpy on a list."""
    per_token = np.random.default_rng(2).random((3, 5))
    ours, divisor = loss_weights(
        "AVERAGE_PER_SEQUENCE", jnp.asarray(WEIGHTS, jnp.float32), jnp.asarray(SEGMENTS)
    )
    sequences = [per_token[0, :3], per_token[0, 3:4], per_token[1, [0, 2]]]
    expected = np.mean([np.mean(sequence) for sequence in sequences])
    assert float(np.sum(per_token * ours) / divisor) == pytest.approx(expected, rel=1e-6)


def test_engine_losses_unknown_normalization_names_the_choices():
    """A misspelt factor is refused with all choices and its gin name. Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError) as error:
        loss_weights("NUM_REAL_TOKENS", jnp.ones((1, 1)), None)
    for word in ["'NUM_REAL_TOKENS'", "NUM_REAL_TARGET_TOKENS", "LOSS_NORMALIZING_FACTOR"]:
        assert word in str(error.value)


def rate(step, **fields):
    return float(LearningRateSchedule(**fields)(jnp.int32(step)))


SCHEDULE = dict(
    base_learning_rate=0.2, warmup_steps=10, decay_factor=0.01, steps_per_decay=4, steps_per_cycle=8
)
# T5X's create_learning_rate_scheduler, factor by factor.
FORMULAS = {
    "constant": lambda step: 0.2,
    "linear_warmup": lambda step: min(1.0, step / 10),
    "linear_decay": lambda step: 0.2 * min(step / 10, 1 + 0.01 * (10 - step)),
    "rsqrt_decay": lambda step: 1 / math.sqrt(max(step, 10)),
    "rsqrt_normalized_decay": lambda step: math.sqrt(10) / math.sqrt(max(step, 10)),
    "decay_every": lambda step: 0.01 ** (step // 4),
    "cosine_decay": lambda step: max(
        0.0, 0.5 * (1 + math.cos(math.pi * (max(0.0, (step - 10) / 8) % 1.0)))
    ),
}


@pytest.mark.parametrize("factor", sorted(FORMULAS))
def test_engine_losses_schedule_factors(factor):
    """Each factor alone before, at and after its turning points. Oracle: T5X's formulas by hand."""
    assert set(FORMULAS) == set(FACTORS)
    for step in (0, 1, 3, 4, 9, 10, 11, 14, 17, 18, 19, 100):
        expected = max(FORMULAS[factor](step), 1e-8)
        assert rate(step, factors=factor, **SCHEDULE) == pytest.approx(expected, rel=1e-5), step


def test_engine_losses_schedule_numbers():
    """Numbers anyone can check: warm-up to 0.01 at step 10,000, half of it at 40,000 (rsqrt)."""
    fields = dict(
        factors="constant * linear_warmup * rsqrt_normalized_decay",
        base_learning_rate=0.01,
        warmup_steps=10_000,
    )
    assert rate(0, **fields) == pytest.approx(1e-8)
    assert rate(5_000, **fields) == pytest.approx(0.005)
    assert rate(10_000, **fields) == pytest.approx(0.01)
    assert rate(40_000, **fields) == pytest.approx(0.005)


def test_engine_losses_schedule_offset_and_minimum():
    """step_offset is taken off the step, never below 0; min_learning_rate is the floor. By hand."""
    fields = dict(factors="linear_warmup", warmup_steps=10, step_offset=1000)
    assert rate(1005, **fields) == pytest.approx(0.5)
    assert rate(3, **fields) == pytest.approx(1e-8)
    assert rate(1001, **fields, min_learning_rate=0.3) == pytest.approx(0.3)


def test_engine_losses_schedule_warms_up_from_a_share():
    """Prost's warm-up. Oracle: ParlAI's scheduler, recorded: multipliers of its first five updates.

    ParlAI stays at the fifth; ours goes on to the whole rate.
    """
    fields = dict(factors="constant * linear_warmup", base_learning_rate=1e-3, warmup_steps=5)
    parlai = [0.0001, 0.20008, 0.40006, 0.60004, 0.80002]
    for step, multiplier in enumerate([*parlai, 1.0, 1.0]):
        found = rate(step, **fields, warmup_start=1e-4)
        assert found == pytest.approx(1e-3 * multiplier, rel=1e-6)
    schedule = LearningRateSchedule(**fields, warmup_start=1e-4, step_offset=10)
    assert [schedule.warms_up(done) for done in (0, 14, 15, 99)] == [True, True, False, False]
    assert not LearningRateSchedule("constant").warms_up(0)
    with pytest.raises(UserError, match=r"WARMUP_START=1\.5"):
        LearningRateSchedule(warmup_start=1.5)


def test_engine_losses_schedule_unknown_factor_names_the_nearest():
    """A misspelt factor is refused with the nearest known one. Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError) as error:
        LearningRateSchedule(factors="constant * linear_warmpu")
    for word in ["'linear_warmpu'", "did you mean 'linear_warmup'", "LearningRateSchedule.factors"]:
        assert word in str(error.value)
    with pytest.raises(UserError, match="known: constant, linear_warmup"):
        LearningRateSchedule(factors="zzz")


def test_engine_losses_schedule_is_frozen():
    """A schedule is a value: it may be a static argument of jit. Property."""
    schedule = LearningRateSchedule()
    assert hash(schedule) == hash(LearningRateSchedule())
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.factors = "constant"
