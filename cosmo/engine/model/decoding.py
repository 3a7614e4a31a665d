"""Generate tokens from a step function: greedy, sampling and beam search in one cached loop.

`decode` runs the loop; a rule (`_sampling` or `_beam`) chooses tokens from each step's logits.
Rows are [R] = [B * N]: N samples or beams of each of B inputs, neighbours in memory.
Suffixes: R rows, B inputs, N beams or samples, C beam candidates, T new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cosmo.engine.base.errors import UserError

PAD, EOS = 0, 1
IMPOSSIBLE = -1.0e7  # a log-probability that no real hypothesis reaches; T5X's NEG_INF


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to generate. The defaults are greedy.

    `temperature=0` takes the likeliest token. Above 0, `num_samples` answers a record are sampled,
    from the `top_k` likeliest tokens (0: all) and the nucleus of mass `top_p` (Holtzman et al.
    2020). `beam_size > 1` searches instead, as T5X does: it ranks by log-likelihood over
    ((5 + length) / 6) ** length_penalty (Wu et al. 2016).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1
    beam_size: int = 1
    length_penalty: float = 0.6

    def __post_init__(self):
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0.0, "0 (greedy) or above"),
            "top_k": (self.top_k >= 0, "0 (off) or above"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "beam_size": (self.beam_size >= 1, "at least 1"),
            "length_penalty": (self.length_penalty >= 0.0, "0 or above"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise UserError(f"DecodingConfig.{name}={getattr(self, name)}; it must be {rule}")
        if self.beam_size > 1 and (self.temperature > 0.0 or self.num_samples > 1):
            raise UserError(
                "beam search is deterministic: beam_size > 1 cannot go with temperature > 0"
                " or num_samples > 1"
            )
        if self.temperature == 0.0 and self.num_samples > 1:
            raise UserError(
                "num_samples > 1 without temperature gives equal answers: set it above 0",
                setting="TEMPERATURE",
            )
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.top_k > 0):
            raise UserError(
                "top_k and top_p choose what is sampled, and temperature=0 samples nothing: set it"
                " above 0",
                setting="TEMPERATURE",
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "DecodingConfig":
        """Return the config of some fields by name; UserError for a name that is no field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}; known are {sorted(known)}")
        return cls(**settings)

    @property
    def rows_per_input(self) -> int:
        """The number of rows that the loop carries for each input: beams or samples."""
        return max(self.beam_size, self.num_samples)


class Decoded(NamedTuple):
    """Tokens int32 [B, N, T] with padding after the first EOS, and scores float32 [B, N].

    A score is the log-likelihood in nats, EOS included. With a beam it is divided by the length
    penalty, and beams are sorted, the best first.
    """

    tokens: jax.Array
    scores: jax.Array


class Cache(Protocol):
    """The interface of a cache of [R] rows; `transformer.DecoderCache` is one."""

    def repeat(self, count: int) -> "Cache":
        """Return the cache with every row `count` times, as neighbours."""

    def take(self, rows_R: jax.Array) -> "Cache":
        """Return the cache of rows `rows_R`."""


class _Rule(NamedTuple):
    """How to choose tokens: a state and functions of it."""

    start: Any
    # (state, logits_RV, index) -> (state, tokens_R for the next step, parents_R or None)
    advance: Callable
    done: Callable  # (state, index) -> bool scalar: no further step can change the result
    finish: Callable  # state -> Decoded


def decode(
    step: Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]],
    cache: Cache,
    batch_size: int,
    config: DecodingConfig,
    row_keys_B: jax.Array | None = None,
    first_B: jax.Array | None = None,
    ended_B: jax.Array | None = None,
) -> Decoded:
    """Return up to `max_new_tokens` tokens for each of `batch_size` inputs.

    `step(tokens_R, index, cache) -> (logits_RV, cache)` gets the tokens at position `index` and
    scores the ones after. `row_keys_B` are random keys, one an input. `first_B` are the tokens at
    position 0: by default PAD, with which T5 starts; others for a cache that holds what came
    before. Inputs of which `ended_B` holds get an empty answer of score 0.
    """
    n = config.rows_per_input
    first_B = jnp.full((batch_size,), PAD, jnp.int32) if first_B is None else first_B
    ended_B = jnp.zeros((batch_size,), bool) if ended_B is None else ended_B
    # Once, before the loop: the encoder ran for B inputs, not for B * N rows.
    if n > 1:
        cache = cache.repeat(n)
    if config.beam_size > 1:
        rule = _beam(ended_B, config)
    else:
        if config.temperature > 0.0:
            if row_keys_B is None:
                raise ValueError("sampling needs row_keys: one random key an input")
            # Randomness is a function of an input's key and the position, so that an answer does
            # not depend on the batch that its row is in.
            keys = jax.vmap(lambda key: jax.random.split(key, n))(row_keys_B)
            row_keys_B = keys.reshape(batch_size * n)
        rule = _sampling(jnp.repeat(ended_B, n), config, row_keys_B)

    def body(carry):
        index, tokens_R, cache, state = carry
        logits_RV, cache = step(tokens_R, index, cache)
        state, tokens_R, parents_R = rule.advance(state, logits_RV, index)
        if parents_R is not None:
            cache = cache.take(parents_R)
        return index + 1, tokens_R, cache, state

    def cond(carry):
        index, _, _, state = carry
        return (index < config.max_new_tokens) & ~rule.done(state, index)

    first_R = jnp.repeat(first_B, n)
    *_, state = jax.lax.while_loop(cond, body, (jnp.int32(0), first_R, cache, rule.start))
    return rule.finish(state)


