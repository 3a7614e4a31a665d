"""The T5 network: who sees whom, position buckets, numerics that must not change a result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import models, step, t5
from cosmo.engine.model.layers import MLP, RMSNorm, dropout, relative_position_bucket
from cosmo.engine.model.transformer import scan_stack


@pytest.fixture(scope="module")
def influence(model, params, jit):
    """(|d logits[t] / d decoder input[u]| [T, T], the same for encoder input[s] [T, S]).

    Encoder positions 5 and 6 are padding. Logits are projected on a random direction, so that no
    gradients cancel.
    """
    length, source = 6, 7
    rng = np.random.default_rng(0)
    direction_V = jnp.asarray(rng.standard_normal(model.network.vocab_size), jnp.float32)
    x_TM, x_SM = (
        jnp.asarray(rng.standard_normal((n, model.network.emb_dim)), jnp.float32)
        for n in (length, source)
    )
    segments_1S = jnp.asarray([[1, 1, 1, 1, 1, 0, 0]])
    segments_1T = jnp.ones((1, length), jnp.int32)

    def logits(x_TM, x_SM):
        network = models.bind(model, params)
        encoded = network.encoder(x_SM[None], segments_1S)
        x = network.decoder(x_TM[None], encoded, segments_1T, segments_1S)
        return network.logits(x)[0] @ direction_V

    by_decoder, by_encoder = jit(jax.jacrev(logits, (0, 1)))(x_TM, x_SM)
    return np.max(np.abs(by_decoder), axis=-1), np.max(np.abs(by_encoder), axis=-1)


def test_engine_t5_decoder_is_causal(influence):
    """A logit depends on every input up to its own position and on none after.

    Property, by gradients (as nanodo's test): exactly 0 above the diagonal, not 0 below and on it.
    """
    by_decoder, _ = influence
    future = np.triu(np.ones_like(by_decoder), 1) > 0
    assert np.all(by_decoder[future] == 0.0)
    assert np.all(by_decoder[~future] > 1e-5)


def test_engine_t5_encoder_padding_has_no_influence(influence):
    """Every logit sees all encoder inputs but padding. Property, by gradients: exactly 0 there."""
    _, by_encoder = influence
    assert np.all(by_encoder[:, 5:] == 0.0)
    assert np.all(by_encoder[:, :5] > 1e-5)


def bucket_by_the_paper(relative: int, bidirectional: bool, buckets=32, farthest=128) -> int:
    """Raffel et al. 2020, section 2.1, in whole numbers.

    Half the buckets (of a side) hold one distance each; bucket `exact + j` of the other half starts
    where distance / exact reaches (farthest / exact) ** (j / (buckets - exact)); the last holds
    everything beyond. Raised to the power of buckets - exact, no number is rounded.
    """
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    large = buckets - exact
    j = 0
    while j + 1 < large and distance**large * exact ** (j + 1) >= exact**large * farthest ** (
        j + 1
    ):
        j += 1
    return first + exact + j


@pytest.mark.parametrize("bidirectional", [True, False])
def test_engine_t5_relative_position_bucket(bidirectional):
    """Buckets of every distance up to 300 and of extremes. Oracle: the paper's rule, above."""
    extremes = [10_000, 2**20, 2**30]
    positions = [*range(-300, 301), *extremes, *(-p for p in extremes)]
    ours = relative_position_bucket(np.array(positions, np.int32), bidirectional=bidirectional)
    expected = [bucket_by_the_paper(p, bidirectional) for p in positions]
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)


def test_engine_t5_relative_position_bucket_by_hand():
    """A few buckets. Oracle: hand calculation; 16 = 8 * 16 ** (2/8), 64 = 16 * 8 ** (2/3)."""
    both = functools.partial(relative_position_bucket, bidirectional=True)
    past = functools.partial(relative_position_bucket, bidirectional=False)
    positions = jnp.array([0, -1, -7, -8, -16, -127, -128, -999, 1, 7, 8, 16, 128])
    expected = [0, 1, 7, 8, 10, 15, 15, 15, 17, 23, 24, 26, 31]
    np.testing.assert_array_equal(both(positions), expected)
    positions = jnp.array([0, 5, -1, -15, -16, -64, -128, -999])
    np.testing.assert_array_equal(past(positions), [0, 0, 1, 15, 16, 26, 31, 31])


@pytest.fixture(scope="module")
def reference(model, params, packed, loss_and_grads):
    """Loss, sums and gradients of the scanned network with dropout, without recomputation."""
    model = with_network(model, dropout_rate=0.2)
    return loss_and_grads(model, params, packed, jax.random.key(5))


def with_network(model, **changes):
    return dataclasses.replace(model, network=dataclasses.replace(model.network, **changes))


