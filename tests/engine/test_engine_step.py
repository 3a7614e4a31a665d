"""The train step: microbatches, dropout's randomness, what it reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import models, step, t5
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.optimizer import Adafactor, AdamW, LearningRateSchedule

SEED = 11
CONFIG = step.StepConfig(
    optimizer=Adafactor(min_dim_size_to_factor=8),
    learning_rate=LearningRateSchedule(
        factors="constant * linear_warmup", base_learning_rate=0.1, warmup_steps=10
    ),
)


@pytest.fixture(scope="module")
def averaged(model):
    """The tiny model, its loss a mean over target tokens."""
    return dataclasses.replace(model, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")


@pytest.fixture(scope="module")
def dropping(averaged):
    network = dataclasses.replace(averaged.network, dropout_rate=0.3)
    return dataclasses.replace(averaged, network=network)


@pytest.fixture(scope="module")
def jitted(jit):
    """`jitted(model, config)`: the step as a run has it, jitted with its state donated."""
    cache = {}

    def make(model, config=CONFIG):
        if (model, config) not in cache:
            cache[model, config] = jit(step.make_train_step(model, config, SEED), donate_argnums=0)
        return cache[model, config]

    return make


@pytest.fixture(scope="module")
def state(params, jit):
    """`state(step=4)`: a state of its own at step 4, safe to donate."""

    init = jit(CONFIG.transformation().init)

    def make(number=4):
        opt_state = init(params)
        fresh = step.TrainState(jnp.int32(number), params, opt_state)
        return jax.tree.map(lambda a: jnp.array(a, copy=True), fresh)

    return make


def assert_same(ours, expected, rtol):
    """Every tensor within `rtol` of its own largest number."""

    def check(path, a, b):
        assert np.all(np.isfinite(b)), path
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, atol=rtol * scale, rtol=0, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, ours, expected)


def test_engine_step_is_gradient_optimizer_and_rate(
    averaged, params, unpacked, loss_and_grads, jitted, state, jit
):
    """params + rate * update(gradient of the mean loss). Oracle: the same put together by hand.

    The rate at step 4 of 10 warm-up steps to 0.1 is 0.04; there are 27 target tokens.
    """
    (loss, _), grads = loss_and_grads(averaged, params, unpacked)
    grads = jax.tree.map(lambda g: g / 27, grads)
    before = state()
    updates, _ = jit(CONFIG.transformation().update)(grads, before.opt_state, before.params)
    expected = jax.tree.map(lambda p, u: p + 0.04 * u, before.params, updates)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))

    after, sums = jitted(averaged)(before, unpacked)
    assert int(after.step) == 5
    assert_same(after.params, expected, rtol=1e-5)
    assert float(sums["learning_rate"]) == pytest.approx(0.04)
    assert float(sums["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert float(sums["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(sums["loss_weight"]) == float(sums["num_tokens"]) == 27


@pytest.mark.parametrize(
    ("count", "normalization"),
    [
        pytest.param(2, "NUM_REAL_TARGET_TOKENS", marks=pytest.mark.slow),
        (4, "NUM_REAL_TARGET_TOKENS"),
        (2, "AVERAGE_PER_SEQUENCE"),
        # Each compiles two steps.
        pytest.param(2, "NUM_TOTAL_TARGET_TOKENS", marks=pytest.mark.slow),
        pytest.param(2, None, marks=pytest.mark.slow),
        pytest.param(4, 7.0, marks=pytest.mark.slow),
    ],
)
def test_engine_step_microbatches(averaged, unpacked, jitted, state, count, normalization):
    """Two or four microbatches give the update of the whole batch. Oracle: num_microbatches=1.

    Rows hold 2 to 7 target tokens and two none, so a mean of the parts' means would be wrong.
    """
    averaged = dataclasses.replace(averaged, loss_normalizing_factor=normalization)
    expected, expected_sums = jitted(averaged)(state(), unpacked)
    config = dataclasses.replace(CONFIG, num_microbatches=count)
    after, sums = jitted(averaged, config)(state(), unpacked)
    assert_same(after, expected, rtol=1e-5)
    assert sums.keys() == expected_sums.keys()
    for name in sums:
        assert float(sums[name]) == pytest.approx(float(expected_sums[name]), rel=1e-4), name


def test_engine_step_donates_its_state(averaged, unpacked, jitted, state):
    """The state that went in gives its memory to the one that comes out. Property of donation.

    Only Adafactor's placeholders of one number, which the step does not read, may stay.
    """
    before = state()
    after, _ = jitted(averaged)(before, unpacked)
    for path, array in jax.tree_util.tree_leaves_with_path(before):
        assert array.is_deleted() or array.shape[-1] == 1, path
    assert jax.tree.structure(after) == jax.tree.structure(before)
    again, _ = jitted(averaged)(after, unpacked)  # what came out goes in again
    assert int(again.step) == 6


def test_engine_step_learns(averaged, unpacked, jitted, state):
    """Five steps on one batch lower its loss by a fifth. Property."""
    now, losses = state(10), []
    for _ in range(5):
        now, sums = jitted(averaged)(now, unpacked)
        losses.append(float(sums["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def dropped(dropping, examples, pack, jitted, state):
    """(batch, `run(number)` -> the state after step `number` on it, and its sums).

    Two microbatches with dropout; all rows of the batch are equal, so that nothing but the masks
    tells the microbatches apart.
    """
    batch = pack([[examples[0]]] * 8)
    step_fn = jitted(dropping, dataclasses.replace(CONFIG, num_microbatches=2))
    return batch, lambda number: step_fn(state(number), batch)


def test_engine_step_dropout_repeats_itself(dropped):
    """The same state and batch give the same result to the bit; another step drops others."""
    _, run = dropped
    first, again, other = run(4), run(4), run(5)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert float(other[1]["loss"]) != float(first[1]["loss"])


def test_engine_step_dropout_depends_on_seed_step_and_microbatch(
    dropping, params, loss_of, dropped
):
    """Every microbatch of every step has a mask of its own, from the seed alone.

    Oracle: models.loss of each half under fold_in(fold_in(key(seed), step), microbatch).
    """
    batch, run = dropped
    half = {name: array[::2] for name, array in batch.items()}
    for number in (4, 5):
        key = jax.random.fold_in(jax.random.key(SEED), number)
        losses = [
            float(loss_of(dropping, params, half, jax.random.fold_in(key, part))[0])
            for part in (0, 1)
        ]
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
        assert float(run(number)[1]["loss"]) == pytest.approx(sum(losses), rel=1e-5)


def test_engine_step_batch_without_targets(averaged, params, unpacked, jitted, state):
    """A batch without one target token leaves the parameters as they are, not NaN. Property."""
    empty = jax.tree.map(jnp.zeros_like, unpacked)
    after, sums = jitted(averaged)(state(), empty)
    assert float(sums["loss"]) == 0.0 and float(sums["loss_weight"]) == 0.0
    assert float(sums["grad_norm"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(after))


def test_engine_step_microbatches_must_be_positive():
    """num_microbatches=0 is refused by name. Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError, match="num_microbatches=0"):
        step.StepConfig(num_microbatches=0)