class _Samples(NamedTuple):
    tokens_RT: jax.Array
    scores_R: jax.Array
    ended_R: jax.Array


def _sampling(ended_R: jax.Array, config: DecodingConfig, row_keys_R: jax.Array | None) -> _Rule:
    """Return the rule that samples one token a row and step; greedy at `temperature=0`."""
    rows = ended_R.size
    start = _Samples(
        jnp.full((rows, config.max_new_tokens), PAD, jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        ended_R,
    )

    def advance(state, logits_RV, index):
        if config.temperature == 0.0:
            chosen_R = first_best(logits_RV)
        else:
            allowed_RV = truncate(logits_RV / config.temperature, config.top_k, config.top_p)
            keys_R = jax.vmap(jax.random.fold_in, (0, None))(row_keys_R, index)
            chosen_R = jax.vmap(jax.random.categorical)(keys_R, allowed_RV).astype(jnp.int32)
        # The score is the model's own likelihood: without temperature and truncation.
        logit_R = jnp.take_along_axis(logits_RV, chosen_R[:, None], axis=-1)[:, 0]
        logp_R = logit_R - jax.nn.logsumexp(logits_RV, axis=-1)
        # An answer that has ended stays in its row: shapes are fixed when the loop is compiled.
        chosen_R = jnp.where(state.ended_R, PAD, chosen_R)
        state = _Samples(
            state.tokens_RT.at[:, index].set(chosen_R),
            state.scores_R + jnp.where(state.ended_R, 0.0, logp_R),
            state.ended_R | (chosen_R == EOS),
        )
        return state, chosen_R, None

    def finish(state):
        batch = rows // config.num_samples
        return Decoded(
            state.tokens_RT.reshape(batch, config.num_samples, -1),
            state.scores_R.reshape(batch, config.num_samples),
        )

    return _Rule(start, advance, lambda state, index: jnp.all(state.ended_R), finish)


def first_best(logits_RV: jax.Array) -> jax.Array:
    """Return the index of the largest logit, the first of several that tie: int32 [R]."""
    # Not argmax: on a CPU two plain reductions vectorise better.
    best_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    places_RV = jnp.broadcast_to(jnp.arange(logits_RV.shape[-1], dtype=jnp.int32), logits_RV.shape)
    last = logits_RV.shape[-1] - 1  # what a row of NaNs chooses
    return jnp.min(jnp.where(logits_RV == best_R1, places_RV, last), axis=-1)


def truncate(logits_RV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Return logits with every token outside the top k, then outside the nucleus, at -inf.

    The nucleus is the smallest set of likeliest tokens with at least `top_p` of the mass that top k
    left. Tokens that tie with the last one kept are kept too.
    """
    if 0 < top_k < logits_RV.shape[-1]:
        probs_RV = jax.nn.softmax(logits_RV, axis=-1)
        at_least_R1 = _threshold(probs_RV, jnp.ones_like(probs_RV), float(top_k))
        logits_RV = jnp.where(probs_RV >= at_least_R1, logits_RV, -jnp.inf)
    if top_p < 1.0:
        probs_RV = jax.nn.softmax(logits_RV, axis=-1)
        at_least_R1 = _threshold(probs_RV, probs_RV, top_p)
        logits_RV = jnp.where(probs_RV >= at_least_R1, logits_RV, -jnp.inf)
    return logits_RV


def _threshold(probs_RV: jax.Array, weights_RV: jax.Array, goal: float) -> jax.Array:
    """Return the largest t [R, 1] such that the weights of tokens with p >= t sum to `goal`."""
    # Non-negative floats sort like their bits, so 31 halvings find the exact float. A sort of the
    # vocabulary at every step would cost far more.
    bits_RV = jax.lax.bitcast_convert_type(probs_RV.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the sum at low reaches the goal, at high it does not
        middle = low + (high - low) // 2
        total = jnp.sum(jnp.where(bits_RV >= middle, weights_RV, 0.0), axis=-1, keepdims=True)
        enough = total >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((probs_RV.shape[0], 1), jnp.int32)
    high = jnp.full_like(low, 0x3F800001)  # just above the bits of 1.0
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


class _Beams(NamedTuple):
    open_BNT: jax.Array
    open_logp_BN: jax.Array
    ended_BNT: jax.Array
    ended_score_BN: jax.Array  # IMPOSSIBLE where no hypothesis has ended yet


def _beam(ended_B: jax.Array, config: DecodingConfig) -> _Rule:
    """Return the rule of beam search, which keeps N open and N ended hypotheses of each input.

    It stops once no open hypothesis can overtake the worst ended one. If an input has no ended
    hypothesis at the length limit, its open ones are the answer. Source: T5X's `beam_search`.
    """
    batch, n, length = ended_B.size, config.beam_size, config.max_new_tokens

    def penalty(tokens):
        return ((5.0 + tokens) / 6.0) ** config.length_penalty

    empty_BNT = jnp.full((batch, n, length), PAD, jnp.int32)
    # All beams start equal: only the first may branch, or N copies of one answer would win.
    first_logp_BN = jnp.tile(jnp.array([0.0] + [IMPOSSIBLE] * (n - 1), jnp.float32), (batch, 1))
    start = _Beams(
        empty_BNT,
        jnp.where(ended_B[:, None], IMPOSSIBLE, first_logp_BN),
        empty_BNT,
        jnp.tile(jnp.where(ended_B, 0.0, IMPOSSIBLE)[:, None], (1, n)),
    )

    def advance(state, logits_RV, index):
        vocab = logits_RV.shape[-1]
        logp_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        total_BNV = state.open_logp_BN[..., None] + logp_RV.reshape(batch, n, vocab)
        # 2N candidates: even if N of them end here, N stay open.
        logp_BC, flat_BC = jax.lax.top_k(total_BNV.reshape(batch, n * vocab), 2 * n)
        parent_BC, token_BC = flat_BC // vocab, (flat_BC % vocab).astype(jnp.int32)
        sequence_BCT = jnp.take_along_axis(state.open_BNT, parent_BC[..., None], axis=1)
        sequence_BCT = sequence_BCT.at[:, :, index].set(token_BC)
        ends_BC = token_BC == EOS

        # The best N that did not end stay open.
        open_BN, picks_BN = jax.lax.top_k(jnp.where(ends_BC, IMPOSSIBLE, logp_BC), n)
        open_BNT = jnp.take_along_axis(sequence_BCT, picks_BN[..., None], axis=1)
        parent_BN = jnp.take_along_axis(parent_BC, picks_BN, axis=1)

        # Those that did end compete with all that ended before, by penalized score.
        score_BC = jnp.where(ends_BC, logp_BC / penalty(index + 1), IMPOSSIBLE)
        pool_score = jnp.concatenate([state.ended_score_BN, score_BC], axis=1)
        pool = jnp.concatenate([state.ended_BNT, sequence_BCT], axis=1)
        ended_score_BN, best_BN = jax.lax.top_k(pool_score, n)
        ended_BNT = jnp.take_along_axis(pool, best_BN[..., None], axis=1)

        # Each row of the cache becomes that of its hypothesis's parent.
        rows_R = (jnp.arange(batch)[:, None] * n + parent_BN).reshape(-1)
        tokens_R = jnp.take_along_axis(token_BC, picks_BN, axis=1).reshape(-1)
        return _Beams(open_BNT, open_BN, ended_BNT, ended_score_BN), tokens_R, rows_R

    def done(state, index):
        # Log-likelihoods only fall. An open one reaches at most its present value under the largest
        # penalty.
        reach_B = state.open_logp_BN[:, 0] / penalty(length)
        worst_B = jnp.min(state.ended_score_BN, axis=1)
        return jnp.all(worst_B > reach_B)

    def finish(state):
        any_B = jnp.max(state.ended_score_BN, axis=1) > IMPOSSIBLE
        return Decoded(
            jnp.where(any_B[:, None, None], state.ended_BNT, state.open_BNT),
            jnp.where(any_B[:, None], state.ended_score_BN, state.open_logp_BN / penalty(length)),
        )

    return _Rule(start, advance, done, finish)
