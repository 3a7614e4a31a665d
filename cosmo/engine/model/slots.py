"""Decode many answers in one pool of rows, which begin and end at different steps.

A pool has R rows. `encode` runs the encoder over new inputs, and `insert` puts one of them into a
free row. `step` scores the next token of each of the first rows, and `choose` takes one. All are
pure functions of arrays, and their shapes do not depend on what the rows hold.

Every row writes its keys and values of a step at the same place of the cache, `clock` modulo T: a
ring over T positions. A key's age in steps gives its relative position, and a row masks keys older
than its own answer. So rows of any age share one step, and each row's tokens are those that
`generate.predict` would choose for it alone.

Suffixes are `decoding`'s: R rows, V vocabulary, T positions of answers, S of inputs, K banned ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmo.engine.model import decoding, models, partitioning
from cosmo.engine.model.held_params import AnyParams, decoding_module
from cosmo.engine.model.layers import mask_bias
from cosmo.engine.model.transformer import LayerCache, attend_beside

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_BANNED_IDS = 64


class RowSettings(NamedTuple):
    """The settings of one row, or with a leading axis R of all. `decoding.DecodingConfig` has most.

    `seed` and `number` give the random key: that of sample `number` of the input with this
    `infer.row_seed`. `top_logprobs` counts the likeliest tokens to return. Ids fill `banned_K` up
    with -1, and `prefix_T` with 0.
    """

    seed: np.ndarray  # uint32
    number: np.ndarray  # the others are int32, but for those marked float32
    temperature: np.ndarray  # float32
    top_k: np.ndarray
    top_p: np.ndarray  # float32
    top_logprobs: np.ndarray
    min_length: np.ndarray
    block_ngram: np.ndarray
    context_block_ngram: np.ndarray
    banned_K: np.ndarray
    prefix_T: np.ndarray
    prefix_length: np.ndarray


class Encoded(NamedTuple):
    """An input after the encoder: each decoder layer's keys [1, H, K, S], values [1, H, S, K]."""

    layers: list[tuple[jax.Array, jax.Array]]
    tokens_1S: jax.Array


class Rows(NamedTuple):
    """The part of a pool that choosing tokens reads and writes."""

    tokens_RS: jax.Array  # the inputs
    settings: RowSettings
    written_RT: jax.Array  # each row's answer so far, its prefix included
    last_R: jax.Array  # the token that the next step reads
    position_R: jax.Array  # and its position in the row's answer


class Pool(NamedTuple):
    """The state of R rows. Every array but `clock` has rows in front."""

    layers: list[LayerCache]
    rows: Rows
    clock: jax.Array  # int32 scalar: the place of the ring that the next step writes


def settings(
    longest: int,
    *,
    seed: int = 0,
    number: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    top_logprobs: int = 0,
    min_length: int = 0,
    block_ngram: int = 0,
    context_block_ngram: int = 0,
    banned_ids: tuple[int, ...] = (),
    prefix_ids: tuple[int, ...] = (),
) -> RowSettings:
    """Return the settings of a row as arrays; `longest` is the pool's T."""
    banned_K = np.full((MAX_BANNED_IDS,), -1, np.int32)
    banned_K[: len(banned_ids)] = banned_ids
    prefix_T = np.zeros((longest,), np.int32)
    prefix_T[: len(prefix_ids)] = prefix_ids
    return RowSettings(
        np.uint32(seed),
        np.int32(number),
        np.float32(temperature),
        np.int32(top_k),
        np.float32(top_p),
        np.int32(top_logprobs),
        np.int32(min_length),
        np.int32(block_ngram),
        np.int32(context_block_ngram),
        banned_K,
        prefix_T,
        np.int32(len(prefix_ids)),
    )


