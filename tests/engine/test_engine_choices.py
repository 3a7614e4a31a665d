"""Scoring a closed set of choices, and going on after one of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.engine.model import choice_tree, decoding, generate, models, partitioning, t5
from cosmo.engine.model.decoding import DecodingConfig

PAD, EOS = 0, 1
LENGTH = 16
# Shared beginnings, a choice that begins another, one of a single token, one that ends the answer.
CHOICES = ((5, 6, 7), (5, 6), (5, 8, 9, EOS), (30,), (2, 3, 4, 5, 6, 7))
NETWORKS = {
    "T5 1.1": {},
    "T5 1.0": dict(mlp_activations=("relu",), logits_via_embedding=True),
    "biases a layer": dict(relative_attention_per_layer=True),
}


def padded(sequences, length=LENGTH):
    array = np.zeros((len(sequences), length), np.int32)
    for row, tokens in zip(array, sequences, strict=True):
        row[: len(tokens)] = tokens
    return array


def teacher_forced(inputs, targets):
    """A plain batch that scores all of `targets`, [R, T] padded with 0."""
    return {
        "encoder_input_tokens": jnp.asarray(inputs),
        "decoder_input_tokens": jnp.asarray(np.pad(targets, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_target_tokens": jnp.asarray(targets),
    }


@pytest.fixture(scope="module")
def score(jit):
    return jit(models.score, static_argnums=0)


@pytest.fixture(scope="module")
def go_on(jit):
    """`go_on(model, params, inputs, config, keys, taken)` -> Chosen in numpy.

    `taken(scores)` are the choices that are taken, the likeliest ones without it.
    """

    def call(model, params, inputs, config, keys, taken):
        with pytest.MonkeyPatch.context() as patch:  # while it is traced
            if taken is not None:
                patch.setattr(generate, "_likeliest", taken)
            return generate.choose_and_continue(model, params, inputs, CHOICES, config, keys)

    run = jit(call, static_argnums=(0, 3, 5))
    return lambda *arguments: jax.device_get(run(*arguments))


def forced(scores):
    """FORCED where it is not negative, else the likeliest."""
    return jnp.where(FORCED < 0, jnp.argmax(scores, axis=-1), FORCED).astype(jnp.int32)


def varied(scores):
    """A choice that depends on the row's scores alone, so that rows take different ones."""
    return (jnp.floor(scores[:, 0]) % len(CHOICES)).astype(jnp.int32)


@pytest.mark.parametrize("name", NETWORKS)
def test_score_choices_is_the_score_of_each_pair(model, make_params, unpacked, score, jit, name):
    """Oracle: models.score of every (input, choice) as a row of its own; the whole network."""
    model = dataclasses.replace(model, network=dataclasses.replace(model.network, **NETWORKS[name]))
    params, inputs = make_params(model), np.asarray(unpacked["encoder_input_tokens"])
    count = len(CHOICES)
    pairs = teacher_forced(
        np.repeat(inputs, count, axis=0), np.tile(padded(CHOICES), (len(inputs), 1))
    )
    expected = np.asarray(score(model, params, pairs)["score"]).reshape(-1, count)
    run = jit(lambda params, inputs: generate.score_choices(model, params, inputs, padded(CHOICES)))
    found = np.asarray(run(params, inputs))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert np.min(np.ptp(found, axis=0)) > 0.1  # inputs matter
    # Property: neither the other rows (here: empty ones) nor the order of the choices matter.
    alone = np.asarray(run(params, np.where(np.arange(8)[:, None] < 3, inputs, 0)))
    np.testing.assert_array_equal(alone[:3], found[:3])
    turned = jit(lambda p, i: generate.score_choices(model, p, i, CHOICES[::-1]))(params, inputs)
    np.testing.assert_allclose(turned[:, ::-1], found, rtol=2e-5)  # another program


def test_tree_reads_what_choices_share_once():
    """Oracle: by hand; seven tokens of `5 6 7`, `5 6`, `5 8` after four distinct prefixes."""
    tree = choice_tree.build_tree(((5, 6, 7), (5, 6), (5, 8)))
    assert tree.tokens_N.tolist() == [PAD, 5, 6]
    assert tree.depths_N.tolist() == [0, 1, 2]
    assert tree.ancestors_NN.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert list(zip(tree.parents_E, tree.tokens_E, strict=True)) == [(0, 5), (1, 6), (2, 7), (1, 8)]
    assert tree.path_CD.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 1]]
    assert tree.in_path_CD.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert tree.last_C.tolist() == [7, 6, 8]


