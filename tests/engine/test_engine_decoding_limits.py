"""Searches, limits on tokens and forced prefixes, against searches with Python lists."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SpecialIds
from cosmo.engine.model import decoding
from cosmo.engine.model.decoding import DecodingConfig

BLENDERBOT = SpecialIds(pad=0, start=1, eos=2)
STATES = 97  # of the toy's memory
NEVER = -1e20  # the logit of a token that the network forbids, as `transformer.FORBIDDEN`


class ToyCache(NamedTuple):
    """The input that a row belongs to, and a number that stands for what it has read."""

    input_R: jax.Array
    state_R: jax.Array

    def repeat(self, count):
        return ToyCache(jnp.repeat(self.input_R, count), jnp.repeat(self.state_R, count))

    def take(self, rows_R):
        return ToyCache(self.input_R[rows_R], self.state_R[rows_R])


class Toy:
    """Random logits for every state; a token moves the state, so that every prefix matters."""

    def __init__(self, inputs, vocab, special, seed, scale=2.0):
        rng = np.random.default_rng(seed)
        self.inputs, self.vocab, self.special = inputs, vocab, special
        self.table = (scale * rng.standard_normal((inputs, STATES, vocab))).astype(np.float32)
        self.table[..., [special.pad, special.start]] = NEVER
        self.table[..., special.eos] += 1.0

    def decode(self, config, rows=None, prefix=None, context=None, keys=None):
        """The answers to the inputs `rows`, or to all, in one batch."""
        rows = np.arange(self.inputs) if rows is None else np.asarray(rows)
        run = _compiled(config, self.special)
        keys = jax.random.split(jax.random.key(0), self.inputs)[rows] if keys is None else keys
        return jax.device_get(run(jnp.asarray(self.table), rows, keys, prefix, context))

    def logp(self, i, tokens):
        """log p(next token | tokens after the start token) of input `i`, float64 [V]."""
        state = functools.reduce(_moved, tokens, 0)
        logits = self.table[i, state].astype(np.float64)
        top = logits.max()
        return logits - top - np.log(np.sum(np.exp(logits - top)))


def _moved(state, token):
    return (state * 31 + token + 1) % STATES


@functools.lru_cache(maxsize=200)
def _compiled(config, special):
    @jax.jit
    def run(table, inputs_B, keys, prefix, context):
        def step(tokens_R, index, cache):
            state_R = jnp.where(index == 0, 0, _moved(cache.state_R, tokens_R))
            return table[cache.input_R, state_R], cache._replace(state_R=state_R)

        start = ToyCache(inputs_B, jnp.zeros_like(inputs_B))
        return decoding.decode(
            step, start, inputs_B.size, config, keys,
            special=special, prefix_BD=prefix, context_BS=context,
        )  # fmt: skip

    return run


# The oracle: lists, in float64, from the description of the searches.


def repeats(tokens, size, sources):
    """The tokens that would complete, at the end of `tokens`, an n-gram of `sources`."""
    if len(tokens) < size - 1:
        return set()
    end = tuple(tokens[len(tokens) - size + 1 :])
    grams = [tuple(s[i : i + size]) for s in sources for i in range(len(s) - size + 1)]
    return {gram[-1] for gram in grams if gram[:-1] == end}


def extensions(toy, i, tokens, prefix, context, config):
    """{token: log-likelihood} of what may follow `tokens`, which begin with the prefix."""
    special, new = toy.special, len(tokens) - len(prefix)
    if new < 0:
        return {prefix[len(tokens)]: 0.0}
    if config.forced_eos and new == config.max_new_tokens - 1:
        return {special.eos: 0.0}
    logp = dict(enumerate(toy.logp(i, tokens)))
    banned = set(config.banned_ids)
    if new < config.min_length:
        banned.add(special.eos)
    answer = [special.start, *tokens]
    if config.block_ngram:
        banned |= repeats(answer, config.block_ngram, [answer])
    if config.context_block_ngram:
        banned |= repeats(answer, config.context_block_ngram, [context])
    left = {t: p for t, p in logp.items() if p > NEVER / 2 and t not in banned}
    return left or {special.eos: logp[special.eos]}


def grown(live, follow):
    return sorted(
        ((total + p, (*tokens, t)) for total, tokens in live for t, p in follow(tokens).items()),
        reverse=True,
    )


def greedy(follow, prefix, config, eos):
    total, tokens = 0.0, ()
    while len(tokens) < len(prefix) + config.max_new_tokens and not (
        len(tokens) > len(prefix) and tokens[-1] == eos
    ):
        gained, token = max((p, t) for t, p in follow(tokens).items())
        total, tokens = total + gained, (*tokens, token)
    return [(total, tokens)]


def t5x(follow, prefix, config, eos):
    n, alpha = config.beam_size, config.length_penalty
    live, ended = [(0.0, tuple(prefix))], []
    for length in range(1, config.max_new_tokens + 1):
        best = grown(live, follow)[: 2 * n]
        ended += [(total / ((5 + length) / 6) ** alpha, s) for total, s in best if s[-1] == eos]
        ended = sorted(ended, reverse=True)[:n]
        live = [(total, s) for total, s in best if s[-1] != eos][:n]
    longest = config.max_new_tokens
    return ended or [(total / ((5 + longest) / 6) ** alpha, s) for total, s in live]


def parlai(follow, prefix, config, eos):
    n, alpha = config.beam_size, config.length_penalty
    live, ended, likeliest_ended = [(0.0, tuple(prefix))], [], False
    for length in range(1, config.max_new_tokens + 1):
        best = grown(live, follow)[:n]  # one that ends uses up a place
        likeliest_ended |= best[0][1][-1] == eos
        ended += [(total / ((2 + length) / 6) ** alpha, s) for total, s in best if s[-1] == eos]
        live = [(total, s) for total, s in best if s[-1] != eos]
        if (likeliest_ended and len(ended) >= n) or not live:
            break
    if not ended:
        total, s = live[0]
        ended = [(total / ((2 + config.max_new_tokens) / 6) ** alpha, (*s[:-1], eos))]
    return sorted(ended, reverse=True)[: 2 * n]


def huggingface(follow, prefix, config, eos):
    n, alpha = config.beam_size, config.length_penalty
    live, ended = [(0.0, tuple(prefix))], []
    for length in range(1, config.max_new_tokens + 1):
        last = length == config.max_new_tokens
        best = grown(live, follow)[: 2 * n]
        over = [(total / length**alpha, s) for total, s in best[:n] if s[-1] == eos or last]
        ended = sorted(ended + over, reverse=True)[:n]
        live = [(total, s) for total, s in best if s[-1] != eos and not last][:n]
        if not live:
            break
        worse = live[0][0] / length**alpha <= ended[-1][0] if ended else False
        if len(ended) == n and (config.early_stopping or worse):
            break
    return ended


ORACLES = {"t5x": t5x, "parlai": parlai, "huggingface": huggingface}


def expected(toy, i, config, prefix=(), context=()):
    """[(score, tokens after the prefix)] of input `i`, the best first."""
    search = greedy if config.beam_size == 1 else ORACLES[config.search]

    def follow(tokens):
        return extensions(toy, i, tokens, prefix, context, config)

    found = search(follow, prefix, config, toy.special.eos)
    return [(score, tokens[len(prefix) :]) for score, tokens in found]


def check(ours, i, wanted, longest):
    """Tokens equal, scores to 1e-5, and no hypothesis more."""
    for place, (score, tokens) in enumerate(wanted):
        padded = [*tokens, *[0] * (longest - len(tokens))]
        np.testing.assert_array_equal(ours.tokens[i, place], padded, err_msg=f"{i}, {place}")
        np.testing.assert_allclose(ours.scores[i, place], score, rtol=2e-5, atol=1e-5)
    assert np.all(ours.scores[i, len(wanted) :] <= decoding.IMPOSSIBLE / 10)


def padded(sequences, length):
    out = np.zeros((len(sequences), length), np.int32)
    for row, tokens in zip(out, sequences, strict=True):
        row[: len(tokens)] = tokens
    return out


LIMITS = {
    "none": {},
    "min_length": {"min_length": 5},
    "banned": {"banned_ids": (3, 7)},
    "forced_eos": {"forced_eos": True},
    "answer": {"block_ngram": 2},
    "input": {"context_block_ngram": 2},
    "blenderbot": {"min_length": 4, "block_ngram": 3, "context_block_ngram": 3},
    "all": {
        "min_length": 3, "block_ngram": 2, "context_block_ngram": 2, "banned_ids": (5,),
        "forced_eos": True,
    },
}  # fmt: skip
SEARCHES = {
    "greedy": {},
    "t5x": {"beam_size": 3},
    "parlai": {"beam_size": 4, "search": "parlai"},
    "huggingface": {"beam_size": 3, "search": "huggingface"},
    "huggingface_early": {"beam_size": 3, "search": "huggingface", "early_stopping": True},
}


def drawn(rng, inputs, vocab, longest, shortest=0):
    """Random token lists without special tokens, of different lengths."""
    return [rng.integers(3, vocab, rng.integers(shortest, longest + 1)) for _ in range(inputs)]


# Each pair compiles two programs. Of a beam search "all" holds every limit; those alone are slow.
TOGETHER = ("none", "blenderbot", "all")
PAIRS = [
    pytest.param(search, limits, marks=[pytest.mark.slow] * (limits not in TOGETHER))
    if search != "greedy"
    else (search, limits)
    for search in SEARCHES
    for limits in LIMITS
]


@pytest.mark.parametrize("search, limits", PAIRS)
def test_engine_decoding_searches_with_limits(search, limits):
    """40 inputs, each with a context, half of them with a prefix. Oracle: searches with lists."""
    inputs, vocab, longest = 40, 12, 9
    toy = Toy(inputs, vocab, BLENDERBOT, seed=1)
    rng = np.random.default_rng(2)
    # With EOS, as inputs end. Few tokens, so that n-grams do repeat.
    contexts = [[*tokens, BLENDERBOT.eos] for tokens in drawn(rng, inputs, 8, 20, shortest=1)]
    prefixes = [p if i % 2 else [] for i, p in enumerate(drawn(rng, inputs, vocab, 4))]
    config = DecodingConfig(longest, length_penalty=0.7, **SEARCHES[search], **LIMITS[limits])
    ours = toy.decode(config, prefix=padded(prefixes, 4), context=padded(contexts, 21))
    plain = toy.decode(config, context=padded(contexts, 21))
    for i in range(inputs):
        check(ours, i, expected(toy, i, config, tuple(prefixes[i]), contexts[i]), longest)
        check(plain, i, expected(toy, i, config, (), contexts[i]), longest)


@pytest.mark.parametrize("alpha", [0.0, 0.65, 2.0])
@pytest.mark.parametrize("search", [name for name in SEARCHES if name != "greedy"])
def test_engine_decoding_length_penalties(search, alpha):
    """T5's special ids, and few inputs that end. Oracle: searches with lists."""
    toy = Toy(60, 6, SpecialIds(), seed=3, scale=3.0)
    toy.table[::3, :, 1] -= 6.0  # seldom end
    config = DecodingConfig(8, length_penalty=alpha, **SEARCHES[search])
    ours = toy.decode(config)
    for i in range(toy.inputs):
        check(ours, i, expected(toy, i, config), 8)


