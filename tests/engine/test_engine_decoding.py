"""Decoding on toy distributions that can be searched exhaustively."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import decoding
from cosmo.engine.model.decoding import DecodingConfig, truncate

PAD, EOS = 0, 1
NEVER = -1e9  # a logit that no search follows


# A toy language model: the next token's logits are looked up by input and whole prefix, so that
# nothing but the right prefix, carried through every reordering of the cache, finds them.


class ToyCache(NamedTuple):
    """Which input a row belongs to, and its prefix as a number in base V."""

    input_R: jax.Array
    prefix_R: jax.Array

    def repeat(self, count):
        return ToyCache(jnp.repeat(self.input_R, count), jnp.repeat(self.prefix_R, count))

    def take(self, rows_R):
        return ToyCache(self.input_R[rows_R], self.prefix_R[rows_R])


class Toy:
    """Random logits for every prefix of up to `length - 1` tokens; PAD is never likely."""

    def __init__(self, jit, inputs, vocab, length, seed=0, scale=1.5):
        rng = np.random.default_rng(seed)
        self.jit, self.inputs, self.vocab = jit, inputs, vocab
        self.offsets = np.cumsum([0] + [vocab**i for i in range(length)])
        shape = (inputs, self.offsets[-1], vocab)
        self.logits = (scale * rng.standard_normal(shape)).astype(np.float32)
        self.logits[..., PAD] = NEVER

    def decode(self, config, keys=None, alone=False):
        """All inputs in one batch, or each in a loop of its own, which stops when it is done."""
        table, offsets = jnp.asarray(self.logits), jnp.asarray(self.offsets)

        def step(tokens_R, index, cache):
            prefix_R = jnp.where(index == 0, 0, cache.prefix_R * self.vocab + tokens_R)
            logits_RV = table[cache.input_R, offsets[index] + prefix_R]
            return logits_RV, cache._replace(prefix_R=prefix_R)

        def run(inputs_B, keys):
            start = ToyCache(inputs_B, jnp.zeros_like(inputs_B))
            return decoding.decode(step, start, len(inputs_B), config, keys)

        inputs_B = jnp.arange(self.inputs)
        if not alone:
            return jax.device_get(self.jit(run)(inputs_B, keys))
        each = self.jit(jax.vmap(lambda i: run(i[None], None)))(inputs_B)
        return jax.device_get(jax.tree.map(lambda a: a[:, 0], each))

    def logp(self, i, prefix):
        """log p(next token | prefix) of input `i`, float64 [V]."""
        number = functools.reduce(lambda n, token: n * self.vocab + token, prefix, 0)
        logits = self.logits[i, self.offsets[len(prefix)] + number].astype(np.float64)
        return logits - np.log(np.sum(np.exp(logits)))

    def likelihood(self, i, sequence):
        return sum(self.logp(i, sequence[:t])[token] for t, token in enumerate(sequence))


@pytest.fixture(scope="module")
def toy(jit):
    """`toy(inputs=..., vocab=..., length=...)`: a toy language model."""
    return functools.partial(Toy, jit)


def padded(sequence, length):
    return list(sequence) + [PAD] * (length - len(sequence))


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_engine_decoding_wide_beam_is_exhaustive_search(toy, alpha):
    """A beam as wide as there are prefixes finds the best of all sequences, in order.

    Oracle: every sequence that ends within four tokens, scored in float64 (Wu et al. 2016).
    """
    length, width = 4, 54  # 2 * 54 candidates are all that 27 prefixes of 3 tokens can have
    language = toy(inputs=3, vocab=4, length=length)
    ours = language.decode(
        DecodingConfig(max_new_tokens=length, beam_size=width, length_penalty=alpha)
    )
    for i in range(language.inputs):
        every = [
            (*prefix, EOS)
            for n in range(length)
            for prefix in itertools.product(range(2, language.vocab), repeat=n)
        ]
        ranked = sorted(
            ((language.likelihood(i, s) / penalty(len(s), alpha), s) for s in every), reverse=True
        )
        assert len(ranked) == 15
        scores, sequences = zip(*ranked, strict=True)
        np.testing.assert_array_equal(ours.tokens[i, :15], [padded(s, length) for s in sequences])
        np.testing.assert_allclose(ours.scores[i, :15], scores, rtol=1e-5)
        assert np.all(ours.scores[i, 15:] < decoding.IMPOSSIBLE / 10)  # there are no more


def beam_by_hand(toy, i, n, length, alpha):
    """Beam search with lists, as T5X's, but never stopping before `length`."""
    live, ended = [(0.0, ())], []
    for t in range(1, length + 1):
        grown = [
            (total + logp, (*prefix, token))
            for total, prefix in live
            for token, logp in enumerate(toy.logp(i, prefix))
            if logp > NEVER / 2
        ]
        best = sorted(grown, reverse=True)[: 2 * n]
        ended += [(total / penalty(t, alpha), s) for total, s in best if s[-1] == EOS]
        ended = sorted(ended, reverse=True)[:n]
        live = [(total, s) for total, s in best if s[-1] != EOS][:n]
    if not ended:
        ended = [(total / penalty(length, alpha), s) for total, s in live]
    return ended


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
@pytest.mark.parametrize("n, alpha", [(2, 0.0), (2, 0.6), (2, 2.0), (3, 1.0)])
def test_engine_decoding_narrow_beam(toy, n, alpha, alone):
    """A narrow beam, which prunes and stops early. Oracle: a list-based search that never stops.

    So stopping loses nothing. Ten of 200 inputs never end, others at once; together they stop
    with the last, alone each as soon as it may.
    """
    language = toy(inputs=200, vocab=4, length=5, seed=3, scale=6.0)
    language.logits[:10, :, EOS] = NEVER
    config = DecodingConfig(max_new_tokens=5, beam_size=n, length_penalty=alpha)
    ours = language.decode(config, alone=alone)
    for i in range(language.inputs):
        expected = beam_by_hand(language, i, n, 5, alpha)
        count = len(expected)
        assert count >= 1
        tokens = [padded(s, 5) for _, s in expected]
        np.testing.assert_array_equal(ours.tokens[i, :count], tokens, err_msg=str(i))
        scores = [score for score, _ in expected]
        np.testing.assert_allclose(ours.scores[i, :count], scores, rtol=1e-5, atol=1e-6)
        assert np.all(ours.scores[i, count:] <= decoding.IMPOSSIBLE / 10)
    assert np.all(ours.tokens[:10] > EOS)  # the unfinished ones fill all positions
    assert np.all(np.diff(ours.scores, axis=1) <= 0)  # the best first


