"""Optimizers on stacked layers, against plain optax on the same layers in a list."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import optimizer
from cosmo.engine.model.optimizer import Adafactor, AdamW, LearningRateSchedule

STEPS = 4
DEPTH = {"encoder": 3, "decoder": 2}
# Of each layer: a matrix that is factored, one that is too small, a vector.
SHAPES = {"attention": {"query": (8, 12), "small": (2, 12)}, "norm": {"scale": (8,)}}


def is_shape(x):
    return isinstance(x, tuple)


@pytest.fixture(scope="module")
def stacked():
    """(parameters, STEPS gradients), layers stacked; each tensor and layer on its own scale."""
    rng = np.random.default_rng(0)

    def tree(scale):
        def array(shape):
            return jnp.asarray(scale * rng.lognormal() * rng.standard_normal(shape), jnp.float32)

        def stack(depth):
            layers = [jax.tree.map(array, SHAPES, is_leaf=is_shape) for _ in range(depth)]
            return jax.tree.map(lambda *a: jnp.stack(a), *layers)

        return {
            "token_embedder": array((20, 8)),
            "encoder": {"layers": stack(3), "encoder_norm": {"scale": array((8,))}},
            "decoder": {"layers": stack(2), "logits_dense": array((8, 20))},
        }

    return tree(1.0), [tree(10.0 ** (1 - k)) for k in range(STEPS)]


def unstack(tree):
    """The same tree with a list of layers, as an unstacked network has them."""
    return {
        **tree,
        **{
            side: {
                **tree[side],
                "layers": [
                    jax.tree.map(lambda a, i=i: a[i], tree[side]["layers"])
                    for i in range(DEPTH[side])
                ],
            }
            for side in DEPTH
        },
    }


def run(transformation, params, gradients, rate=1.0):
    """Parameters after every step. `rate` multiplies the update, as the train step does."""
    init, update = (jax.jit(f) for f in (transformation.init, transformation.update))
    state, out = init(params), []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
        out.append(params)
    return out


def assert_same(ours, expected, rtol=2e-5):
    ours, expected = (dict(jax.tree_util.tree_leaves_with_path(t)) for t in (ours, expected))
    assert ours.keys() == expected.keys()
    for path in expected:
        scale = float(jnp.max(jnp.abs(expected[path])))
        assert np.isfinite(scale), path
        np.testing.assert_allclose(ours[path], expected[path], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize(
    "fields, optax_fields",
    [
        ({}, {}),
        ({"decay_rate": 0.6, "clipping_threshold": None}, {}),
        ({"multiply_by_parameter_scale": False, "clipping_threshold": 0.3}, {}),
        ({"beta1": 0.9}, {"momentum": 0.9}),
    ],
    ids=["default", "decay", "unscaled", "momentum"],
)
def test_engine_optimizer_adafactor_per_layer(stacked, fields, optax_fields):
    """Factoring, clipping and scale are each layer's own. Oracle: optax.adafactor on the layers."""
    rate = 0.05
    ours = optimizer.build(Adafactor(min_dim_size_to_factor=4, **fields))
    own_names = {"beta1"}
    theirs = optax.adafactor(
        rate,
        min_dim_size_to_factor=4,
        **{k: v for k, v in fields.items() if k not in own_names},
        **optax_fields,
    )
    params, gradients = stacked
    expected = run(theirs, unstack(params), [unstack(g) for g in gradients])
    for mine, plain in zip(run(ours, params, gradients, rate), expected, strict=True):
        assert_same(unstack(mine), plain)


