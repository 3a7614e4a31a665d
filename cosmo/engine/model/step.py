"""Build one training step: loss, gradients, update. `train` runs it, and `plan` counts its cost."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import losses, models, partitioning
from cosmo.engine.model.optimizer import Adafactor, AdamW, LearningRateSchedule
from cosmo.engine.model.optimizer import build as build_optimizer

log = logging.getLogger(__name__)

Sums = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The arrays that a step changes, which are those of a checkpoint."""

    step: jax.Array  # int32 scalar: steps done
    params: models.Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step turns gradients into an update.

    `num_microbatches` (T5X's) parts of a batch add up their gradients one after another, to save
    memory. None takes as few as fit, or 1 outside of training.
    """

    optimizer: Adafactor | AdamW = Adafactor()
    learning_rate: LearningRateSchedule = LearningRateSchedule()
    num_microbatches: int | None = None
    max_grad_norm: float | None = None

    def __post_init__(self):
        if self.num_microbatches is not None and self.num_microbatches < 1:
            raise UserError(f"num_microbatches={self.num_microbatches}; it must be at least 1")

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer as an optax transformation at learning rate 1."""
        return build_optimizer(self.optimizer, self.max_grad_norm)


def init_state(model: models.EncoderDecoderModel, config: StepConfig, seed: int) -> TrainState:
    """Return a fresh state from `seed`."""
    params = models.init(model, jax.random.key(seed))
    return TrainState(jnp.int32(0), params, config.transformation().init(params))


def init_sharded_state(
    model: models.EncoderDecoderModel, config: StepConfig, seed: int, shardings: TrainState
) -> TrainState:
    """Return `init_state`'s state, built in place: no host holds all of it."""
    leaves, tree = jax.tree.flatten(shardings)
    return _jitted_init(model, config, seed, tuple(leaves), tree)()


# Tracing and lowering take seconds. A process that trains again with equal settings (a notebook, a
# sweep, a test) gets the jitted function of the first time, with what JAX caches by its identity.
@functools.lru_cache(maxsize=8)
def _jitted_init(model, config, seed, leaves, tree):
    out_shardings = jax.tree.unflatten(tree, leaves)
    return jax.jit(lambda: init_state(model, config, seed), out_shardings=out_shardings)


@functools.lru_cache(maxsize=8)
def state_shardings(
    model: models.EncoderDecoderModel,
    config: StepConfig,
    partitioner: partitioning.Partitioner,
    mesh: Mesh,
) -> tuple[TrainState, TrainState]:
    """Return (abstract state, the sharding of each of its arrays)."""
    abstract = jax.eval_shape(lambda: init_state(model, config, 0))
    params = partitioner.param_shardings(mesh, abstract.params, models.logical_axes(model))
    opt_state = partitioning.state_shardings(mesh, abstract.opt_state, abstract.params, params)
    return abstract, TrainState(partitioning.replicated(mesh), params, opt_state)


def check_bad_step_policy(policy: str) -> None:
    """Raise UserError unless `policy` is "stop" or "skip"."""
    if policy not in ("stop", "skip"):
        raise UserError(f"BAD_STEP_POLICY={policy!r}; it is 'stop' or 'skip'")


def make_train_step(
    model: models.EncoderDecoderModel,
    config: StepConfig,
    seed: int,
    layout: partitioning.Layout | None = None,
) -> Callable[..., tuple[TrainState, Sums]]:
    """Return a pure `step(state, batch) -> (state, sums)`, to be jitted with the state donated.

    Sums are those of `models.loss`, with `loss` (to be divided by `loss_weight`), `grad_norm` and
    `learning_rate`. The gradients of microbatches add up before one update, so the result is that
    of the whole batch. On several devices `layout` lays out activations; parameters are gathered
    layer by layer, gradients scattered. Parameters that are not trained (`models.frozen`) stay as
    they are, and have no part in the gradient's norm.

    `step(state, batch, limit)` may be skipped. If the loss or the gradient's norm is not finite, or
    the norm is above `limit`, only the step counter advances. `step(state, batch, limit,
    rate_scale)` multiplies the schedule's rate by `rate_scale`; either of the two may be None.
    """
    num_microbatches = config.num_microbatches or 1
    transformation = config.transformation()
    frozen = models.frozen(model)
    has_frozen = any(jax.tree.leaves(frozen))

    # The loss here is a sum, not a mean: gradients of microbatches add up before one division.
    def gradients(params, batch, key):
        def loss(params):
            # Their gradients are zeros then, which cost nothing: XLA drops the computation.
            if has_frozen:
                stop = jax.lax.stop_gradient
                params = jax.tree.map(lambda p, still: stop(p) if still else p, params, frozen)
            return models.loss(model, params, batch, key)

        (total, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, {"loss": total, **sums}

    def accumulate(params, batch, key):
        if num_microbatches == 1:
            return gradients(params, batch, key)

        # Neighbouring rows go to different microbatches: a row stays on the device that has it.
        def split(array):
            rows = array.reshape(-1, num_microbatches, *array.shape[1:])
            return partitioning.constrain(rows.swapaxes(0, 1), None, "batch", None)

        # Dropout's randomness is a function of (seed, step, microbatch) alone.
        def body(carry, inputs):
            index, microbatch = inputs
            micro_key = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(jnp.add, carry, gradients(params, microbatch, micro_key)), None

        microbatches = jax.tree.map(split, batch)
        shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda m: m[0], microbatches), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        # Without this constraint every device would hold the whole sum of the gradients.
        axes = models.logical_axes(model)
        zeros = (jax.tree.map(lambda z, a: partitioning.constrain(z, *a), zeros[0], axes), zeros[1])
        indices = jnp.arange(num_microbatches)
        grads, sums = jax.lax.scan(body, zeros, (indices, microbatches))[0]
        # A constant divisor was added up once for every microbatch.
        if losses.is_constant(model.loss_normalizing_factor):
            sums = {**sums, "loss_weight": sums["loss_weight"] / num_microbatches}
        return grads, sums

    def step(
        state: TrainState,
        batch: models.Batch,
        limit: jax.Array | None = None,
        rate_scale: jax.Array | None = None,
    ) -> tuple[TrainState, Sums]:
        with layout.active() if layout is not None else contextlib.nullcontext():
            return laid_out_step(state, batch, limit, rate_scale)

    def laid_out_step(state, batch, limit, rate_scale) -> tuple[TrainState, Sums]:
        # Without dropout no key: then the compiled step has no random numbers at all.
        key = None
        if model.network.dropout_rate > 0.0:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = accumulate(state.params, batch, key)
        # One division, after all gradients are added; never by 0, as a batch may have no target.
        weight = jnp.maximum(sums["loss_weight"], 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        # The schedule reads the state's step: the optimizer itself has learning rate 1.
        rate = config.learning_rate(state.step)
        if rate_scale is not None:
            rate = rate * rate_scale
        norm = optax.global_norm(grads)
        sums = {**sums, "grad_norm": norm, "learning_rate": rate}

        def update(params, opt_state):
            updates, opt_state = transformation.update(grads, opt_state, params)

            # Zero gradients are not enough to leave a parameter as it is: weights decay.
            def moved(parameter, update, still):
                return parameter if still else parameter + rate * update

            return jax.tree.map(moved, params, updates, frozen), opt_state

        if limit is None:
            params, opt_state = update(state.params, state.opt_state)
        else:
            good = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm) & (norm <= limit)
            # A branch, not `where` between two states, which would hold a second one: 62 MB more
            # temporary memory for 138 MB of AdamW's state, the branch 4 MB. XLA fuses the two kinds
            # of step differently, so they agree to rounding. Under "stop" nothing is added.
            params, opt_state = jax.lax.cond(
                good, update, lambda *same: same, state.params, state.opt_state
            )
        return TrainState(state.step + 1, params, opt_state), sums

    return step


def compile_step(
    model: models.EncoderDecoderModel,
    config: StepConfig,
    batch: Any,
    layout: partitioning.Layout,
    abstract: TrainState,
    shardings: TrainState,
    seed: int,
    skips: bool = False,
    scales: bool = False,
) -> jax.stages.Compiled:
    """Return the compiled train step, which donates the old state.

    `batch` and `abstract` are shapes: no state or batch need exist. It is called with (state,
    batch, limit, rate_scale), as `make_train_step` describes. The limit is a float32 scalar if
    `skips`, else None; so is the scale of the rate if `scales`.
    """
    mesh = layout.mesh
    leaves, tree = jax.tree.flatten(shardings)
    scalar = jax.ShapeDtypeStruct((), np.float32)
    # Ahead of time: `train` reads data meanwhile, and `plan` counts the compiled text.
    began = time.monotonic()
    jitted = _jitted_step(model, config, seed, layout, tuple(leaves), tree)
    lowered = jitted.lower(abstract, batch, scalar if skips else None, scalar if scales else None)
    compiled = lowered.compile()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    log.info(
        "%s parameters on %d %s device(s); train step compiled in %.1f s",
        f"{count:,}",
        mesh.size,
        mesh.devices.flat[0].platform,
        time.monotonic() - began,
    )
    return compiled


@functools.lru_cache(maxsize=8)
def _jitted_step(model, config, seed, layout, leaves, tree):
    shardings, everywhere = jax.tree.unflatten(tree, leaves), partitioning.replicated(layout.mesh)
    batch = partitioning.batch_sharding(layout.mesh)
    return jax.jit(
        make_train_step(model, config, seed, layout),
        in_shardings=(shardings, batch, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