def test_engine_decoding_parlai_ends_the_likeliest_open_answer_by_force():
    """No answer ends by itself. Oracle: the searches with lists; EOS replaces the last token."""
    toy = Toy(10, 8, BLENDERBOT, seed=4)
    toy.table[..., 2] = -50.0
    config = DecodingConfig(5, beam_size=2, search="parlai")
    ours = toy.decode(config)
    assert np.all(ours.tokens[:, 0, -1] == 2)
    assert np.all(ours.tokens[:, 0, :-1] > 2)
    for i in range(toy.inputs):
        check(ours, i, expected(toy, i, config), 5)


def test_engine_decoding_no_token_left_means_eos():
    """Seven answers of unlike tokens use the vocabulary up. By hand: seven tokens, then EOS."""
    toy = Toy(5, 10, BLENDERBOT, seed=5)
    for search in SEARCHES.values():
        config = DecodingConfig(9, min_length=8, block_ngram=1, **search)
        ours = toy.decode(config)
        for tokens in ours.tokens[:, 0]:
            assert sorted(tokens[:7]) == list(range(3, 10))
            assert list(tokens[7:]) == [2, 0]


def test_engine_decoding_t5x_beams_without_a_hypothesis_never_end():
    """One token beside EOS, which may come at two lengths. By hand: two of three beams are real.

    So large a penalty would lift a copy of the first beam, of score -1e7, to -300.
    """
    toy = Toy(4, 4, BLENDERBOT, seed=6)
    config = DecodingConfig(30, beam_size=3, length_penalty=6.0, min_length=28)
    ours = toy.decode(config)
    assert np.all(np.sum(ours.tokens[:, :2] == 2, axis=(1, 2)) == 2)
    for i in range(toy.inputs):
        assert len(expected(toy, i, config)) == 2
        check(ours, i, expected(toy, i, config), 30)