FORCED = np.array([0, 1, 2, 3, 4, -1, -1, -1], np.int32)


@pytest.fixture(scope="module")
def speaker(params):
    """Parameters that end some answers: EOS is a little likelier than token 30 always."""
    logits_dense = params["decoder"]["logits_dense"]
    boosted = logits_dense.at[:, EOS].set(1.02 * logits_dense[:, 30])
    return {**params, "decoder": {**params["decoder"], "logits_dense": boosted}}


def test_choose_and_continue_greedily(model, speaker, unpacked, logits_of, go_on):
    """What follows the choice, token by token. Oracle: the whole network run for every token.

    The choices forced upon five rows differ in length; three rows take their best one.
    """
    inputs, new = unpacked["encoder_input_tokens"], 9
    found = go_on(model, speaker, inputs, DecodingConfig(new), None, forced)
    best = np.argmax(found.scores, axis=1)
    np.testing.assert_array_equal(found.choice, np.where(FORCED < 0, best, FORCED))
    rows = [list(CHOICES[choice]) for choice in found.choice]
    scores, ended = np.zeros(8), np.array([CHOICES[choice][-1] == EOS for choice in found.choice])
    for _ in range(new):
        batch = teacher_forced(inputs, padded(rows)) | {
            "decoder_segment_ids": jnp.ones((8, LENGTH), jnp.int32),
            "encoder_segment_ids": (inputs > 0).astype(jnp.int32),
        }
        logits = np.asarray(logits_of(model, speaker, batch), np.float64)
        for row, tokens in enumerate(rows):
            here = logits[row, len(tokens)]
            tokens.append(PAD if ended[row] else int(np.argmax(here)))
            scores[row] += 0 if ended[row] else np.max(here) - np.log(np.sum(np.exp(here)))
            ended[row] |= tokens[-1] == EOS
    expected = [t[len(CHOICES[c]) :] for t, c in zip(rows, found.choice, strict=True)]
    np.testing.assert_array_equal(found.continuation.tokens[:, 0], expected)
    np.testing.assert_allclose(found.continuation.scores[:, 0], scores, rtol=1e-4)
    assert not np.any(found.continuation.tokens[found.choice == 2])
    assert 1 < np.sum(ended) < 8 and len(set(map(str, expected))) > 4


@pytest.mark.parametrize(
    "config",
    [
        DecodingConfig(6, beam_size=3, length_penalty=0.0),
        DecodingConfig(6, temperature=1.2, top_k=20, num_samples=2),
    ],
    ids=["beam", "samples"],
)
def test_choose_and_continue_scores(model, speaker, unpacked, score, go_on, config):
    """Beams and samples. Oracle: models.score of choice and text together, less the choice's."""
    inputs = unpacked["encoder_input_tokens"]
    keys = jax.random.split(jax.random.key(2), 8)
    found = go_on(model, speaker, inputs, config, keys, forced)
    stops = found.choice == 2
    assert np.any(stops) and not np.any(found.continuation.tokens[stops])
    assert not np.any(found.continuation.scores[stops])
    compared = 0
    for n in range(config.rows_per_input):
        rows = [
            [*CHOICES[choice], *np.trim_zeros(text, "b")]
            for choice, text in zip(found.choice, found.continuation.tokens[:, n], strict=True)
        ]
        together = np.asarray(score(model, speaker, teacher_forced(inputs, padded(rows)))["score"])
        before = found.scores[np.arange(8), found.choice]
        # A sampled id 0 is read as padding by the oracle.
        lengths = [len(CHOICES[choice]) + 6 for choice in found.choice]
        kept = [
            0 not in row and (row[-1] == EOS or len(row) == length)
            for row, length in zip(rows, lengths, strict=True)
        ]
        real = ~stops & kept & (found.continuation.scores[:, n] > decoding.IMPOSSIBLE / 10)
        compared += np.sum(real)
        np.testing.assert_allclose(
            found.continuation.scores[real, n], (together - before)[real], rtol=1e-4, atol=1e-4
        )
    assert compared >= 10