def test_engine_decoding_beam_is_no_worse_than_greedy(toy):
    """Without a length penalty the best of a beam is at least as likely as the greedy answer.

    A theorem for a beam that prunes nothing; only ended answers are compared, since a beam prefers
    them to unfinished ones.
    """
    language = toy(inputs=200, vocab=4, length=4, seed=5)
    greedy = language.decode(DecodingConfig(max_new_tokens=4))
    beam = language.decode(DecodingConfig(max_new_tokens=4, beam_size=54, length_penalty=0.0))
    ended = np.any(greedy.tokens[:, 0] == EOS, axis=-1)
    assert 50 < np.sum(ended) < 200
    gain = (beam.scores[:, 0] - greedy.scores[:, 0])[ended]
    assert np.all(gain >= -1e-5)
    assert np.any(gain > 0.1)  # it does find better ones


def test_engine_decoding_greedy_on_the_toy(toy):
    """The likeliest token each time, padding after EOS, the sum of log p. Oracle: a Python loop."""
    language = toy(inputs=30, vocab=4, length=4, seed=9)
    ours = language.decode(DecodingConfig(max_new_tokens=4))
    lengths = set()
    for i in range(language.inputs):
        sequence: tuple[int, ...] = ()
        while len(sequence) < 4 and EOS not in sequence:
            sequence += (int(np.argmax(language.logp(i, sequence))),)
        lengths.add(len(sequence))
        np.testing.assert_array_equal(ours.tokens[i, 0], padded(sequence, 4))
        assert ours.scores[i, 0] == pytest.approx(language.likelihood(i, sequence), rel=1e-5)
    assert lengths == {1, 2, 3, 4}


def kept_by_sorting(logits, top_k, top_p):
    """Which tokens top-k, then top-p keep: a sort a row, sums in float64. [R, V] bool."""
    out = np.zeros(logits.shape, bool)
    for row, kept in zip(logits.astype(np.float64), out, strict=True):
        order = np.argsort(-row)
        if top_k:
            order = order[:top_k]
        probs = np.exp(row[order]) / np.sum(np.exp(row[order]))
        before = np.cumsum(probs) - probs  # mass of the likelier ones
        kept[order[before < top_p]] = True
    return out


