"""Build optimizers as optax transformations of learning rate 1, and the schedule of that rate."""

# Why rate 1: the train step multiplies the update by the schedule's rate. So the rate depends on
# the step alone, and the optimizer's state has no second step counter.

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cosmo.engine.base.errors import UserError

LAYERS = "layers"  # a subtree of this name holds stacked layers: every leaf is [L, ...]


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern 2018) with T5X's defaults and field names.

    Matrices with both sides of at least `min_dim_size_to_factor` keep their second moments as a row
    and a column. The rate is relative to each parameter's root mean square. Unlike in T5X,
    `weight_decay_rate` is multiplied by the learning rate, and `beta1` averages updates before the
    rate.
    """

    # T5X's `step_offset` is not needed: the decay counts the steps of the optimizer's state.

    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    min_dim_size_to_factor: int = 128
    beta1: float | None = None
    weight_decay_rate: float | None = None

    def build(self) -> optax.GradientTransformation:
        """Return the optax transformation at learning rate 1, whose updates are to be added."""
        return optax.adafactor(
            learning_rate=1.0,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=self.beta1,
            weight_decay_rate=self.weight_decay_rate,
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); `weight_decay=0` is Adam.

    `amsgrad` divides by the largest second moment so far (Reddi et al. 2018), as PyTorch's Adam and
    AdamW do. ParlAI's `adam` is this one.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def build(self) -> optax.GradientTransformation:
        """Return the optax transformation at learning rate 1, whose updates are to be added."""
        if not self.amsgrad:
            return optax.adamw(
                1.0, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
            )
        return optax.chain(
            scale_by_amsgrad(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(1.0),
        )


def scale_by_amsgrad(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return AMSGrad's scaling with PyTorch's order: maximum first, then bias correction."""
    # optax.scale_by_amsgrad corrects before it takes the maximum, or not at all: after 20 steps of
    # the test, of rate 0.1, its parameters differ from PyTorch's by up to 0.4, or by 0.7.

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        # 1 - b ** count, as optax computes it for Adam.
        correction1, correction2 = 1 - b1**count, 1 - b2**count
        scaled = jax.tree.map(
            lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu_max
        )
        return scaled, optax.ScaleByAmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(optax.scale_by_amsgrad().init, update)


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `inner` applied to each layer of a stacked subtree on its own, and to the rest as one.

    The state is {"rest": state, "stacks": {"a/layers": state with a leading axis of layers}}.
    """
    # Adafactor's factoring, clipping and parameter scale are per tensor. Mapped over the stacked
    # axis they see the tensors of an unstacked network, so stacking changes no number.

    def init(params):
        rest, stacks = _split(params)
        return {
            "rest": inner.init(rest),
            "stacks": {path: jax.vmap(inner.init)(stack) for path, stack in stacks.items()},
        }

    def update(updates, state, params):
        rest, stacks = _split(params)
        rest_updates, stack_updates = _split(updates)
        # vmap over the axis of layers: each layer keeps a count of its own, all of them equal.
        new_rest, rest_state = inner.update(rest_updates, state["rest"], rest)
        new_stacks, stack_states = {}, {}
        for path, stack in stacks.items():
            new_stacks[path], stack_states[path] = jax.vmap(inner.update)(
                stack_updates[path], state["stacks"][path], stack
            )
        return _join(new_rest, new_stacks), {"rest": rest_state, "stacks": stack_states}

    return optax.GradientTransformation(init, update)


def build(
    config: Adafactor | AdamW, max_grad_norm: float | None = None
) -> optax.GradientTransformation:
    """Return the whole optimizer: clip the norm over all layers if asked, then apply `config`."""
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise UserError(f"max_grad_norm={max_grad_norm}; give a positive norm or None")
    inner = per_layer(config.build())
    if max_grad_norm is None:
        return inner
    clip = optax.clip_by_global_norm(max_grad_norm)

    # Not optax.chain: a checkpoint's optimizer state has one layout, whether gradients are clipped.
    def update(updates, state, params):
        updates, _ = clip.update(updates, clip.init(params), params)
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _split(tree: dict) -> tuple[dict, dict]:
    """Return (tree without its stacked subtrees, {"a/layers": subtree})."""
    rest: dict[tuple, Any] = {}
    stacks: dict[str, dict[tuple, Any]] = {}
    for path, leaf in flatten_dict(tree).items():
        if LAYERS in path:
            cut = path.index(LAYERS) + 1
            stacks.setdefault("/".join(path[:cut]), {})[path[cut:]] = leaf
        else:
            rest[path] = leaf
    return unflatten_dict(rest), {path: unflatten_dict(stack) for path, stack in stacks.items()}


def _join(rest: dict, stacks: dict) -> dict:
    """Return the tree that `_split` has taken apart."""
    flat = flatten_dict(rest)
    for path, stack in stacks.items():
        flat |= {(*path.split("/"), *below): leaf for below, leaf in flatten_dict(stack).items()}
    return unflatten_dict(flat)


FACTORS = (
    "constant",
    "linear_warmup",
    "linear_decay",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
    "decay_every",
    "cosine_decay",
)


@dataclasses.dataclass(frozen=True)
class LearningRateSchedule:
    """The product of named factors; the fields are those of T5X's `create_learning_rate_scheduler`.

    constant: base_learning_rate. linear_warmup: from `warmup_start` at step 0 to 1 at warmup_steps.
    linear_decay: warms up from 0 to base_learning_rate, then falls by `decay_factor` a step (it
    includes the two factors before).
    rsqrt_decay: 1 / sqrt(max(step, warmup_steps)). rsqrt_normalized_decay: the same times
    sqrt(warmup_steps). decay_every: decay_factor ** (step // steps_per_decay). cosine_decay: half a
    cosine every steps_per_cycle, after warmup_steps. `warmup_start` is not T5X's, which has 0.
    """

    factors: str = "constant"
    base_learning_rate: float = 0.001
    warmup_steps: int = 1000
    warmup_start: float = 0.0
    decay_factor: float = 0.5
    steps_per_decay: int = 20000
    steps_per_cycle: int = 100000
    step_offset: int = 0
    min_learning_rate: float = 1e-8

    def __post_init__(self):
        # At the start, not at the first step: a typo must not cost a compilation.
        for name in self.names:
            if name not in FACTORS:
                near = difflib.get_close_matches(name, FACTORS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(
                    f"unknown learning rate factor {name!r} in {self.factors!r}{hint} "
                    f"(known: {', '.join(FACTORS)}; gin: LearningRateSchedule.factors)"
                )
        if not 0 <= self.warmup_start <= 1:
            raise UserError(f"WARMUP_START={self.warmup_start!r}; give a share of the rate, 0 to 1")
        if self.warmup_start and "linear_warmup" not in self.names:
            raise UserError(
                f"WARMUP_START={self.warmup_start!r} is the beginning of the factor linear_warmup, "
                f"and the factors are {self.factors!r}: add it, or leave out",
                setting="WARMUP_START",
            )

    @property
    def names(self) -> list[str]:
        """The factors' names, in order."""
        return [name.strip() for name in self.factors.split("*")]

    def warms_up(self, steps_done: int) -> bool:
        """Return whether the next step, after `steps_done` of them, is one of the warm-up."""
        warming = {"linear_warmup", "linear_decay"} & set(self.names)
        return bool(warming) and steps_done - self.step_offset < self.warmup_steps

    def __call__(self, step: jax.Array) -> jax.Array:
        """Return the learning rate at `step` (0 is the first): float32 scalar."""
        step = jnp.maximum(0, step - self.step_offset).astype(jnp.float32)
        warm = max(self.warmup_steps, 1)  # 0 steps of warmup must not divide by zero
        value = jnp.float32(1.0)
        for name in self.names:
            if name == "constant":
                value *= self.base_learning_rate
            elif name == "linear_warmup":
                rising = jnp.minimum(1.0, step / warm)
                # ParlAI, whose start is 1e-4, never takes the last of the warm-up's increments: it
                # stays 1 / warmup_steps below the whole rate (seen with its scheduler).
                value *= self.warmup_start + (1.0 - self.warmup_start) * rising
            elif name == "linear_decay":
                # T5X's meaning: it includes warmup and base rate, unlike the other decays.
                rising = step / warm
                falling = 1.0 + self.decay_factor * (warm - step)
                value *= self.base_learning_rate * jnp.minimum(rising, falling)
            elif name == "rsqrt_decay":
                value /= jnp.sqrt(jnp.maximum(step, warm))
            elif name == "rsqrt_normalized_decay":
                value *= jnp.sqrt(warm / jnp.maximum(step, warm))
            elif name == "decay_every":
                value *= self.decay_factor ** (step // self.steps_per_decay)
            elif name == "cosine_decay":
                cycle = jnp.maximum(0.0, (step - self.warmup_steps) / self.steps_per_cycle)
                value *= 0.5 * (1.0 + jnp.cos(jnp.pi * (cycle % 1.0)))
        # As T5X's: never 0, where a linear decay or a cosine ends.
        return jnp.maximum(value, self.min_learning_rate)
