"""One training step: loss, gradients, update. Built here once, for whoever runs or plans it."""

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
    """Everything that a step changes, and everything that a checkpoint holds."""

    step: jax.Array  # int32 scalar: steps done
    params: models.Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step turns gradients into an update.

    `num_microbatches` is T5X's: parts of a batch whose gradients are added up one after another, to
    save memory (None: as few as fit, or 1 outside of training).
    """

    optimizer: Adafactor | AdamW = Adafactor()
    learning_rate: LearningRateSchedule = LearningRateSchedule()
    num_microbatches: int | None = None
    max_grad_norm: float | None = None

    def __post_init__(self):
        if self.num_microbatches is not None and self.num_microbatches < 1:
            raise UserError(f"num_microbatches={self.num_microbatches}; it must be at least 1")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer as optax sees it, at learning rate 1."""
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
    """Raise UserError unless `policy` is "stop", or "skip", with which the step has a branch."""
    if policy not in ("stop", "skip"):
        raise UserError(f"BAD_STEP_POLICY={policy!r}; it is 'stop' or 'skip'")


def make_train_step(
    model: models.EncoderDecoderModel,
    config: StepConfig,
    seed: int,
    layout: partitioning.Layout | None = None,
) -> Callable[..., tuple[TrainState, Sums]]:
    """A pure `step(state, batch) -> (state, sums)`, to be jitted with the state donated.

    The batch's rows are split into microbatches, whose gradients add up before one update, so the
    result is that of the whole batch. Dropout's randomness is a function of (seed, step,
    microbatch) alone. Sums are those of `models.loss`, with `loss` (to be divided by
    `loss_weight`), `grad_norm` and `learning_rate`. On several devices `layout` says what lies
    where; parameters are gathered layer by layer, gradients scattered.

    `step(state, batch, limit)` is a step that may be skipped: if the loss or the gradient's norm is
    not finite, or the norm above `limit`, only the step counter goes on. The compiler fuses the two
    kinds of step differently, so their numbers agree to rounding.
    """
    num_microbatches = config.num_microbatches or 1
    transformation = config.transformation()

    def gradients(params, batch, key):
        def loss(params):
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

        def body(carry, inputs):
            index, microbatch = inputs
            micro_key = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(jnp.add, carry, gradients(params, microbatch, micro_key)), None

        microbatches = jax.tree.map(split, batch)
        shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda m: m[0], microbatches), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        zeros = (partitioning.constrain_tree(zeros[0], models.logical_axes(model)), zeros[1])
        indices = jnp.arange(num_microbatches)
        grads, sums = jax.lax.scan(body, zeros, (indices, microbatches))[0]
        if losses.is_constant(model.loss_normalizing_factor):  # it was added up N times
            sums = {**sums, "loss_weight": sums["loss_weight"] / num_microbatches}
        return grads, sums

    def step(
        state: TrainState, batch: models.Batch, limit: jax.Array | None = None
    ) -> tuple[TrainState, Sums]:
        with layout.active() if layout is not None else contextlib.nullcontext():
            return laid_out_step(state, batch, limit)

    def laid_out_step(state, batch, limit) -> tuple[TrainState, Sums]:
        key = None
        if model.network.dropout_rate > 0.0:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = accumulate(state.params, batch, key)
        # A batch without a target would divide by zero.
        weight = jnp.maximum(sums["loss_weight"], 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        rate = config.learning_rate(state.step)
        norm = optax.global_norm(grads)
        sums = {**sums, "grad_norm": norm, "learning_rate": rate}

        def update(params, opt_state):
            updates, opt_state = transformation.update(grads, opt_state, params)
            return jax.tree.map(lambda p, u: p + rate * u, params, updates), opt_state

        if limit is None:
            params, opt_state = update(state.params, state.opt_state)
        else:
            good = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm) & (norm <= limit)
            # A branch, not a choice between two states: no second state is in memory for it.
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
) -> jax.stages.Compiled:
    """Return the train step, compiled before there is a state or a batch; it donates the old state.

    `batch` and `abstract` are shapes. If `skips`, the step takes a third argument, the limit of the
    gradient's norm.
    """
    mesh = layout.mesh
    leaves, tree = jax.tree.flatten(shardings)
    limit = (jax.ShapeDtypeStruct((), np.float32),) if skips else ()
    began = time.monotonic()
    jitted = _jitted_step(model, config, seed, layout, skips, tuple(leaves), tree)
    compiled = jitted.lower(abstract, batch, *limit).compile()
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
def _jitted_step(model, config, seed, layout, skips, leaves, tree):
    shardings, everywhere = jax.tree.unflatten(tree, leaves), partitioning.replicated(layout.mesh)
    limit = (everywhere,) if skips else ()
    return jax.jit(
        make_train_step(model, config, seed, layout),
        in_shardings=(shardings, partitioning.batch_sharding(layout.mesh), *limit),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