@pytest.mark.parametrize(
    "top_k, top_p",
    [(1, 1.0), (5, 1.0), (63, 1.0), (0, 0.1), (0, 0.5), (0, 0.9), (0, 0.99), (7, 0.8), (40, 0.9)],
)
def test_engine_decoding_truncate(top_k, top_p):
    """Exactly the k likeliest tokens, then their nucleus; kept logits as they were.

    Oracle: sorting in numpy. 300 rows of 64 tokens, from flat to peaked; the seed keeps every
    cumulated mass 1e-6 away from top_p, where float32 could decide otherwise.
    """
    rng = np.random.default_rng(2)
    scale = np.exp(rng.uniform(-1.5, 1.5, (300, 1)))
    logits = (scale * rng.standard_normal((300, 64))).astype(np.float32)
    ours = np.asarray(truncate(jnp.asarray(logits), top_k, top_p))
    expected = kept_by_sorting(logits, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(ours), expected)
    np.testing.assert_array_equal(ours[expected], logits[expected])


def test_engine_decoding_truncate_edges():
    """Ties stay together; a tiny top_p keeps the likeliest; all of V or mass 1 keeps all. By hand.

    Probabilities 0.4, 0.3, 0.2, 0.1: a nucleus of 0.7 needs two, of 0.71 three.
    """
    logits = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]]))

    def kept(logits, top_k=0, top_p=1.0):
        return [list(np.flatnonzero(row)) for row in np.isfinite(truncate(logits, top_k, top_p))]

    assert kept(logits, top_p=0.69) == [[1, 3]]
    assert kept(logits, top_p=0.71) == [[0, 1, 3]]
    assert kept(logits, top_p=1e-6) == [[1]]
    assert kept(logits, top_p=0.41) == [[1, 3]]
    # Renormalised after top-k: 4/7 and 3/7 of the mass, so half of it is one token.
    assert kept(logits, top_k=2, top_p=0.5) == [[1]]
    assert kept(logits, top_k=4) == kept(logits, top_k=9) == kept(logits) == [[0, 1, 2, 3]]
    ties = jnp.array([[1.0, 2.0, 1.0, 0.0, 1.0]])
    assert kept(ties, top_k=2) == [[0, 1, 2, 4]]
    both = jnp.array([[0.0, 5.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]])  # rows do not mix
    assert kept(both, top_p=0.5) == [[1], [0, 1]]