@dataclasses.dataclass(frozen=True)
class PartlyFrozen(t5.T5Config):
    """A T5 whose token embedding and whose encoder's norms in the layers are not trained."""

    def build(self, rngs):
        network = super().build(rngs)
        network.token_embedder.set_metadata(trained=False)
        network.encoder.layers.pre_mlp_layer_norm.scale.set_metadata(trained=False)
        return network


def is_frozen(path):
    return path[-1].key == "token_embedder" or [key.key for key in path] == [
        *("encoder", "layers", "pre_mlp_layer_norm", "scale")
    ]


@pytest.mark.parametrize("trained", [False, True])
def test_engine_step_blenderbots_positions_are_frozen(trained):
    """Both position tables are, unless the config trains them. Oracle: ParlAI, by hand."""
    sizes = dict(vocab_size=40, emb_dim=16, num_heads=2, num_decoder_layers=2, mlp_dim=24)
    model = models.EncoderDecoderModel(BlenderbotConfig(**sizes, train_positions=trained))
    still = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, frozen in jax.tree_util.tree_leaves_with_path(models.frozen(model))
        if frozen
    }
    tables = {"encoder/position_embeddings", "decoder/position_embeddings"}
    assert still == (set() if trained else tables)


@pytest.mark.parametrize("amsgrad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_engine_step_leaves_frozen_parameters(
    averaged, unpacked, loss_and_grads, jitted, params, amsgrad, jit
):
    """Frozen parameters stay to the bit, decayed or not; all others move as if nothing were frozen.

    The gradient's norm is that of the others. Oracle: the step of the network that trains all.
    """
    network = PartlyFrozen(**dataclasses.asdict(averaged.network))
    model = dataclasses.replace(averaged, network=network)
    found = jax.tree_util.tree_leaves_with_path(models.frozen(model))
    assert all(still is is_frozen(path) for path, still in found) and len(found) > 2
    assert not any(jax.tree.leaves(models.frozen(averaged)))

    config = step.StepConfig(
        optimizer=AdamW(weight_decay=0.1, amsgrad=amsgrad),
        learning_rate=LearningRateSchedule(base_learning_rate=0.1),
        num_microbatches=2,
    )
    fresh = step.TrainState(jnp.int32(0), params, config.transformation().init(params))

    def run(model):
        return jitted(model, config)(jax.tree.map(lambda a: jnp.array(a), fresh), unpacked)

    (after, sums), (expected, _) = run(model), run(averaged)
    _, grads = loss_and_grads(averaged, params, unpacked)
    squares = 0.0
    for (path, new), old, all_trained, grad in zip(
        jax.tree_util.tree_leaves_with_path(after.params),
        *map(jax.tree.leaves, (params, expected.params, grads)),
        strict=True,
    ):
        if is_frozen(path):
            np.testing.assert_array_equal(new, old)
            assert np.max(np.abs(all_trained - old)) > 0.01
        else:
            np.testing.assert_allclose(new, all_trained, rtol=1e-4, atol=1e-4)
            squares += float(np.sum(np.square(np.asarray(grad / sums["loss_weight"]))))
    assert float(sums["grad_norm"]) == pytest.approx(squares**0.5, rel=1e-4)


def test_engine_step_scales_its_rate(averaged, unpacked, jitted, state):
    """A scale of the rate scales the update and the reported rate. Oracle: the step without one.

    It is an argument: another value compiles nothing.
    """
    before = state()
    whole, sums = jitted(averaged)(state(), unpacked)
    step_fn = jitted(averaged)
    step_fn(state(), unpacked, None, np.float32(1.0))
    compiled = step_fn._cache_size()
    for scale in (0.5, 0.25, 1.0):
        after, scaled = step_fn(state(), unpacked, None, np.float32(scale))
        moved = jax.tree.map(lambda a, b: a - b, after.params, before.params)
        expected = jax.tree.map(lambda a, b, s=scale: s * (a - b), whole.params, before.params)
        for a, b in zip(*map(jax.tree.leaves, (moved, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
        assert float(scaled["learning_rate"]) == pytest.approx(
            scale * float(sums["learning_rate"]), rel=1e-6
        )
    assert step_fn._cache_size() == compiled
