"""Learning rate schedules written as T5X writes them: factors joined by `*`."""

import dataclasses
import difflib

import jax
import jax.numpy as jnp

from cosmo.engine.base.errors import UserError

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
    """The product of named factors; the fields are T5X's `create_learning_rate_scheduler`'s.

    constant: base_learning_rate. linear_warmup: min(1, step / warmup_steps). linear_decay: warms up
    to base_learning_rate, then falls by `decay_factor` a step (it includes the two factors before).
    rsqrt_decay: 1 / sqrt(max(step, warmup_steps)). rsqrt_normalized_decay: the same times
    sqrt(warmup_steps). decay_every: decay_factor ** (step // steps_per_decay). cosine_decay: half a
    cosine every steps_per_cycle, after warmup_steps.
    """

    factors: str = "constant"
    base_learning_rate: float = 0.001
    warmup_steps: int = 1000
    decay_factor: float = 0.5
    steps_per_decay: int = 20000
    steps_per_cycle: int = 100000
    step_offset: int = 0
    min_learning_rate: float = 1e-8

    def __post_init__(self):
        for name in self.names:
            if name not in FACTORS:
                near = difflib.get_close_matches(name, FACTORS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(
                    f"unknown learning rate factor {name!r} in {self.factors!r}{hint} "
                    f"(known: {', '.join(FACTORS)}; gin: LearningRateSchedule.factors)"
                )

    @property
    def names(self) -> list[str]:
        """The factors, in order."""
        return [name.strip() for name in self.factors.split("*")]

    def __call__(self, step: jax.Array) -> jax.Array:
        """Learning rate at `step` (0 is the first): float32 scalar."""
        step = jnp.maximum(0, step - self.step_offset).astype(jnp.float32)
        warm = max(self.warmup_steps, 1)
        value = jnp.float32(1.0)
        for name in self.names:
            if name == "constant":
                value *= self.base_learning_rate
            elif name == "linear_warmup":
                value *= jnp.minimum(1.0, step / warm)
            elif name == "linear_decay":
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
        return jnp.maximum(value, self.min_learning_rate)
