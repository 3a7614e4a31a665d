"""Decoding with the cached T5, against the whole network run again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.model import decoding, generate, models
from cosmo.engine.model.decoding import DecodingConfig

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def speaker(params):
    """Parameters that end some answers: EOS is a little likelier than token 30 always."""
    logits_dense = params["decoder"]["logits_dense"]
    boosted = logits_dense.at[:, EOS].set(1.02 * logits_dense[:, 30])
    return {**params, "decoder": {**params["decoder"], "logits_dense": boosted}}


@pytest.fixture(scope="module")
def predict(model, speaker, jit):
    """`predict(inputs, config, keys=None)` -> Decoded in numpy."""
    run = jit(generate.predict, static_argnums=(0, 3))

    def call(inputs, config, keys=None):
        return jax.device_get(run(model, speaker, inputs, config, keys))

    return call


@pytest.mark.parametrize("tied", [False, True])
def test_engine_decoding_cached_steps_equal_teacher_forcing(
    model, make_params, unpacked, logits_of, jit, tied
):
    """start_cache and decode_step give the logits of the whole sequence at every position.

    Oracle: models.logits on the same tokens. Encoder rows of 3 to 11 tokens and an empty one.
    """
    if tied:
        network = dataclasses.replace(model.network, logits_via_embedding=True)
        model = dataclasses.replace(model, network=network)
    params = make_params(model)
    inputs_BT = jnp.asarray(np.random.default_rng(0).integers(2, 40, (8, 16)))
    batch = {
        "encoder_input_tokens": unpacked["encoder_input_tokens"],
        "decoder_input_tokens": inputs_BT,
        "decoder_target_tokens": jnp.ones_like(inputs_BT),
    }
    expected = logits_of(model, params, batch)

    @jit
    def stepwise(params, batch):
        module = models.bind(model, params)
        weights = module.decoder_weights()
        cache = module.start_cache(batch["encoder_input_tokens"], 16)

        def body(cache, inputs):
            index, tokens = inputs
            logits, cache = module.decode_step(weights, tokens, index, cache)
            return cache, logits

        tokens_TB = batch["decoder_input_tokens"].T
        return jax.lax.scan(body, cache, (jnp.arange(16), tokens_TB))[1]

    ours = stepwise(params, batch).swapaxes(0, 1)
    np.testing.assert_allclose(ours, expected, atol=3e-5)


def test_engine_decoding_greedy_equals_an_uncached_loop(
    model, speaker, unpacked, logits_of, predict
):
    """Greedy answers token by token. Oracle: the whole network run again for every token."""
    inputs = unpacked["encoder_input_tokens"]
    ours = predict(inputs, DecodingConfig(max_new_tokens=16))
    tokens, scores = np.zeros((8, 16), int), np.zeros(8)
    ended = np.zeros(8, bool)
    for t in range(16):
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": jnp.asarray(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]),
            "decoder_target_tokens": jnp.ones((8, 16), jnp.int32),
        }
        logits = np.asarray(logits_of(model, speaker, batch), np.float64)[:, t]
        best = np.argmax(logits, axis=-1)
        logp = np.max(logits, axis=-1) - np.log(np.sum(np.exp(logits), axis=-1))
        tokens[:, t] = np.where(ended, PAD, best)
        scores += np.where(ended, 0.0, logp)
        ended |= best == EOS
    assert 0 < np.sum(ended) < 8  # both kinds of answer
    np.testing.assert_array_equal(ours.tokens[:, 0], tokens)
    np.testing.assert_allclose(ours.scores[:, 0], scores, rtol=1e-4)


CONFIGS = {
    "greedy": DecodingConfig(max_new_tokens=16),
    "sampled": DecodingConfig(max_new_tokens=16, temperature=1.2, top_k=20, num_samples=2),
    "beam": DecodingConfig(max_new_tokens=16, beam_size=3, length_penalty=0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_decoding_scores_are_models_score(model, speaker, unpacked, predict, jit, name):
    """A generated answer's score, and padding after its EOS. Oracle: models.score of the answer."""
    inputs, config = unpacked["encoder_input_tokens"], CONFIGS[name]
    keys = jax.random.split(jax.random.key(2), 8)
    ours = predict(inputs, config, keys)
    assert np.any(ours.tokens == EOS)
    score = jit(models.score, static_argnums=0)
    for n in range(config.rows_per_input):
        tokens = ours.tokens[:, n]
        ends = np.cumsum(tokens == EOS, axis=1)
        after_eos = ends - (tokens == EOS) > 0
        assert np.all(tokens[after_eos] == PAD)
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": jnp.asarray(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]),
            "decoder_target_tokens": jnp.asarray(tokens),
            "decoder_segment_ids": jnp.ones((8, 16), jnp.int32),
            "encoder_segment_ids": (inputs > 0).astype(jnp.int32),
            "decoder_loss_weights": jnp.asarray(~after_eos),
        }
        expected = score(model, speaker, batch)["score"]
        real = ours.scores[:, n] > decoding.IMPOSSIBLE / 10
        assert np.sum(real) >= 6
        np.testing.assert_allclose(ours.scores[real, n], expected[real], rtol=1e-4)


def test_engine_decoding_t5_samples_depend_on_the_row_s_key_alone(unpacked, predict):
    """The T5's sample for an input and key, in another place of another batch. Property."""
    inputs, config = unpacked["encoder_input_tokens"], CONFIGS["sampled"]
    keys = jax.random.split(jax.random.key(2), 8)
    together = predict(inputs, config, keys)
    order = jnp.array([5, 0, 0, 3, 7, 1, 2, 6])
    again = predict(inputs[order], config, keys[order])
    np.testing.assert_array_equal(again.tokens, together.tokens[order])
