"""Generate tokens from a step function: greedy, sampling and beam search in one cached loop.

`decode` runs the loop. A rule (`_sampling` or one of `_BEAM_SEARCHES`) chooses tokens from each
step's logits. Before it, `_Constraints` removes those that may not follow.
Rows are [R] = [B * N]: N samples or beams of each of B inputs, neighbours in memory.
Suffixes: R rows, B inputs, N beams or samples, C beam candidates, P ended hypotheses kept,
V vocabulary. Of tokens: T written, D of a forced prefix, S of the context, K banned.
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SpecialIds

IMPOSSIBLE = -1.0e7  # a log-probability that no real hypothesis reaches; T5X's NEG_INF
SEARCHES = ("t5x", "parlai", "huggingface")
MAX_NGRAM = 8  # of blocked n-grams whose size is an array, in tokens


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to generate. The defaults are greedy.

    `temperature=0` takes the likeliest token. Above 0, `num_samples` answers a record are sampled,
    from the `top_k` likeliest tokens (0: all) and the nucleus of mass `top_p` (Holtzman et al.
    2020).

    `beam_size > 1` searches instead, as `search` names it. The searches rank ended answers
    by log-likelihood over a length penalty, and differ in it and in when they stop. Lengths count
    the new tokens with EOS:

    - "t5x": ((5 + length) / 6) ** length_penalty (Wu et al. 2016); stops when nothing can improve.
    - "parlai": ((2 + length) / 6) ** length_penalty; stops when `beam_size` answers have ended, of
      which one was the likeliest of its step.
    - "huggingface": length ** length_penalty; stops when `beam_size` answers have ended and the
      open ones look no better. With `early_stopping` it stops as soon as they have ended.

    The other fields limit the tokens, for greedy answers, samples and every search. They change no
    score but by what they forbid: probabilities are not normalized again.

    - `min_length`: tokens before EOS may be taken. ParlAI ignores its own in greedy search; here it
      holds there too.
    - `block_ngram`: no n-gram of so many tokens occurs twice in an answer, its forced prefix and
      its start token included.
    - `context_block_ngram`: no n-gram of the input, its EOS included, occurs in an answer.
    - `banned_ids`: these tokens are never taken.
    - `forced_eos`: the last of `max_new_tokens` is EOS, as with HuggingFace's
      `forced_eos_token_id`, and costs nothing.

    If they leave no token at all, EOS is taken.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1
    beam_size: int = 1
    length_penalty: float = 0.6
    search: str = "t5x"
    early_stopping: bool = False
    min_length: int = 0
    block_ngram: int = 0
    context_block_ngram: int = 0
    banned_ids: tuple[int, ...] = ()
    forced_eos: bool = False

    def __post_init__(self):
        # A config is hashed as the key of compiled programs; gin gives lists.
        object.__setattr__(self, "banned_ids", _token_ids(self.banned_ids))
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < math.inf, "0 (greedy) or above, and finite"),
            "top_k": (self.top_k >= 0, "0 (off) or above"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "beam_size": (self.beam_size >= 1, "at least 1"),
            "length_penalty": (0.0 <= self.length_penalty < math.inf, "0 or above, and finite"),
            "search": (self.search in SEARCHES, f"one of {', '.join(SEARCHES)}"),
            "min_length": (
                0 <= self.min_length < self.max_new_tokens,
                f"0 (off) or above, and below max_new_tokens={self.max_new_tokens}",
            ),
            "block_ngram": (self.block_ngram >= 0, "0 (off) or above"),
            "context_block_ngram": (self.context_block_ngram >= 0, "0 (off) or above"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                macro = "BEAM_SEARCH" if name == "search" else name.upper()
                raise UserError(
                    f"DecodingConfig.{name}={getattr(self, name)}; it must be {rule}", setting=macro
                )
        if self.beam_size > 1 and (self.temperature > 0.0 or self.num_samples > 1):
            raise UserError(
                "beam search is deterministic: beam_size > 1 cannot go with temperature > 0"
                " or num_samples > 1"
            )
        if self.beam_size > 1 and self.early_stopping and self.search != "huggingface":
            raise UserError(
                f"early_stopping=True and search={self.search!r}: it is the end rule of search="
                "'huggingface' alone",
                setting="BEAM_SEARCH",
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
        """Return the config of some fields by name; UserError for a name that is not a field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}; known are {sorted(known)}")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """Return the fields as JSON values, the later ones only where they are not the defaults."""
        # So that an output which was begun before they existed can be continued.
        later = ("search", "early_stopping", "min_length", "block_ngram", "context_block_ngram")
        later = (*later, "banned_ids", "forced_eos")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in fields}
        kept = {n: v for n, v in values.items() if n not in later or v != fields[n]}
        if self.banned_ids:
            kept["banned_ids"] = list(self.banned_ids)
        return kept

    @property
    def rows_per_input(self) -> int:
        """The number of rows that the loop carries for each input: beams or samples."""
        return max(self.beam_size, self.num_samples)

    def check(self, vocab_size: int, special: SpecialIds, max_positions: int | None) -> None:
        """Raise UserError if a network of these facts cannot generate so.

        A banned id must be in the vocabulary and no EOS, and an answer must fit the positions.
        """
        if max_positions is not None and self.max_new_tokens > max_positions:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens}; this network has {max_positions} "
                "positions: give at most so many",
                setting="MAX_NEW_TOKENS",
            )
        for id in self.banned_ids:
            if id >= vocab_size:
                raise UserError(
                    f"banned_ids has {id}; ids of this vocabulary are 0 to {vocab_size - 1}",
                    setting="BANNED_IDS",
                )
            if id == special.eos:
                raise UserError(
                    f"banned_ids has {id}, which ends an answer; for long answers set min_length",
                    setting="BANNED_IDS",
                )


def _token_ids(ids: Any) -> tuple[int, ...]:
    with contextlib.suppress(TypeError):
        found = tuple(map(operator.index, ids))
        if all(id >= 0 for id in found):
            return found
    raise UserError(
        f"DecodingConfig.banned_ids={ids!r}; it must be token ids, such as (3, 8004)",
        setting="BANNED_IDS",
    )


class Decoded(NamedTuple):
    """Tokens int32 [B, N, T] with padding after the first EOS, and scores float32 [B, N].

    A score is the log-likelihood in nats, EOS included. With a beam it is divided by the length
    penalty, and beams are sorted, the best first. ParlAI's search gives 2 * N of them, because more
    than N may have ended. In a place without a hypothesis the score is at most IMPOSSIBLE / 10.
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
    """How to choose tokens: a state and functions of it. L is R for samples, B for beams."""

    start: Any  # arrays [L, ...]
    # (state, logits_RV, index) -> (state, tokens_R for the next step, parents_R or None)
    advance: Callable
    done: Callable  # (state, index) -> bool [L]: this row or input is finished
    finish: Callable  # state -> Decoded
    # Whether further steps could change the state of what is done, and so must not.
    freezes: bool = False