def empty(model: models.EncoderDecoderModel, rows: int, inputs: int, answers: int) -> Pool:
    """Return a pool of R `rows` for S tokens of `inputs` and T tokens of `answers`."""
    c = model.network
    heads = (rows, c.num_heads)
    layer = LayerCache(
        jnp.zeros((*heads, answers, c.head_dim), c.dtype),
        jnp.zeros((*heads, answers, c.head_dim), c.dtype),
        jnp.zeros((*heads, c.head_dim, inputs), c.dtype),
        jnp.zeros((*heads, inputs, c.head_dim), c.dtype),
    )
    one = settings(answers)
    # Arrays of their own: the pool is donated to each step, and no array may be given twice.
    layers = [jax.tree.map(jnp.copy, layer) for _ in range(c.num_decoder_layers)]
    state = Rows(
        jnp.zeros((rows, inputs), jnp.int32),
        jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *np.shape(x))), one),
        jnp.zeros((rows, answers), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
    )
    return Pool(layers, state, jnp.int32(0))


def pool_shardings(layout: partitioning.Layout, pool: Pool) -> Pool:
    """Return the sharding of every array of a pool: caches are split by heads."""

    def sharding(x):
        names = (None, "heads", None, None) if len(x.shape) == 4 else (None,) * len(x.shape)
        return layout.sharding(x.shape, names)

    return jax.tree.map(sharding, pool)


def encode(
    model: models.EncoderDecoderModel, params: AnyParams, tokens_BN: jax.Array, *, inputs: int
) -> list[Encoded]:
    """Return each input of [B, N] after the encoder, padded to a pool's S `inputs` tokens."""
    module, _ = decoding_module(model, params)
    # Zeros up to the pool's length: a NaN that an earlier input left would pass any mask.
    more = (0, inputs - tokens_BN.shape[1])
    none = (0, 0)
    layers = [
        (jnp.pad(key, (none, none, none, more)), jnp.pad(value, (none, none, more, none)))
        for key, value in module.encode_keys_values(tokens_BN)
    ]
    whole = layers, jnp.pad(tokens_BN, (none, more))
    # Apart, so that one program inserts an input, however many were encoded together.
    return [
        Encoded(*jax.tree.map(lambda x, row=row: x[row : row + 1], whole))
        for row in range(tokens_BN.shape[0])
    ]


def insert(
    model: models.EncoderDecoderModel,
    pool: Pool,
    encoded: Encoded,
    row: jax.Array,
    row_settings: RowSettings,
) -> Pool:
    """Return the pool with an encoded input in row `row`, before its first token."""

    def put(many, one):
        return jax.lax.dynamic_update_index_in_dim(many, one.astype(many.dtype), row, 0)

    # Zeros for the answer too: see `encode`.
    layers = [
        LayerCache(
            put(own.self_key_BHTK, jnp.zeros(own.self_key_BHTK.shape[1:])),
            put(own.self_value_BHTK, jnp.zeros(own.self_value_BHTK.shape[1:])),
            put(own.cross_key_BHKS, key[0]),
            put(own.cross_value_BHSK, value[0]),
        )
        for own, (key, value) in zip(pool.layers, encoded.layers, strict=True)
    ]
    state = pool.rows
    state = Rows(
        put(state.tokens_RS, encoded.tokens_1S[0]),
        jax.tree.map(put, state.settings, jax.tree.map(jnp.asarray, row_settings)),
        put(state.written_RT, jnp.zeros(state.written_RT.shape[1:])),
        put(state.last_R, jnp.int32(model.network.special_ids.start)),
        put(state.position_R, jnp.int32(0)),
    )
    return pool._replace(layers=layers, rows=state)


def move(pool: Pool, source: jax.Array, target: jax.Array) -> Pool:
    """Return the pool with row `source` copied to row `target`."""

    def moved(x):
        one = jax.lax.dynamic_index_in_dim(x, source, 0)
        return jax.lax.dynamic_update_index_in_dim(x, one, target, 0)

    layers, state = jax.tree.map(moved, (pool.layers, pool.rows))
    return Pool(layers, state, pool.clock)


