"""Bad steps: skipped without a trace in the state, or the end of the run; always written down."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format
from cosmo.engine.model import models, step
from cosmo.engine.model.optimizer import Adafactor, AdamW
from cosmo.engine.train import bad_steps
from cosmo.engine.train.bad_steps import BadStepConfig
from tests.engine import fault_driver, faults

OPTIONS = {**fault_driver.OPTIONS, "total_steps": 30, "save_period": 10, "keep": None}
run = functools.partial(faults.run_here, OPTIONS)


ADAFACTOR = pytest.param(Adafactor(min_dim_size_to_factor=8), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[ADAFACTOR, AdamW()])
def steps(request, model, params, jit):
    """(the step, jitted without donation; a state at step 4)."""
    config = step.StepConfig(optimizer=request.param)
    opt_state = jit(config.transformation().init)(params)
    state = step.TrainState(jnp.int32(4), params, opt_state)
    return jit(step.make_train_step(model, config, 0)), state


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_skipped_step_changes_the_counter_alone(steps, packed):
    """Oracle: the state before, to the bit; of a batch that makes a NaN, and of a limit."""
    run_step, state = steps
    poisoned = {**packed, "decoder_loss_weights": jnp.full((8, 16), jnp.inf)}
    for batch, limit in ((poisoned, np.inf), (packed, 1e-6)):
        after, sums = run_step(state, batch, np.float32(limit))
        assert int(after.step) == 5
        assert bits(after[1:]) == bits(state[1:])
        assert np.isfinite(sums["grad_norm"]) == (batch is packed)
    spoiled, _ = run_step(state, poisoned)  # the test would see it
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(spoiled.params))


def test_a_step_that_may_be_skipped_computes_what_others_do(steps, packed):
    """Oracle: the step without a limit, to rounding: the compiler fuses the two differently.

    A limit that is just met is no reason to skip. That limit is the norm of the same program, since
    another one's may differ in its last bit.
    """
    run_step, state = steps
    plain, sums = run_step(state, packed)
    _, unlimited = run_step(state, packed, np.float32(np.inf))
    for limit in (np.inf, float(unlimited["grad_norm"])):
        after, same = run_step(state, packed, np.float32(limit))
        np.testing.assert_allclose(same["grad_norm"], sums["grad_norm"], rtol=1e-5)
        for leaf, expected in zip(jax.tree.leaves(after), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_a_run_with_no_bad_step_has_the_same_numbers_under_either_policy(tmp_path):
    """Oracle: the policy "stop", to rounding; metrics have a column more."""
    run(tmp_path / "stop")
    run(tmp_path / "skip", policy="skip", spike_factor=100.0)
    _, told = faults.results(tmp_path / "stop")
    _, told_skipping = faults.results(tmp_path / "skip")
    counts = [line.pop("train/bad_steps") for line in told_skipping["metrics"]]
    assert counts == [0.0] * len(told["metrics"]) and len(counts) == 9
    for line, expected in zip(told_skipping["metrics"], told["metrics"], strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rows", [True, False])
def test_a_run_stops_before_a_bad_step_is_saved(tmp_path, rows):
    """Step 20 is bad, and one to save at: the newest checkpoint is of step 10 and finite, the batch
    is written down. Oracle: the batch as it was made."""
    with pytest.raises(UserError, match=r"step 20 is bad: loss (nan|inf).*BAD_STEP_POLICY=skip"):
        run(tmp_path, bad=[20], rows=rows)
    newest, state = any_format.read_numpy(str(tmp_path))
    assert newest == 10
    assert all(np.isfinite(leaf).all() for leaf in faults.leaves(state).values())
    (line,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert line["step"] == 20 and line["loss"] in ("nan", "inf") and line["limit"] is None
    expected = fault_driver.batch(19, {**OPTIONS, "bad": [20], "rows": rows})
    if rows:
        assert line["rows"] == expected.rows.tolist() and "tokens" not in line
    else:
        arrays = np.load(tmp_path / line["tokens"])
        assert sorted(arrays) == sorted(expected.arrays)
        assert all((arrays[name] == expected.arrays[name]).all() for name in arrays)


def test_skipped_steps_are_told_once(tmp_path):
    """Bad steps 12 and 13 and a spike at 25. Oracle: by hand; and loss, a mean over the good steps
    of its window, stays finite."""
    state = run(tmp_path, policy="skip", spike_factor=3.0, bad=[12, 13], spikes=[25])
    assert int(state.step) == 30
    bad = [json.loads(x) for x in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in bad] == [12, 13, 25]
    assert bad[2]["grad_norm"] > bad[2]["limit"] > 0
    lines = faults.metrics(tmp_path)
    counts = {line["step"]: line["train/bad_steps"] for line in lines}
    assert (counts[10], counts[12], counts[16], counts[24], counts[28]) == (0, 1, 2, 2, 3)
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    # Of windows whose steps were all bad there is the count alone.
    everything = run(tmp_path / "all", policy="skip", bad=[1, 2, 3], total_steps=3, save_period=3)
    assert int(everything.step) == 3
    assert faults.metrics(tmp_path / "all") == [{"step": 3, "train/bad_steps": 3.0}]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    """Property: three are skipped, the fourth is an error; what was saved is from before it."""
    with pytest.raises(UserError, match=r"step 14 is bad.*so were the 3 before.*MAX_BAD_STEPS=3"):
        run(tmp_path, policy="skip", bad=[11, 12, 13, 14, 15])
    assert any_format.read_numpy(str(tmp_path))[0] == 10


def sums(norm, loss=1.0):
    """What a step reports, as arrays on a device."""
    names = ("cross_entropy", "num_tokens", "num_correct", "z_loss", "learning_rate")
    values = {**dict.fromkeys(names, 1.0), "loss": loss, "grad_norm": norm}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_the_limit_is_a_function_of_the_run_alone(tmp_path):
    """Property: whether and when a report or a save makes the host wait, and whether the run was
    resumed, the limits are the same. Oracle: the median of the norms, by numpy."""
    config = BadStepConfig("skip", spike_factor=2.0, window=20)
    norms = np.random.default_rng(0).uniform(1, 2, 60).astype(np.float32)
    norms[30] = 50.0

    def limits(settle_at=(), resume_at=()):
        watch, found = bad_steps.BadStepMonitor(config, str(tmp_path), enabled=False), []
        for number, norm in enumerate(norms, 1):
            limit = watch.limit(number)
            found.append(float(limit))
            watch.add(number, sums(norm), None, limit)
            if number in settle_at:
                watch.report()
            if number in resume_at:
                saved = json.loads(json.dumps(watch.progress()))
                watch = bad_steps.BadStepMonitor(
                    config, str(tmp_path), number, saved, enabled=False
                )
        watch.judge_all()
        assert watch.bad_steps == 1
        return found

    found = limits()
    good = np.delete(norms, 30)
    for number in range(1, 61):
        known = norms[: max(0, number - 1 - bad_steps.LAG)]
        known = known[known < 50][-20:]
        expected = 2 * np.median(known) if len(known) >= bad_steps.MIN_MEDIAN_STEPS else np.inf
        assert found[number - 1] == np.float32(expected), number
    assert len(good) == 59
    assert limits(settle_at=range(1, 60, 7)) == found
    assert limits(resume_at=(5, 11, 12, 33, 50)) == found


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"policy": "wait"}, "BAD_STEP_POLICY"),
        ({"spike_factor": 0.5}, "SPIKE_FACTOR"),
        ({"spike_factor": float("nan")}, "SPIKE_FACTOR"),
        ({"max_in_a_row": 0}, "MAX_BAD_STEPS"),
        ({"window": 3}, "window"),
    ],
)
def test_settings_that_cannot_be(changes, name):
    """The error names the setting."""
    with pytest.raises(UserError, match=name):
        BadStepConfig(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Adafactor(), AdamW()])
def test_a_step_that_may_be_skipped_takes_no_second_state(model, tiny_config, optimizer):
    """Property: by the compiler's account, temporary memory grows by less than half the state."""
    network = tiny_config(emb_dim=256, mlp_dim=1024, num_heads=4, head_dim=64, vocab_size=4000)
    config = step.StepConfig(optimizer=optimizer)
    large = models.EncoderDecoderModel(network)
    abstract = jax.eval_shape(lambda: step.init_state(large, config, 0))
    batch = fault_driver.batch(0, OPTIONS).arrays
    jitted = jax.jit(step.make_train_step(large, config, 0), donate_argnums=0)
    sizes = []
    for limit in ((), (np.float32(1),)):
        account = jitted.lower(abstract, batch, *limit).compile().memory_analysis()
        sizes.append(account.temp_size_in_bytes)
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract))
    assert sizes[1] - sizes[0] < 0.5 * state