def decode(
    step: Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]],
    cache: Cache,
    batch_size: int,
    config: DecodingConfig,
    row_keys_B: jax.Array | None = None,
    first_B: jax.Array | None = None,
    ended_B: jax.Array | None = None,
    special: SpecialIds = SpecialIds(),
    prefix_BD: jax.Array | None = None,
    context_BS: jax.Array | None = None,
) -> Decoded:
    """Return up to `max_new_tokens` tokens for each of `batch_size` inputs.

    `step(tokens_R, index, cache) -> (logits_RV, cache)` gets the tokens at position `index` and
    scores the ones after. `row_keys_B` are random keys, one an input. `first_B` are the tokens at
    position 0: by default `special.start`; others for a cache that holds what came before. Inputs
    of which `ended_B` holds get an empty answer of score 0.

    `prefix_BD` are tokens with which an input's answers begin, however unlikely: int32, padded at
    the end with 0, without EOS. The result does not repeat them: its tokens, scores and lengths,
    `max_new_tokens` and `min_length` are of what follows. The cache needs D + max_new_tokens
    positions. `context_BS` are the tokens, padded with 0, whose n-grams `context_block_ngram`
    blocks.
    """
    n = config.rows_per_input
    first_B = jnp.full((batch_size,), special.start, jnp.int32) if first_B is None else first_B
    ended_B = jnp.zeros((batch_size,), bool) if ended_B is None else ended_B
    # Once, before the loop: the encoder ran for B inputs, not for B * N rows.
    if n > 1:
        cache = cache.repeat(n)
    first_R = jnp.repeat(first_B, n)
    limits = _Constraints(config, special, first_R, prefix_BD, context_BS)
    if config.beam_size > 1:
        rule = _BEAM_SEARCHES[config.search](ended_B, config, special, limits)
    else:
        if config.temperature > 0.0:
            if row_keys_B is None:
                raise ValueError("sampling needs row_keys: one random key an input")
            # Randomness is a function of an input's key and the position, so that an answer does
            # not depend on the batch that its row is in.
            keys = jax.vmap(lambda key: jax.random.split(key, n))(row_keys_B)
            row_keys_B = keys.reshape(batch_size * n)
        rule = _sampling(jnp.repeat(ended_B, n), config, special, limits, row_keys_B)

    def finished(state, index):
        done_L = rule.done(state, index)
        if limits.prefix_lengths_B is None:
            return done_L
        # Rows with a shorter prefix reach their limit earlier.
        over_B = index - limits.prefix_lengths_B >= config.max_new_tokens
        return done_L | jnp.repeat(over_B, done_L.size // batch_size)

    def body(carry):
        index, tokens_R, cache, state = carry
        logits_RV, cache = step(tokens_R, index, cache)
        new_state, tokens_R, parents_R = rule.advance(state, logits_RV, index)
        if rule.freezes or limits.prefix_lengths_B is not None:
            new_state = _keep(finished(state, index), state, new_state)
        if parents_R is not None:
            cache = cache.take(parents_R)
        return index + 1, tokens_R, cache, new_state

    def cond(carry):
        index, _, _, state = carry
        return (index < limits.positions) & ~jnp.all(finished(state, index))

    *_, state = jax.lax.while_loop(cond, body, (jnp.int32(0), first_R, cache, rule.start))
    found = rule.finish(state)
    return found._replace(tokens=limits.without_prefix(found.tokens))


def _keep(kept_L: jax.Array, old: Any, new: Any) -> Any:
    """Return the old state where `kept_L`, else the new one."""

    def choose(before, after):
        return jnp.where(kept_L.reshape(-1, *[1] * (before.ndim - 1)), before, after)

    return jax.tree.map(choose, old, new)


class _Constraints:
    """The limits on a row's next token. Without any, nothing is traced.

    `positions` is the longest an answer gets, the batch's longest prefix included.
    """

    def __init__(self, config: DecodingConfig, special: SpecialIds, first_R, prefix_BD, context_BS):
        c = config
        rows = c.rows_per_input
        self.config, self.eos, self.first_R = config, special.eos, first_R
        self.prefix_lengths_B = self._prefix_lengths_R = None
        self.positions = c.max_new_tokens
        if prefix_BD is not None and prefix_BD.shape[1]:
            self._prefix_RD = jnp.repeat(prefix_BD, rows, axis=0)
            self.prefix_lengths_B = jnp.sum(prefix_BD != 0, axis=1, dtype=jnp.int32)
            self._prefix_lengths_R = jnp.repeat(self.prefix_lengths_B, rows)
            self.positions += prefix_BD.shape[1]
        if c.context_block_ngram and context_BS is None:
            raise ValueError("context_block_ngram needs context_BS")
        self._context_RS = jnp.repeat(context_BS, rows, axis=0) if c.context_block_ngram else None
        self._bans = c.min_length or c.block_ngram or c.context_block_ngram or c.banned_ids
        self._forces = c.forced_eos or self.prefix_lengths_B is not None
        self.active = bool(self._bans or self._forces)

    def lengths(self, index: jax.Array) -> jax.Array:
        """Return the length of answers that the token at `index` ends: a scalar, or [B, 1]."""
        if self.prefix_lengths_B is None:
            return index + 1
        # In the prefix an answer has no length, and no penalty may be NaN.
        return jnp.maximum(index + 1 - self.prefix_lengths_B, 1)[:, None]

    def without_prefix(self, tokens_BPT: jax.Array) -> jax.Array:
        """Return the tokens after each input's prefix: int32 [B, P, max_new_tokens]."""
        if self.prefix_lengths_B is None:
            return tokens_BPT
        places_BT = self.prefix_lengths_B[:, None] + jnp.arange(self.config.max_new_tokens)
        return jnp.take_along_axis(tokens_BPT, places_BT[:, None], axis=2)

    def forced(self, index: jax.Array) -> jax.Array | None:
        """Return whether a row's next token is given, and so counts nothing: bool [R], or None."""
        if not self._forces:
            return None
        new_R = self._new(index)
        last = self.config.max_new_tokens - 1
        return (new_R < 0) | (new_R == last) if self.config.forced_eos else new_R < 0

    def apply(self, scores_RV: jax.Array, tokens: jax.Array, index: jax.Array) -> jax.Array:
        """Return the scores, logits or log-probabilities, with tokens that may not follow at -inf.

        Where the next token is given, it has 0 and all others -inf. `tokens` [R, T] or [B, N, T]
        are those written before `index`.
        """
        c, vocab = self.config, scores_RV.shape[-1]
        if self._bans:
            tokens_RT = tokens.reshape(-1, self.positions)
            ids = jnp.array(c.banned_ids, jnp.int32)
            scores_RV = without_banned(
                scores_RV,
                Bans(
                    jnp.broadcast_to(ids, (tokens_RT.shape[0], ids.size)),
                    c.min_length,
                    c.block_ngram,
                    c.context_block_ngram,
                ),
                tokens_RT,
                self.first_R,
                jnp.broadcast_to(index, self.first_R.shape),
                self._new(index),
                self._context_RS,
                self.eos,
            )
        if self._forces:
            given_R = jnp.full_like(self.first_R, self.eos)
            if self._prefix_lengths_R is not None:
                last = self._prefix_RD.shape[1] - 1
                token_R = self._prefix_RD[:, jnp.minimum(index, last)]
                given_R = jnp.where(index < self._prefix_lengths_R, token_R, given_R)
            given_RV = jnp.where(given_R[:, None] == jnp.arange(vocab), 0.0, -jnp.inf)
            scores_RV = jnp.where(self.forced(index)[:, None], given_RV, scores_RV)
        return scores_RV

    def _new(self, index: jax.Array) -> jax.Array:
        """Return how many new tokens rows have before the one at `index`: int32 [R]."""
        if self._prefix_lengths_R is None:
            return jnp.broadcast_to(index, self.first_R.shape)
        return index - self._prefix_lengths_R


class Bans(NamedTuple):
    """Limits of `DecodingConfig` on the next token: numbers for all rows, or arrays [R].

    The number 0 traces nothing. In an array it means no limit too.
    """

    ids_RK: jax.Array  # never taken; an id of V or above is ignored
    min_length: int | jax.Array
    block_ngram: int | jax.Array
    context_block_ngram: int | jax.Array


def without_banned(
    scores_RV: jax.Array,
    bans: Bans,
    tokens_RT: jax.Array,
    first_R: jax.Array,
    index_R: jax.Array,
    new_R: jax.Array,
    context_RS: jax.Array | None,
    eos: int,
) -> jax.Array:
    """Return the scores with tokens that may not follow at -inf; EOS stays where none is left.

    Rows have `index_R` `tokens_RT` after their start tokens `first_R`, and `new_R` of them are
    after the forced prefix. `context_RS` are the inputs, 0 where they are padded.
    """
    vocab = scores_RV.shape[-1]
    banned = [bans.ids_RK]
    if _is_limit(bans.min_length):
        banned.append(jnp.where(new_R < bans.min_length, eos, vocab)[:, None])
    # The answer with its start token, as ParlAI and HuggingFace look at it.
    answer_RT = jnp.concatenate([first_R[:, None], tokens_RT], axis=1)
    if _is_limit(bans.block_ngram):
        written_RT = jnp.arange(answer_RT.shape[1]) <= index_R[:, None]
        banned.append(
            _completing(answer_RT, index_R, bans.block_ngram, answer_RT, written_RT, vocab)
        )
    if _is_limit(bans.context_block_ngram):
        # Without padding, which may be longer in another batch.
        real_RS = context_RS != 0
        banned.append(
            _completing(answer_RT, index_R, bans.context_block_ngram, context_RS, real_RS, vocab)
        )
    allowed_RV = jax.vmap(without)(scores_RV, jnp.concatenate(banned, axis=1))
    stuck_R1 = jnp.max(allowed_RV, axis=-1, keepdims=True) <= IMPOSSIBLE
    return jnp.where(stuck_R1 & (jnp.arange(vocab) == eos), scores_RV, allowed_RV)


def _is_limit(number: int | jax.Array) -> bool:
    return not isinstance(number, int) or number > 0


def without(scores_V: jax.Array, ids_K: jax.Array) -> jax.Array:
    """Return scores [V] with the ids `ids_K` at -inf."""
    return scores_V.at[ids_K].set(-jnp.inf, mode="drop")  # an id of V or above is ignored


def _completing(answer_RT, index_R, size, source_RS, real_RS, vocab: int) -> jax.Array:
    """Return the last tokens of the source's n-grams that begin as the answer ends: int32 [R, S].

    `size` is n, one for all rows or an array [R], 0 for none. Answers are written up to `index_R`,
    sources where `real_RS`. `vocab` stands for n-grams that begin otherwise.
    """
    longest = size if isinstance(size, int) else MAX_NGRAM
    size_R1 = jnp.broadcast_to(size, index_R.shape)[:, None]
    before_R1 = size_R1 - 1  # tokens of an n-gram before its last
    # If the source or the answer is shorter than that, no n-gram can end here.
    same_RS = real_RS & (jnp.arange(source_RS.shape[1]) >= before_R1)
    same_RS &= index_R[:, None] + 1 >= before_R1
    for back in range(1, longest):
        shifted_RS = jnp.pad(source_RS, ((0, 0), (back, 0)))[:, : source_RS.shape[1]]
        place_R1 = jnp.maximum(index_R + 1 - back, 0)[:, None]
        end_R1 = jnp.take_along_axis(answer_RT, place_R1, axis=1)
        same_RS &= (shifted_RS == end_R1) | (back > before_R1)
    return jnp.where(same_RS & (size_R1 > 0), source_RS, vocab)


class _Samples(NamedTuple):
    tokens_RT: jax.Array
    scores_R: jax.Array
    ended_R: jax.Array


def _sampling(
    ended_R: jax.Array,
    config: DecodingConfig,
    special: SpecialIds,
    limits: _Constraints,
    row_keys_R: jax.Array | None,
) -> _Rule:
    """Return the rule that samples one token a row and step; greedy at `temperature=0`."""
    rows = ended_R.size
    start = _Samples(
        jnp.full((rows, limits.positions), special.pad, jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        ended_R,
    )

    def advance(state, logits_RV, index):
        allowed_RV = limits.apply(logits_RV, state.tokens_RT, index)
        if config.temperature == 0.0:
            chosen_R = first_best(allowed_RV)
        else:
            allowed_RV = truncate(allowed_RV / config.temperature, config.top_k, config.top_p)
            keys_R = jax.vmap(jax.random.fold_in, (0, None))(row_keys_R, index)
            chosen_R = draw(keys_R, allowed_RV)
        # The score is the model's own likelihood: without temperature and truncation.
        logit_R = jnp.take_along_axis(logits_RV, chosen_R[:, None], axis=-1)[:, 0]
        logp_R = logit_R - jax.nn.logsumexp(logits_RV, axis=-1)
        forced_R = limits.forced(index)
        free_R = state.ended_R if forced_R is None else state.ended_R | forced_R
        # An answer that has ended stays in its row: shapes are fixed when the loop is compiled.
        chosen_R = jnp.where(state.ended_R, special.pad, chosen_R)
        state = _Samples(
            state.tokens_RT.at[:, index].set(chosen_R),
            state.scores_R + jnp.where(free_R, 0.0, logp_R),
            state.ended_R | (chosen_R == special.eos),
        )
        return state, chosen_R, None

    def finish(state):
        batch = rows // config.num_samples
        return Decoded(
            state.tokens_RT.reshape(batch, config.num_samples, -1),
            state.scores_R.reshape(batch, config.num_samples),
        )

    return _Rule(start, advance, lambda state, index: state.ended_R, finish)


def first_best(logits_RV: jax.Array) -> jax.Array:
    """Return the index of the largest logit, the first of several that tie: int32 [R]."""
    # Not argmax: on a CPU two plain reductions vectorise better.
    best_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    places_RV = jnp.broadcast_to(jnp.arange(logits_RV.shape[-1], dtype=jnp.int32), logits_RV.shape)
    last = logits_RV.shape[-1] - 1  # what a row of NaNs chooses
    return jnp.min(jnp.where(logits_RV == best_R1, places_RV, last), axis=-1)


_BLOCK = 256  # tokens whose probabilities `draw` adds up first


def draw(keys_R: jax.Array, logits_RV: jax.Array) -> jax.Array:
    """Return a token a row, drawn with the probabilities of a softmax over its logits: int32 [R].

    The inverse of the cumulative distribution, at one uniform number a row.
    """
    # jax.random.categorical draws a number for every token of the vocabulary. On a CPU that took 57
    # ms of 32 rows and 32,128 tokens (AMD EPYC), this takes 2.
    vocab = logits_RV.shape[-1]
    count = -(-vocab // _BLOCK)
    weights_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=-1, keepdims=True))
    weights_RV = jnp.pad(weights_RV, ((0, 0), (0, count * _BLOCK - vocab)))
    weights_RNK = weights_RV.reshape(-1, count, _BLOCK)
    # First the block, then the token in it: a sum of 32,128 terms would round away small ones.
    until_RN = jnp.cumsum(jnp.sum(weights_RNK, axis=-1), axis=-1)
    goal_R1 = jax.vmap(jax.random.uniform)(keys_R)[:, None] * until_RN[:, -1:]
    # The last block with any weight bounds it, as rounding may pass the end.
    last_R1 = jnp.sum(until_RN < until_RN[:, -1:], axis=-1, keepdims=True)
    block_R1 = jnp.minimum(jnp.sum(until_RN <= goal_R1, axis=-1, keepdims=True), last_R1)
    before_R1 = jnp.take_along_axis(jnp.pad(until_RN, ((0, 0), (1, 0))), block_R1, axis=1)
    weights_RK = jnp.take_along_axis(weights_RNK, block_R1[..., None], axis=1)[:, 0]
    until_RK = jnp.cumsum(weights_RK, axis=-1)
    within_R1 = jnp.maximum(goal_R1 - before_R1, 0.0)
    last_R1 = jnp.sum(until_RK < until_RK[:, -1:], axis=-1, keepdims=True)
    place_R1 = jnp.minimum(jnp.sum(until_RK <= within_R1, axis=-1, keepdims=True), last_R1)
    return (block_R1 * _BLOCK + place_R1)[:, 0].astype(jnp.int32)


def truncate(logits_RV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Return logits with every token outside the top k, then outside the nucleus, at -inf.

    The nucleus is the smallest set of likeliest tokens with at least `top_p` of the mass that top k
    left. Tokens that tie with the last one kept are kept too.
    """
    if 0 < top_k < logits_RV.shape[-1]:
        logits_RV = _top_k(logits_RV, top_k)
    return _nucleus(logits_RV, top_p) if top_p < 1.0 else logits_RV


def truncate_rows(logits_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
    """Return what `truncate` does, with settings of their own for every row.

    Work that no row asks for is left out when the function runs.
    """
    by_k_R, by_p_R = (top_k_R > 0) & (top_k_R < logits_RV.shape[-1]), top_p_R < 1.0

    for cut, by_R, goal_R in ((_top_k, by_k_R, top_k_R), (_nucleus, by_p_R, top_p_R)):

        def cut_rows(logits_RV, cut=cut, by_R=by_R, goal_R=goal_R):
            return jnp.where(by_R[:, None], cut(logits_RV, goal_R[:, None]), logits_RV)

        logits_RV = jax.lax.cond(jnp.any(by_R), cut_rows, lambda logits: logits, logits_RV)
    return logits_RV


def _top_k(logits_RV: jax.Array, top_k: int | jax.Array) -> jax.Array:
    probs_RV = jax.nn.softmax(logits_RV, axis=-1)
    return jnp.where(
        probs_RV >= _threshold(probs_RV, jnp.ones_like(probs_RV), top_k), logits_RV, -jnp.inf
    )


def _nucleus(logits_RV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    probs_RV = jax.nn.softmax(logits_RV, axis=-1)
    return jnp.where(probs_RV >= _threshold(probs_RV, probs_RV, top_p), logits_RV, -jnp.inf)


def _threshold(probs_RV: jax.Array, weights_RV: jax.Array, goal: float | jax.Array) -> jax.Array:
    """Return the largest t [R, 1] such that the weights of tokens with p >= t sum to `goal`.

    `goal` is one number, or [R, 1].
    """
    # Non-negative floats sort like their bits, so 31 halvings find the exact float. A sort of the
    # vocabulary at every step would cost far more.
    goal_R1 = jnp.broadcast_to(jnp.asarray(goal, jnp.float32), (probs_RV.shape[0], 1))

    def all_rows(probs_RV, weights_RV, goal_R1):
        bits_RV = jax.lax.bitcast_convert_type(probs_RV.astype(jnp.float32), jnp.int32)

        def halve(_, bounds):
            low, high = bounds  # the sum at low reaches the goal, at high it does not
            middle = low + (high - low) // 2
            total = jnp.sum(jnp.where(bits_RV >= middle, weights_RV, 0.0), axis=-1, keepdims=True)
            enough = total >= goal_R1
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low = jnp.zeros((probs_RV.shape[0], 1), jnp.int32)
        high = jnp.full_like(low, 0x3F800001)  # just above the bits of 1.0
        low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
        return jax.lax.bitcast_convert_type(low, jnp.float32)

    def row_by_row(*arrays):
        # One row at a time stays in a CPU's cache: half the time of all rows (AMD EPYC, 32 rows).
        one = jax.lax.map(lambda row: all_rows(*(x[None] for x in row)), arrays)
        return one[:, 0]

    return jax.lax.platform_dependent(
        probs_RV, weights_RV, goal_R1, cpu=row_by_row, default=all_rows
    )


class _Beams(NamedTuple):
    open_BNT: jax.Array
    open_logp_BN: jax.Array
    ended_BNT: jax.Array
    ended_score_BN: jax.Array  # IMPOSSIBLE where no hypothesis has ended yet


def _candidates(open_BNT, open_logp_BN, logp_RV, index, count: int):
    """Return the `count` likeliest extensions of each input's open hypotheses.

    They are (log-likelihoods [B, C], beams they extend [B, C], tokens [B, C], sequences [B, C, T]).
    """
    batch, n, _ = open_BNT.shape
    vocab = logp_RV.shape[-1]
    total_BNV = open_logp_BN[..., None] + logp_RV.reshape(batch, n, vocab)
    logp_BC, flat_BC = jax.lax.top_k(total_BNV.reshape(batch, n * vocab), count)
    parent_BC, token_BC = flat_BC // vocab, (flat_BC % vocab).astype(jnp.int32)
    sequence_BCT = jnp.take_along_axis(open_BNT, parent_BC[..., None], axis=1)
    return logp_BC, parent_BC, token_BC, sequence_BCT.at[:, :, index].set(token_BC)


def _best(pool_score_BP, pool_BPT, score_BC, sequence_BCT):
    """Return the P best of the pool and the candidates: (scores [B, P], sequences [B, P, T])."""
    score = jnp.concatenate([pool_score_BP, score_BC], axis=1)
    sequence = jnp.concatenate([pool_BPT, sequence_BCT], axis=1)
    score_BP, best_BP = jax.lax.top_k(score, pool_score_BP.shape[1])
    return score_BP, jnp.take_along_axis(sequence, best_BP[..., None], axis=1)


def _rows(parent_BN: jax.Array) -> jax.Array:
    """Return the row of each beam's parent: int32 [R]."""
    batch, n = parent_BN.shape
    return (jnp.arange(batch)[:, None] * n + parent_BN).reshape(-1)


def _t5x_beams(
    ended_B: jax.Array, config: DecodingConfig, special: SpecialIds, limits: _Constraints
) -> _Rule:
    """Return the rule of T5X's search, which keeps N open and N ended hypotheses of each input.

    It stops once no open hypothesis can overtake the worst ended one. If an input has no ended
    hypothesis at the length limit, its open ones are the answer. Source: T5X's `beam_search`.
    """
    batch, n, longest = ended_B.size, config.beam_size, config.max_new_tokens

    def penalty(tokens):
        return ((5.0 + tokens) / 6.0) ** config.length_penalty

    empty_BNT = jnp.full((batch, n, limits.positions), special.pad, jnp.int32)
    # All beams start equal: only the first may branch, or N copies of one answer would win.
    first_logp_BN = jnp.tile(jnp.array([0.0] + [IMPOSSIBLE] * (n - 1), jnp.float32), (batch, 1))
    start = _Beams(
        empty_BNT,
        jnp.where(ended_B[:, None], IMPOSSIBLE, first_logp_BN),
        empty_BNT,
        jnp.tile(jnp.where(ended_B, 0.0, IMPOSSIBLE)[:, None], (1, n)),
    )

    def advance(state, logits_RV, index):
        logp_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        logp_RV = limits.apply(logp_RV, state.open_BNT, index)
        # 2N candidates: even if N of them end here, N stay open.
        logp_BC, parent_BC, token_BC, sequence_BCT = _candidates(
            state.open_BNT, state.open_logp_BN, logp_RV, index, 2 * n
        )
        ends_BC = token_BC == special.eos

        # The best N that did not end stay open.
        open_BN, picks_BN = jax.lax.top_k(jnp.where(ends_BC, IMPOSSIBLE, logp_BC), n)
        open_BNT = jnp.take_along_axis(sequence_BCT, picks_BN[..., None], axis=1)
        parent_BN = jnp.take_along_axis(parent_BC, picks_BN, axis=1)

        # Those that did end compete with all that ended before, by penalized score.
        if limits.active:
            # With few tokens left, copies of the first beam are candidates too, and their penalized
            # score would pass IMPOSSIBLE.
            ends_BC &= logp_BC > IMPOSSIBLE / 2
        score_BC = jnp.where(ends_BC, logp_BC / penalty(limits.lengths(index)), IMPOSSIBLE)
        ended_score_BN, ended_BNT = _best(
            state.ended_score_BN, state.ended_BNT, score_BC, sequence_BCT
        )
        # Each row of the cache becomes that of its hypothesis's parent.
        tokens_R = jnp.take_along_axis(token_BC, picks_BN, axis=1).reshape(-1)
        return _Beams(open_BNT, open_BN, ended_BNT, ended_score_BN), tokens_R, _rows(parent_BN)

    def done(state, index):
        # Log-likelihoods only fall. An open one reaches at most its present value under the largest
        # penalty.
        reach_B = state.open_logp_BN[:, 0] / penalty(longest)
        worst_B = jnp.min(state.ended_score_BN, axis=1)
        return worst_B > reach_B

    def finish(state):
        any_B = jnp.max(state.ended_score_BN, axis=1) > IMPOSSIBLE
        return Decoded(
            jnp.where(any_B[:, None, None], state.ended_BNT, state.open_BNT),
            jnp.where(any_B[:, None], state.ended_score_BN, state.open_logp_BN / penalty(longest)),
        )

    return _Rule(start, advance, done, finish)


class _Search(NamedTuple):
    """The state of ParlAI's and HuggingFace's searches: -inf where there is no hypothesis."""

    open_BNT: jax.Array
    open_logp_BN: jax.Array
    ended_BPT: jax.Array
    ended_score_BP: jax.Array
    ended_count_B: jax.Array
    stopped_B: jax.Array


def _start_search(ended_B: jax.Array, n: int, kept: int, positions: int, pad: int) -> _Search:
    batch = ended_B.size
    first_BN = jnp.tile(jnp.array([0.0] + [-jnp.inf] * (n - 1), jnp.float32), (batch, 1))
    return _Search(
        jnp.full((batch, n, positions), pad, jnp.int32),
        first_BN,
        jnp.full((batch, kept, positions), pad, jnp.int32),
        jnp.tile(jnp.where(ended_B, 0.0, -jnp.inf)[:, None], (1, kept)),
        jnp.where(ended_B, n, 0),
        ended_B,
    )


def _found(state: _Search, pad: int) -> Decoded:
    """Return the ended hypotheses; padding and IMPOSSIBLE where there are fewer."""
    real_BP = state.ended_score_BP > -jnp.inf
    return Decoded(
        jnp.where(real_BP[..., None], state.ended_BPT, pad),
        jnp.where(real_BP, state.ended_score_BP, IMPOSSIBLE),
    )


def _parlai_beams(
    ended_B: jax.Array, config: DecodingConfig, special: SpecialIds, limits: _Constraints
) -> _Rule:
    """Return the rule of ParlAI's search, in which ended hypotheses use up places of their step.

    N candidates are taken at a step. One that ends leaves N - 1 open ones to the next step, which
    takes N candidates of these. The search stops once N have ended and the likeliest candidate of
    some step was among them. If none has ended at the length limit, the likeliest open one gets EOS
    for its last token. The 2N best of all that ended are kept. Source: `TreeSearch` and
    `BeamSearch` of ParlAI 1.7.
    """
    batch, n, longest = ended_B.size, config.beam_size, config.max_new_tokens
    start = _start_search(ended_B, n, 2 * n, limits.positions, special.pad)

    def penalty(tokens):
        # ParlAI counts the start token too, and 1 where Wu et al. have 5.
        return ((2.0 + tokens) / 6.0) ** config.length_penalty

    def advance(state, logits_RV, index):
        logp_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        logp_RV = limits.apply(logp_RV, state.open_BNT, index)
        logp_BN, parent_BN, token_BN, open_BNT = _candidates(
            state.open_BNT, state.open_logp_BN, logp_RV, index, n
        )
        ends_BN = (token_BN == special.eos) & (logp_BN > IMPOSSIBLE)
        score_BN = jnp.where(ends_BN, logp_BN / penalty(limits.lengths(index)), -jnp.inf)
        ended_score_BP, ended_BPT = _best(state.ended_score_BP, state.ended_BPT, score_BN, open_BNT)
        state = _Search(
            open_BNT,
            jnp.where(token_BN == special.eos, -jnp.inf, logp_BN),
            ended_BPT,
            ended_score_BP,
            state.ended_count_B + jnp.sum(ends_BN, axis=1, dtype=jnp.int32),
            state.stopped_B | ends_BN[:, 0],
        )
        return state, token_BN.reshape(-1), _rows(parent_BN)

    def done(state, index):
        return state.stopped_B & (state.ended_count_B >= n)

    def finish(state):
        none_B = state.ended_count_B == 0
        last = longest - 1
        if limits.prefix_lengths_B is not None:
            last = last + limits.prefix_lengths_B
        forced_BT = state.open_BNT[:, 0].at[jnp.arange(batch), last].set(special.eos)
        tokens_BPT, score_BP = state.ended_BPT, state.ended_score_BP
        score_B = jnp.where(none_B, state.open_logp_BN[:, 0] / penalty(longest), score_BP[:, 0])
        tokens_BT = jnp.where(none_B[:, None], forced_BT, tokens_BPT[:, 0])
        state = state._replace(
            ended_BPT=tokens_BPT.at[:, 0].set(tokens_BT),
            ended_score_BP=score_BP.at[:, 0].set(score_B),
        )
        return _found(state, special.pad)

    return _Rule(start, advance, done, finish, freezes=True)


def _huggingface_beams(
    ended_B: jax.Array, config: DecodingConfig, special: SpecialIds, limits: _Constraints
) -> _Rule:
    """Return the rule of HuggingFace's search, which keeps N open and N ended hypotheses.

    2N candidates are taken at a step; of those that end, only ones among the N likeliest count. At
    the length limit open ones count as ended. With `early_stopping` it stops once N have ended.
    Without, the likeliest open one must also score no better than the worst of them, at its present
    length. Source: `GenerationMixin._beam_search` of transformers 5.
    """
    n, longest = config.beam_size, config.max_new_tokens
    start = _start_search(ended_B, n, n, limits.positions, special.pad)

    def advance(state, logits_RV, index):
        logp_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        logp_RV = limits.apply(logp_RV, state.open_BNT, index)
        logp_BC, parent_BC, token_BC, sequence_BCT = _candidates(
            state.open_BNT, state.open_logp_BN, logp_RV, index, 2 * n
        )
        lengths = limits.lengths(index)
        penalty = lengths**config.length_penalty
        ends_BC = (token_BC == special.eos) | (lengths >= longest)

        open_logp_BN, picks_BN = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, logp_BC), n)
        open_BNT = jnp.take_along_axis(sequence_BCT, picks_BN[..., None], axis=1)
        parent_BN = jnp.take_along_axis(parent_BC, picks_BN, axis=1)

        counts_BC = ends_BC & (jnp.arange(2 * n) < n) & (logp_BC > IMPOSSIBLE)
        score_BC = jnp.where(counts_BC, logp_BC / penalty, -jnp.inf)
        ended_score_BN, ended_BNT = _best(
            state.ended_score_BP, state.ended_BPT, score_BC, sequence_BCT
        )
        worst_B = jnp.min(ended_score_BN, axis=1)
        stopped_B = worst_B > -jnp.inf
        if not config.early_stopping:
            stopped_B &= (open_logp_BN / penalty)[:, 0] <= worst_B
        state = _Search(
            open_BNT, open_logp_BN, ended_BNT, ended_score_BN, state.ended_count_B, stopped_B
        )
        tokens_R = jnp.take_along_axis(token_BC, picks_BN, axis=1).reshape(-1)
        return state, tokens_R, _rows(parent_BN)

    return _Rule(
        start,
        advance,
        lambda state, index: state.stopped_B,
        lambda state: _found(state, special.pad),
        freezes=True,
    )


_BEAM_SEARCHES = {
    "t5x": _t5x_beams,
    "parlai": _parlai_beams,
    "huggingface": _huggingface_beams,
}