def step(
    model: models.EncoderDecoderModel,
    params: AnyParams,
    pool: Pool,
    *,
    rows: int,
    length: int,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Read the last token of each of the first `rows` rows.

    Return (logits [rows, V] of the next one, each layer's key and value of the token, both
    [rows, H, K]), for `choose`. No row in use may be behind the first `rows`, nor have more than
    `length` tokens of input.
    """
    # The caches are only read here, and `choose` writes. In one program, XLA would copy each cache.
    module, weights = decoding_module(model, params)
    longest = pool.rows.written_RT.shape[1]
    # A row that is not in use may have passed the end.
    position_R = jnp.minimum(pool.rows.position_R[:rows], longest - 1)
    ages_T = (pool.clock - jnp.arange(longest)) % longest
    # The place that is written next has age 0 here; what it holds is older than any answer.
    past_R1T = mask_bias((ages_T > 0) & (ages_T <= position_R[:, None]))[:, None]
    biases = [bias_1HT + past_R1T for bias_1HT in module.biases_of_ages(ages_T)]
    own_biases = module.biases_of_ages(jnp.zeros((1,), jnp.int32))

    def attend(query, key, value, place):
        layer, which = (
            pool.layers[place],
            place % len(biases),
        )  # one table for all layers, or theirs
        past = layer.self_key_BHTK[:rows], layer.self_value_BHTK[:rows]
        return attend_beside(query, key, value, *past, biases[which], own_biases[which])

    inputs = [
        (layer.cross_key_BHKS[:rows, :, :, :length], layer.cross_value_BHSK[:rows, :, :length])
        for layer in pool.layers
    ]
    cross_R1S = mask_bias(pool.rows.tokens_RS[:rows, :length] > 0)[:, None]
    return module.decode_token(
        weights, pool.rows.last_R[:rows], position_R, attend, inputs, cross_R1S
    )


def choose(
    model: models.EncoderDecoderModel,
    pool: Pool,
    logits_RV: jax.Array,
    keys_values: list[tuple[jax.Array, jax.Array]],
    active_R: jax.Array,
) -> tuple[Pool, jax.Array]:
    """Choose the next token of the first rows by what `step` returned for them.

    Return (the pool with it, results [rows, 42] for `read_result`). `active_R` [R] has the rows in
    use: they alone decide which work is done, and what the others get is of no use.
    """
    state, rows = pool.rows, logits_RV.shape[0]
    longest = state.written_RT.shape[1]
    first, active_R = jax.tree.map(lambda x: x[:rows], (state, active_R))
    index_R = jnp.minimum(first.position_R, longest - 1)
    chosen_R = _choose(logits_RV, first, index_R, active_R, model.network.special_ids)
    results_RO = _results(logits_RV, chosen_R, first.settings.top_logprobs, active_R)
    here_RT = jnp.arange(longest) == index_R[:, None]
    written_RT = jnp.where(here_RT, chosen_R[:, None], first.written_RT)

    def put(many_RHTK, one_RHK):
        place = (0, 0, pool.clock, 0)
        return jax.lax.dynamic_update_slice(many_RHTK, one_RHK[:, :, None], place)

    layers = [
        layer._replace(
            self_key_BHTK=put(layer.self_key_BHTK, key),
            self_value_BHTK=put(layer.self_value_BHTK, value),
        )
        for layer, (key, value) in zip(pool.layers, keys_values, strict=True)
    ]
    state = state._replace(
        written_RT=state.written_RT.at[:rows].set(written_RT),
        last_R=state.last_R.at[:rows].set(chosen_R),
        position_R=state.position_R.at[:rows].add(1),
    )
    return Pool(layers, state, (pool.clock + 1) % longest), results_RO


def _choose(logits_RV, state: Rows, index_R, active_R, special) -> jax.Array:
    """Return each row's next token, int32 [R]. `state` has these rows alone.

    The rules are those of `decoding`; work that no active row asks for is left out.
    """
    s = state.settings
    bans_R = (s.min_length > 0) | (s.block_ngram > 0) | (s.context_block_ngram > 0)
    bans_R |= s.banned_K[:, 0] >= 0
    allowed_RV = jax.lax.cond(
        jnp.any(active_R & bans_R),
        lambda logits: _without_banned(logits, state, index_R, special),
        lambda logits: logits,
        logits_RV,
    )
    samples_R = s.temperature > 0.0

    def sample(allowed_RV):
        warm_RV = allowed_RV / jnp.where(samples_R, s.temperature, 1.0)[:, None]
        used_R = active_R & samples_R
        top_k_R, top_p_R = jnp.where(used_R, s.top_k, 0), jnp.where(used_R, s.top_p, 1.0)
        warm_RV = decoding.truncate_rows(warm_RV, top_k_R, top_p_R)
        keys_R = jax.vmap(_key)(s.seed, s.number, index_R)
        drawn_R = decoding.draw(keys_R, warm_RV)
        return jnp.where(samples_R, drawn_R, decoding.first_best(allowed_RV))

    chosen_R = jax.lax.cond(jnp.any(active_R & samples_R), sample, decoding.first_best, allowed_RV)
    last = s.prefix_T.shape[1] - 1
    forced_R = jnp.take_along_axis(s.prefix_T, jnp.minimum(index_R, last)[:, None], axis=1)[:, 0]
    return jnp.where(index_R < s.prefix_length, forced_R, chosen_R)


MAX_SAMPLES = 128  # of one input


def _key(seed: jax.Array, number: jax.Array, index: jax.Array) -> jax.Array:
    """Return the key that `decoding.decode` draws a sample's token at `index` with."""
    # Keys that are split from another do not depend on how many are.
    keys = jax.random.split(jax.random.key(seed), MAX_SAMPLES)
    return jax.random.fold_in(keys[number], index)


def _without_banned(logits_RV, state: Rows, index_R, special) -> jax.Array:
    s, vocab = state.settings, logits_RV.shape[-1]
    ids_RK = jnp.where(s.banned_K < 0, vocab, s.banned_K)
    return decoding.without_banned(
        logits_RV,
        decoding.Bans(ids_RK, s.min_length, s.block_ngram, s.context_block_ngram),
        state.written_RT,
        jnp.full_like(index_R, special.start),
        index_R,
        index_R - s.prefix_length,
        state.tokens_RS,
        special.eos,
    )


def _results(logits_RV, chosen_R, top_R, active_R) -> jax.Array:
    """Return what the host reads of a step, in one array: int32 [R, 2 + 2 * MAX_TOP_LOGPROBS].

    Columns: the token, the bits of its log-probability, then the likeliest tokens and the bits of
    theirs.
    """
    count = min(MAX_TOP_LOGPROBS, logits_RV.shape[-1])
    log_z_R = jax.nn.logsumexp(logits_RV, axis=-1)
    logp_R = jnp.take_along_axis(logits_RV, chosen_R[:, None], axis=-1)[:, 0] - log_z_R

    def likeliest(logits_RV):
        best_RN, ids_RN = jax.lax.top_k(logits_RV, count)
        bits_RN = _bits(best_RN - log_z_R[:, None])
        blank = ((0, 0), (0, MAX_TOP_LOGPROBS - count))
        return jnp.concatenate([jnp.pad(ids_RN, blank), jnp.pad(bits_RN, blank)], axis=1)

    def none(logits_RV):
        return jnp.zeros((logits_RV.shape[0], 2 * MAX_TOP_LOGPROBS), jnp.int32)

    top_RO = jax.lax.cond(jnp.any(active_R & (top_R > 0)), likeliest, none, logits_RV)
    return jnp.concatenate([chosen_R[:, None], _bits(logp_R)[:, None], top_RO], axis=1)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


class Result(NamedTuple):
    """A row's result of a step: the token, its log-probability in nats, the likeliest tokens."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def read_result(results_RO: np.ndarray, row: int, top_logprobs: int = 0) -> Result:
    """Return one row's result of `step`, with the `top_logprobs` likeliest tokens."""
    floats_O = results_RO[row].view(np.float32)
    top = [
        (int(results_RO[row, 2 + k]), float(floats_O[2 + MAX_TOP_LOGPROBS + k]))
        for k in range(top_logprobs)
    ]
    return Result(int(results_RO[row, 0]), float(floats_O[1]), tuple(top))