@pytest.mark.parametrize(
    "scan_layers, remat_policy",
    [(True, "minimal"), pytest.param(True, "full", marks=pytest.mark.slow), (False, "none")],
)
def test_engine_t5_scan_and_remat_change_no_number(
    model, params, packed, loss_and_grads, reference, scan_layers, remat_policy
):
    """Scanned or unrolled, recomputed or kept: the same loss and gradients, dropout's mask too.

    Oracle: scan_layers=True, remat_policy="none".
    """
    model = with_network(
        model, dropout_rate=0.2, scan_layers=scan_layers, remat_policy=remat_policy
    )
    (loss, _), grads = loss_and_grads(model, params, packed, jax.random.key(5))
    (expected, _), expected_grads = reference
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b)))),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize("policy, saves", [("none", True), ("minimal", True), ("full", False)])
def test_engine_t5_remat_policy_decides_what_is_kept(model, params, packed, capsys, policy, saves):
    """Only "full" forgets the [L, B, T, F] feed-forward of every layer until the backward pass.

    Oracle: the residuals as jax.ad_checkpoint.print_saved_residuals lists them.
    """
    model = with_network(model, remat_policy=policy)
    print_saved_residuals(lambda p: models.loss(model, p, packed)[0], params)
    layers, hidden = model.network.num_decoder_layers, model.network.mlp_dim
    listing = capsys.readouterr().out
    assert f"f32[{layers},16,16] from the argument" in listing  # kernels, whatever the policy
    assert (f"f32[{layers},8,16,{hidden}]" in listing) == saves


def test_engine_t5_initialisation(tiny_config, jit):
    """How a fresh network is drawn. Oracle: the formulas of T5X's network.py.

    Kernels have variance 1 / fan_in, queries 1 / head_dim of it, embeddings 1, relative positions
    1 / fan_avg; norm scales are ones. The rms of n numbers may be five sampling errors off.
    """
    c = tiny_config(vocab_size=384, emb_dim=64, num_heads=4, head_dim=16, mlp_dim=96)
    model = models.EncoderDecoderModel(c)
    init = jit(models.init, static_argnums=0)
    fresh = init(model, jax.random.key(3))

    def check(path, array):
        name = path[-1].key
        if name == "scale":
            assert np.all(array == 1.0)
            return
        variance = {
            "token_embedder": 1.0,
            "rel_embedding": 2 / (c.num_heads + 32),
            "query": 1 / (c.emb_dim * c.head_dim),
        }.get(name, 1 / array.shape[-2])
        error = 5 / np.sqrt(2 * array.size)
        assert np.mean(array**2) == pytest.approx(variance, rel=2 * error), path
        assert abs(np.mean(array)) <= 5 * np.sqrt(variance / array.size), path
        if "layers" in [entry.key for entry in path]:
            assert not np.array_equal(array[0], array[1]), f"{path}: layers share their numbers"

    jax.tree_util.tree_map_with_path(check, fresh)
    other = init(model, jax.random.key(4))
    assert np.any(other["token_embedder"] != fresh["token_embedder"])


def test_engine_t5_bfloat16_is_close_to_float32(model, params, packed, logits_of):
    """bfloat16 has 8 bits: logits within 5% (of their norm) of float32's, and not equal to them.

    Oracle: the float32 network. Logits are float32 in both.
    """
    exact = logits_of(model, params, packed)
    rough = logits_of(with_network(model, dtype="bfloat16"), params, packed)
    assert exact.dtype == rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_engine_t5_bfloat16_keeps_its_parameters_in_float32(model, packed):
    """Parameters, Adafactor's state and sums of a bfloat16 run are float32. Property (types)."""
    model = with_network(model, dtype="bfloat16", dropout_rate=0.1)
    config = step.StepConfig()
    state = jax.eval_shape(lambda: step.init_state(model, config, 0))
    after, sums = jax.eval_shape(step.make_train_step(model, config, 0), state, packed)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    floating = [a.dtype for a in jax.tree.leaves((after, sums)) if a.dtype != jnp.int32]
    assert set(floating) == {np.dtype(np.float32)}


def test_engine_t5_dropout_function():
    """Kept numbers are scaled by 1 / (1 - rate), in the fraction 1 - rate. Oracle: the definition.

    The mask is shared along the axis before last (T5X's broadcast_dims=(-2,)).
    """
    x = jnp.arange(1.0, 1 + 400 * 3 * 50).reshape(400, 3, 50)
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    kept = y != 0.0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
    np.testing.assert_array_equal(kept[:, 0], kept[:, 1])
    np.testing.assert_array_equal(kept[:, 0], kept[:, 2])
    draws = kept[:, 0]  # 20,000 of them: five standard errors are 0.0153
    assert abs(np.mean(draws) - 0.75) < 0.0153
    ones = np.asarray(dropout(jnp.ones((400, 3, 50)), 0.25, jax.random.key(1)))
    assert abs(np.mean(ones) - 1.0) < 0.0153 / 0.75