def test_engine_decoding_padding_of_the_input_blocks_nothing():
    """T5 may write token 0, which also pads. By hand: it is likeliest, and no input has it."""
    toy = Toy(3, 8, SpecialIds(), seed=7)
    toy.table[..., 0] = 9.0
    config = DecodingConfig(5, context_block_ngram=1)
    for length in (2, 6):
        ours = toy.decode(config, context=padded([[5, 1]] * 3, length))
        assert not ours.tokens.any()


CONFIGS = st.builds(
    dict,
    min_length=st.integers(0, 5),
    block_ngram=st.integers(0, 3),
    context_block_ngram=st.integers(0, 3),
    banned_ids=st.sampled_from([(), (4,), (3, 9, 11)]),
    kind=st.sampled_from(
        [*SEARCHES.values(), {"temperature": 1.5, "num_samples": 2, "top_k": 9, "top_p": 0.95}]
    ),
)


@pytest.mark.parametrize("examples", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_engine_decoding_limits_hold(examples):
    """No banned id, no n-gram twice or of the input, the minimum kept; the same in any batch.

    Properties, for greedy answers, samples and every search. An example compiles two programs.
    """
    drawing = given(CONFIGS, st.integers(0, 10**6))
    settings(max_examples=examples, deadline=None)(drawing(check_limits_hold))()


def check_limits_hold(fields, seed):
    kind = fields.pop("kind")
    config = DecodingConfig(8, **fields, **kind)
    toy = Toy(4, 40, BLENDERBOT, seed)
    rng = np.random.default_rng(seed)
    contexts = [[*tokens, 2] for tokens in drawn(rng, 4, 9, 7, shortest=1)]
    prefixes = [list(dict.fromkeys(p)) for p in drawn(rng, 4, 40, 3)]
    ours = toy.decode(config, prefix=padded(prefixes, 3), context=padded(contexts, 8))
    for i, prefix in enumerate(prefixes):
        for tokens, score in zip(ours.tokens[i], ours.scores[i], strict=True):
            if score <= decoding.IMPOSSIBLE / 10:
                continue
            new = [int(t) for t in tokens[: np.count_nonzero(tokens)]]
            assert not set(new) & {0, 1, *config.banned_ids}
            assert 2 not in new[: config.min_length] and 2 not in new[:-1]
            # What ParlAI's search ends by force may repeat: EOS replaces a token of its choice.
            whole = [1, *prefix, *(new[:-1] if len(new) == 8 and new[-1] == 2 else new)]
            size = config.block_ngram
            grams = [tuple(whole[k : k + size]) for k in range(len(whole) - size + 1)]
            later = grams[max(0, len(prefix) + 2 - size) :]
            if size:
                assert len(set(later)) == len(later)
                assert not set(later) & set(grams[: len(grams) - len(later)])
            size = config.context_block_ngram
            grams = {tuple(whole[k : k + size]) for k in range(len(whole) - size + 1)}
            known = {tuple(contexts[i][k : k + size]) for k in range(len(contexts[i]) - size + 1)}
            old = [1, *prefix]
            before = {tuple(old[k : k + size]) for k in range(len(old) - size + 1)}
            assert not size or not (grams - before) & known
    # Alone, and with other padding.
    alone = [
        toy.decode(config, [i], padded([prefixes[i]], 6), padded([contexts[i]], 15))
        for i in range(4)
    ]
    for i, one in enumerate(alone):
        np.testing.assert_array_equal(one.tokens[0], ours.tokens[i])
        np.testing.assert_allclose(one.scores[0], ours.scores[i], rtol=1e-6)


def test_engine_decoding_prefix_does_not_change_what_follows():
    """A prefix that greedy search would take itself. Oracle: the answer without a prefix."""
    toy = Toy(30, 12, BLENDERBOT, seed=8)
    toy.table[..., 2] = NEVER
    config = DecodingConfig(6)
    whole = toy.decode(DecodingConfig(9))
    ours = toy.decode(config, prefix=whole.tokens[:, 0, :3])
    np.testing.assert_array_equal(ours.tokens[:, 0], whole.tokens[:, 0, 3:])
    first = [
        sum(toy.logp(i, t[:k])[t[k]] for k in range(3)) for i, t in enumerate(whole.tokens[:, 0])
    ]
    np.testing.assert_allclose(ours.scores[:, 0] + first, whole.scores[:, 0], rtol=1e-5)


def test_engine_decoding_defaults_trace_no_limits():
    """A context that no limit reads changes no program. Oracle: the program without it."""

    def program(config, context):
        def run(table):
            cache = ToyCache(jnp.arange(2), jnp.zeros(2, jnp.int32))
            return decoding.decode(
                lambda tokens, index, cache: (table[cache.input_R, cache.state_R], cache),
                cache, 2, config, context_BS=context,
            )  # fmt: skip

        return jax.make_jaxpr(run)(jnp.zeros((2, STATES, 12)))

    for search in SEARCHES.values():
        config = DecodingConfig(5, **search)
        plain = program(config, None)
        text = str(plain)
        assert str(program(config, np.ones((2, 4), np.int32))) == text
        more = program(dataclasses.replace(config, min_length=2), None)
        assert len(str(more)) > len(text)  # so that the comparison can fail


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"search": "beam"}, "search=beam; it must be one of t5x, parlai, huggingface"),
        ({"min_length": -1}, "min_length=-1; it must be 0 (off) or above"),
        ({"min_length": 9, "max_new_tokens": 9}, "below max_new_tokens=9"),
        ({"block_ngram": -1}, "block_ngram=-1"),
        ({"context_block_ngram": -3}, "context_block_ngram=-3"),
        ({"banned_ids": 5}, "banned_ids=5; it must be token ids, such as (3, 8004)"),
        ({"banned_ids": (5, -1)}, "banned_ids=(5, -1)"),
        ({"banned_ids": (5, 1.5)}, "banned_ids=(5, 1.5)"),
        ({"banned_ids": "5"}, "banned_ids='5'"),
        ({"beam_size": 2, "early_stopping": True}, "search='t5x'"),
    ],
)  # fmt: skip
def test_engine_decoding_limits_errors(fields, words):
    """A setting that cannot work is refused with its name, value and rule. Oracle: DESIGN."""
    with pytest.raises(UserError) as error:
        DecodingConfig(**fields)
    assert words in str(error.value)


def test_engine_decoding_banned_ids_of_the_vocabulary():
    """Oracle: ids are below the vocabulary's size, and an answer must be able to end."""
    config = DecodingConfig(banned_ids=[3, 8008])
    assert config.banned_ids == (3, 8008)
    with pytest.raises(
        UserError, match="banned_ids has 8008; ids of this vocabulary are 0 to 8007"
    ):
        config.check(8008, BLENDERBOT, 128)
    with pytest.raises(UserError, match="banned_ids has 2, which ends an answer"):
        DecodingConfig(banned_ids=(2,)).check(8008, BLENDERBOT, 128)
    with pytest.raises(UserError, match="max_new_tokens=129; this network has 128 positions"):
        DecodingConfig(max_new_tokens=129).check(8008, BLENDERBOT, 128)