@pytest.mark.parametrize(
    "fields, probabilities",
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # squares, normalised
        ({"temperature": 1.0, "top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"temperature": 1.0, "num_samples": 4}, [0.1, 0.2, 0.3, 0.4]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "samples"],
)
def test_engine_decoding_sampling_frequencies(jit, fields, probabilities):
    """Sampled tokens have the right frequencies, alone and in pairs of neighbours.

    Oracle: the probabilities, by hand. Chi-square over 16 pairs of 2,000 rows: its mean is at most
    15, and above 45 it would be chance once in 10,000 seeds. Scores are of the plain distribution.
    """
    rows, plain = 2000, np.array([0.1, 0.2, 0.3, 0.4])
    logits_V = jnp.concatenate([jnp.full(2, NEVER), jnp.log(jnp.asarray(plain, jnp.float32))])
    n = fields.get("num_samples", 1)
    config = DecodingConfig(max_new_tokens=2, **fields)
    keys = jax.random.split(jax.random.key(1), rows // n)
    ours = jax.device_get(
        jit(
            lambda keys: decoding.decode(
                lambda tokens, index, cache: (jnp.tile(logits_V, (rows, 1)), cache),
                ToyCache(jnp.zeros(rows // n, jnp.int32), jnp.zeros(rows // n, jnp.int32)),
                rows // n,
                config,
                keys,
            )
        )(keys)
    )
    assert ours.tokens.shape == (rows // n, n, 2)
    tokens = ours.tokens.reshape(rows, 2) - 2
    seen = np.zeros((4, 4))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    expected = rows * np.outer(probabilities, probabilities)
    possible = expected > 0
    assert np.all(seen[~possible] == 0)
    assert np.sum((seen - expected)[possible] ** 2 / expected[possible]) < 45
    np.testing.assert_allclose(
        ours.scores.reshape(-1), np.sum(np.log(plain[tokens]), axis=1), rtol=1e-5
    )
    if n > 1:  # samples of an input differ from each other as those of two inputs do
        same = np.mean(tokens.reshape(-1, n, 2)[:, 0] == tokens.reshape(-1, n, 2)[:, 1])
        assert abs(same - np.sum(np.square(probabilities))) < 0.08


def test_engine_decoding_sampling_depends_on_the_row_s_key_alone(toy):
    """An input with its key gets the same samples in any batch and any place. Property."""
    language = toy(inputs=6, vocab=5, length=5, seed=4)
    keys = jax.random.split(jax.random.key(0), 6)
    config = DecodingConfig(max_new_tokens=5, temperature=1.3, top_p=0.95, num_samples=3)
    together = language.decode(config, keys)
    for order in ([4, 1, 5, 0, 3, 2], [3, 3, 3, 3, 3, 3], [2, 5]):
        other = toy(inputs=len(order), vocab=5, length=5)
        other.logits = language.logits[order]
        again = other.decode(config, keys[jnp.array(order)])
        np.testing.assert_array_equal(again.tokens, together.tokens[order])
        np.testing.assert_allclose(again.scores, together.scores[order], rtol=1e-6)
    assert len({tuple(row) for row in together.tokens.reshape(-1, 5)}) > 6  # not all alike


def test_engine_decoding_sampling_needs_keys(toy):
    """Sampling without keys is an error, not a silent default. Property."""
    with pytest.raises(ValueError, match="row_keys"):
        toy(inputs=1, vocab=4, length=2).decode(DecodingConfig(max_new_tokens=2, temperature=1.0))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_new_tokens": 0}, "DecodingConfig.max_new_tokens=0; it must be at least 1"),
        ({"temperature": -0.1}, "DecodingConfig.temperature=-0.1"),
        ({"temperature": float("inf")}, "DecodingConfig.temperature=inf"),
        ({"length_penalty": float("inf"), "beam_size": 2}, "DecodingConfig.length_penalty=inf"),
        ({"top_k": -1}, "DecodingConfig.top_k=-1"),
        ({"top_p": 0.0}, "DecodingConfig.top_p=0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "DecodingConfig.top_p=1.5"),
        ({"num_samples": 0}, "DecodingConfig.num_samples=0"),
        ({"beam_size": 0}, "DecodingConfig.beam_size=0"),
        ({"beam_size": 2, "temperature": 1.0}, "beam_size > 1 cannot go with temperature > 0"),
        ({"beam_size": 2, "num_samples": 2, "temperature": 1.0}, "num_samples > 1"),
        ({"num_samples": 2}, "num_samples > 1 without temperature"),
    ],
)
def test_engine_decoding_config_errors(fields, words):
    """A setting that cannot work is refused with its name, value and rule. Oracle: DESIGN."""
    with pytest.raises(UserError) as error:
        DecodingConfig(**fields)
    assert words in str(error.value)


def test_draws_follow_the_softmax():
    """Oracle: the probabilities themselves, by a chi-square bound; tokens at -inf never come."""
    logits_V = np.random.default_rng(0).normal(size=700).astype(np.float32) * 2.0
    logits_V[[0, 255, 256, 699]] = -np.inf  # at the edges of blocks
    count = 40_000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = np.asarray(jax.jit(decoding.draw)(keys, jnp.broadcast_to(logits_V, (count, 700))))
    expected = np.exp(logits_V) / np.exp(logits_V).sum() * count
    seen = np.bincount(drawn, minlength=700)
    assert not seen[expected == 0].any()
    often = expected >= 5
    rest = (
        np.append(seen[often], seen[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    chi2, freedom = float((((rest[0] - rest[1]) ** 2) / rest[1]).sum()), len(rest[0]) - 1
    # Five standard deviations of a chi-square about its mean.
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("place", [0, 299, 511, 512, 599])
def test_a_draw_of_a_single_token_is_that_token(place):
    """Oracle: a distribution with one token, at either edge of a block and of the vocabulary."""
    logits_RV = jnp.full((64, 600), -jnp.inf).at[:, place].set(-3.0)
    assert np.all(decoding.draw(jax.random.split(jax.random.key(0), 64), logits_RV) == place)