def test_engine_t5_dropout_needs_a_key_and_a_rate():
    """No key or no rate: the very same array. The same key: the same mask. Property."""
    x = jnp.ones((4, 8, 16))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    once, again, other = (dropout(x, 0.5, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_engine_t5_layers_drop_independently(model, params, scan_layers):
    """Every layer of a stack gets a key of its own. Oracle: the variance of uniform numbers.

    The sum of 3 independent ones has variance 3/12; with one key for all it would have 9/12.
    """
    c = dataclasses.replace(model.network, scan_layers=scan_layers)
    layers = models.bind(model, params).decoder.layers
    total = scan_stack(
        layers, 3, c, jnp.zeros(4000), jax.random.key(0),
        lambda layer, x, key: x + jax.random.uniform(key, x.shape),
    )  # fmt: skip
    assert float(jnp.mean(total)) == pytest.approx(1.5, abs=0.05)
    assert float(jnp.var(total)) == pytest.approx(0.25, abs=0.03)


def test_engine_t5_network_dropout(model, params, packed, logits_of, loss_and_grads, reference):
    """The network drops with a key only, and the key alone decides what. Property.

    Oracle without a key: the network of dropout_rate 0.
    """
    dropping = with_network(model, dropout_rate=0.2)
    (loss, _), _ = reference
    (same, _), _ = loss_and_grads(dropping, params, packed, jax.random.key(5))
    (other, _), _ = loss_and_grads(dropping, params, packed, jax.random.key(6))
    assert float(loss) == float(same)
    assert float(loss) != float(other)
    plain = logits_of(model, params, packed)
    # Two programs: equal to rounding.
    np.testing.assert_allclose(logits_of(dropping, params, packed), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_engine_t5_logical_axes_mirror_the_parameters(model, tied):
    """One name an axis, and "layers" first where layers are stacked. Property (trees, ranks)."""
    model = with_network(model, logits_via_embedding=tied)
    shapes, axes = models.abstract_params(model), models.logical_axes(model)
    ranks = jax.tree.map(lambda leaf, names: (len(leaf.shape), len(names)), shapes, axes)
    c = model.network
    sizes = {
        "embed": c.emb_dim,
        "norm": c.emb_dim,
        "vocab": c.vocab_size,
        "mlp": c.mlp_dim,
        "joined_kv": c.num_heads * c.head_dim,
        "heads": c.num_heads,
        "buckets": c.relative_attention_num_buckets,
    }
    for path, (rank, names) in jax.tree_util.tree_leaves_with_path(
        ranks, is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert rank == names, path

    def check(path, leaf, names):
        side = path[0].key
        stacked = "layers" in [entry.key for entry in path]
        assert (names[0] == "layers") == stacked, path
        depth = {"encoder": c.num_encoder_layers, "decoder": c.num_decoder_layers}.get(side)
        assert leaf.shape == tuple({**sizes, "layers": depth}[name] for name in names), path

    jax.tree_util.tree_map_with_path(check, shapes, axes)
    assert ("logits_dense" in shapes["decoder"]) != tied


def test_engine_t5_rms_norm_formula():
    """x / sqrt(mean(x ** 2) + 1e-6) * scale, no mean taken off. Oracle: numpy in float64."""
    norm = RMSNorm(5, rngs=t5.nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, 6.0)
    x = np.random.default_rng(0).standard_normal((3, 5)) * 1e-3 + 2e-3
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.arange(1, 6)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)


def test_engine_t5_gated_mlp_formula():
    """(gelu(x wi_0) * (x wi_1)) wo, gelu by tanh. Oracle: numpy (Shazeer 2020; Hendrycks 2016)."""
    mlp = MLP(4, 6, ("gelu", "linear"), rngs=t5.nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((2, 3, 4))
    first, second = x @ np.asarray(mlp.wi_0[...]), x @ np.asarray(mlp.wi_1[...])
    gelu = 0.5 * first * (1 + np.tanh(np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)))
    expected = (gelu * second) @ np.asarray(mlp.wo[...])
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mlp_activations": ("gelu", "gleu")}, ["T5Config.mlp_activations", "'gleu'", "'gelu'"]),
        ({"remat_policy": "some"}, ["T5Config.remat_policy", "'some'", "'minimal'"]),
        ({"dtype": "float16"}, ["T5Config.dtype", "'float16'", "'bfloat16'"]),
        ({"dropout_rate": 1.0}, ["T5Config.dropout_rate", "1.0", "DROPOUT_RATE"]),
        ({"dropout_rate": -0.1}, ["T5Config.dropout_rate", "-0.1"]),
    ],
)
def test_engine_t5_config_errors_name_the_setting(tiny_config, changes, words):
    """A bad size or name is refused: the value, what is allowed, its gin name. Oracle: DESIGN."""
    with pytest.raises(UserError) as error:
        tiny_config(**changes)
    for word in words:
        assert word in str(error.value)