def test_engine_optimizer_adafactor_factors_within_a_layer(stacked):
    """Rows and columns are a layer's: [L, 8] and [L, 12], never the layer axis. By hand."""
    params, _ = stacked
    state = optimizer.build(Adafactor(min_dim_size_to_factor=3)).init(params)
    shapes = {a.shape for a in jax.tree.leaves(state["stacks"]["encoder/layers"])}
    assert {(3, 8), (3, 12), (3, 2, 12)} <= shapes
    assert (3, 8, 12) not in shapes  # the factored matrix has no full second moment
    assert (8, 12) not in shapes


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_engine_optimizer_adamw(stacked, decay):
    """AdamW on stacks, its decay included. Oracle: optax.adamw on the list of layers."""
    params, gradients = stacked
    ours = optimizer.build(AdamW(b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay))
    theirs = optax.adamw(0.02, b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay)
    expected = run(theirs, unstack(params), [unstack(g) for g in gradients])
    for mine, plain in zip(run(ours, params, gradients, 0.02), expected, strict=True):
        assert_same(unstack(mine), plain)


def test_engine_optimizer_adam_at_a_constant_rate(stacked):
    """AdamW's defaults are plain Adam (Kingma and Ba 2015, algorithm 1) at 1e-5, as optax.adam and
    PyTorch's Adam have it. Oracle: the paper's formula in float64, and optax.adam."""
    params, gradients = stacked
    rate = LearningRateSchedule("constant", base_learning_rate=1e-5)
    assert [float(rate(step)) for step in (0, 1, 81_000)] == [float(np.float32(1e-5))] * 3
    zeros = jax.tree.map(jnp.zeros_like, params)  # what Adam adds does not depend on them
    first = second = moved = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for step, grads in enumerate(gradients, 1):
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        means = jax.tree.map(lambda m, step=step: m / (1 - 0.9**step), first)
        roots = jax.tree.map(lambda v, step=step: np.sqrt(v / (1 - 0.999**step)), second)
        moved = jax.tree.map(lambda p, m, r: p - 1e-5 * m / (r + 1e-8), moved, means, roots)
    assert_same(run(optimizer.build(AdamW()), zeros, gradients, rate(0))[-1], moved, rtol=1e-4)
    assert_same(run(optax.adam(1e-5), zeros, gradients)[-1], moved, rtol=1e-4)


def test_engine_optimizer_adamw_weight_decay_by_hand():
    """Without a gradient AdamW only decays: p * (1 - rate * decay) a step. Oracle: by hand."""
    params = {"w": jnp.array([2.0, -4.0]), "a": {"layers": {"w": jnp.array([[1.0], [3.0]])}}}
    none = jax.tree.map(jnp.zeros_like, params)
    after = run(optimizer.build(AdamW(weight_decay=0.5)), params, [none] * 2, rate=0.1)[-1]
    np.testing.assert_allclose(after["w"], [2 * 0.95**2, -4 * 0.95**2], rtol=1e-6)
    np.testing.assert_allclose(after["a"]["layers"]["w"], [[0.95**2], [3 * 0.95**2]], rtol=1e-6)


# torch.optim.Adam (PyTorch 2.13, float64) with lr=0.1, betas=(0.9, 0.9), eps=1e-8 from START on the
# gradients of `slopes`: {steps done: parameters}; the last row is torch.optim.AdamW with
# weight_decay=0.05. The plain Adam's own are (-0.356, -2.303, -0.510, 2.339) after 20 steps.
START = [1.0, -2.0, 0.5, 3.0]
TORCH_AMSGRAD = {
    1: [0.9000000001, -2.0, 0.4000000003333333, 2.9000000999999],
    2: [0.80154545236086, -2.072547623822606, 0.3347071381234323, 2.8042913697566423],
    5: [0.528208744548319, -2.2560530604460687, 0.21377053371422255, 2.8211818380675417],
    20: [-0.08509453806032613, -2.2988720343416205, -0.4231785294822216, 2.35689566804414],
}
TORCH_AMSGRAD_DECAYED = [
    *(-0.11491694034467795, -2.0853560231327535, -0.4238176122930171, 2.0983627940783447)
]