@pytest.mark.parametrize("beam_size", [1, 2])
def test_what_has_ended_costs_no_step(beam_size):
    """Property: a batch in which nothing follows calls the step function never."""
    calls = []

    def step(tokens_R, index, cache):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((tokens_R.size, 7)), cache

    class NoCache(tuple):
        repeat = take = lambda self, _: self

    jax.tree_util.register_pytree_node(NoCache, lambda _: ((), None), lambda *_: NoCache())
    config = DecodingConfig(3, beam_size=beam_size)
    for ended, some in ((jnp.array([True, True]), False), (jnp.array([True, False]), True)):
        found = decoding.decode(step, NoCache(), 2, config, ended_B=ended)
        jax.effects_barrier()
        assert bool(calls) == some
        assert not np.any(found.tokens[0]) and not np.any(found.scores[0])


class Words:
    """A vocabulary of numbers."""

    size, eos_id, unk_id, path, fingerprint = 40, EOS, 2, "words", ""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i > EOS)


def test_a_session_chooses_and_goes_on(model, speaker, examples, go_on, monkeypatch):
    """Rows of several lengths in batches of four, in order. Oracle: `models` on all at once."""
    partitioner = partitioning.Partitioner()
    layout = partitioner.layout(partitioner.mesh())
    lengths = {"inputs": 64, "targets": LENGTH}
    session = infer.Session(model, speaker, Words(), layout, 4, lengths, bucketed=True)
    inputs = [tuple(examples[i % 6][0].tolist()) * (1 + 4 * (i == 2)) for i in range(8)]
    rows = [datasets.Row(str(i), "", ids) for i, ids in enumerate(inputs)]
    expected = go_on(model, speaker, padded(inputs, 64), DecodingConfig(5), None, varied)
    assert len(set(expected.choice.tolist())) > 2
    found = infer.answer(session, rows, infer.choosing(session, CHOICES))
    assert [answer.row for answer in found] == rows
    np.testing.assert_allclose([a.scores for a in found], expected.scores, rtol=2e-5)

    monkeypatch.setattr(generate, "_likeliest", varied)
    infer._compiled.cache_clear()  # traced anew, and not kept for other tests
    work = infer.choosing_then_generating(session, CHOICES, DecodingConfig(5))
    found = infer.answer(session, rows, work)
    assert [answer.choice for answer in found] == expected.choice.tolist()
    texts = [(Words().decode(ids[0]),) for ids in expected.continuation.tokens]
    assert [answer.predictions for answer in found] == texts
    np.testing.assert_allclose([a.choice_scores for a in found], expected.scores, rtol=2e-5)
    scores = expected.continuation.scores
    np.testing.assert_allclose([a.scores for a in found], scores, rtol=1e-4, atol=1e-5)
    infer._compiled.cache_clear()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ([], "no choices"),
        ([[5], [0, 0]], "choice 1 of 2 has no tokens"),
        ([[5], [40]], "choice 1 has token 40; tokens are 1 to 39"),
        ([[5, 0, 6]], "choice 0 has token 0"),
        ([[5, 6], [7], [5, 6, 0]], "choices 0 and 2 have the same tokens"),
    ],
)
def test_wrong_choices_are_named(wrong, words):
    """Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError, match=words):
        choice_tree.check_choices(wrong, 40)


def test_products_in_bfloat16_stay_near_float32():
    """Oracles: the float32 scores; the type of every result, by the lowered program."""
    network = t5.T5Config(
        vocab_size=96,
        emb_dim=32,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=16,
        mlp_dim=64,
        dtype="float32",
    )
    exact = models.EncoderDecoderModel(network)
    rounded = models.EncoderDecoderModel(dataclasses.replace(network, product_dtype="bfloat16"))
    params = models.init(exact, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 96, (3, 9)), jnp.int32)
    choices = [[5, 6], [5, 7, 8], [9]]
    run = [
        jax.jit(lambda p, t, m=m: generate.score_choices(m, p, t, choices))
        for m in (exact, rounded)
    ]
    wanted, found = (np.asarray(f(params, tokens)) for f in run)
    assert 0 < np.max(np.abs(found - wanted)) < 0.1  # rounded indeed, and not by much
    text = run[1].lower(params, tokens).as_text()
    assert "tensor<3x9x32xbf16>" in text and "tensor<3x9x32xf32>" in text