def slopes(step):
    """Gradients that shrink, swing, come every fifth step, and jump: float64 [4]."""
    return np.array(
        [10 * 0.7**step, np.sin(step), 3.0 * (step % 5 == 0), 0.01 * np.cos(step * step)]
    )


def test_engine_optimizer_amsgrad():
    """AMSGrad, with decay too, in stacks and outside. Oracle: PyTorch's numbers, recorded.

    optax.amsgrad and plain Adam, which compute something else, are far from them.
    """
    start = jnp.asarray(START, jnp.float32)
    params = {"w": start, "a": {"layers": {"w": jnp.stack([start, start])}}}

    def gradients(tree):
        return [
            jax.tree.map(lambda p, s=s: jnp.broadcast_to(slopes(s), p.shape), tree)
            for s in range(20)
        ]

    betas = dict(b1=0.9, b2=0.9)
    ours = run(optimizer.build(AdamW(**betas, amsgrad=True)), params, gradients(params), 0.1)
    for step, expected in TORCH_AMSGRAD.items():
        rows = [ours[step - 1]["w"], *ours[step - 1]["a"]["layers"]["w"]]
        for row in rows:
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    decayed = AdamW(**betas, amsgrad=True, weight_decay=0.05)
    found = run(optimizer.build(decayed), params, gradients(params), 0.1)[-1]["w"]
    np.testing.assert_allclose(found, TORCH_AMSGRAD_DECAYED, rtol=1e-5, atol=1e-6)
    for other in (optax.amsgrad(0.1, **betas), optax.adam(0.1, **betas)):
        found = run(other, {"w": start}, gradients({"w": start}))[-1]["w"]
        assert float(jnp.max(jnp.abs(found - jnp.asarray(TORCH_AMSGRAD[20])))) > 0.2


def test_engine_optimizer_max_grad_norm_is_global(stacked):
    """Clipping scales all gradients, stacks too, by max / norm, and leaves a small norm alone.

    Oracle: gradients clipped by hand in numpy, then the optimizer without clipping.
    """
    params, gradients = stacked
    norms = [
        np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))) for grads in gradients
    ]
    limit = float(np.median(norms))
    assert norms[0] > 2 * limit and norms[-1] < limit / 2
    clipped = [
        jax.tree.map(lambda g, n=n: g * min(1.0, limit / n), grads)
        for grads, n in zip(gradients, norms, strict=True)
    ]
    config = AdamW(b1=0.5)
    expected = run(optimizer.build(config), params, clipped)
    unclipped = run(optimizer.build(config), params, gradients)
    ours = run(optimizer.build(config, max_grad_norm=limit), params, gradients)
    assert_same(ours[-1], expected[-1])
    assert not np.allclose(ours[-1]["token_embedder"], unclipped[-1]["token_embedder"], rtol=1e-2)


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_engine_optimizer_max_grad_norm_must_be_positive(norm):
    """A limit of zero or less is refused, with its name and value. Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError, match=f"max_grad_norm={norm}"):
        optimizer.build(AdamW(), max_grad_norm=norm)


@pytest.mark.parametrize("config", [Adafactor(min_dim_size_to_factor=4), AdamW(weight_decay=0.1)])
def test_engine_optimizer_rate_zero_changes_nothing(stacked, config):
    """At learning rate 0 parameters stay exactly, decay or not. Property."""
    params, gradients = stacked
    for after in run(optimizer.build(config), params, gradients, rate=0.0):
        jax.tree.map(np.testing.assert_array_equal, after, params)


def test_engine_optimizer_keeps_the_tree(stacked):
    """Updates have the parameters' tree, shapes and key order, and move every tensor. Property."""
    params, gradients = stacked
    after = run(optimizer.build(Adafactor()), params, gradients[:1], rate=0.1)[0]
    assert jax.tree.structure(after) == jax.tree.structure(params)
    moved = jax.tree.map(lambda a, b: bool(np.all(np.any(a != b))), after, params)
    assert all(jax.tree.leaves(moved))
