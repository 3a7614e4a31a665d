"""Attention in one kernel, interpreted on a CPU. Oracle: plain attention, if not said otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import fused_attention, layers, models, partitioning
from cosmo.engine.scale import chips, hlo, hlo_cost, sizing
from tests.engine.test_engine_t5 import bucket_by_the_paper


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and kind of one attention; T, S and H as in `layers`."""

    queries: int
    keys: int
    heads: int = 2
    head_dim: int = 8
    biased: bool = False
    causal: bool = False
    dtype: str = "float32"
    rows: int = 2


def relative_bias(case: Case) -> layers.RelativePositionBias:
    """A table of 32 buckets up to distance 128."""
    return layers.RelativePositionBias(
        case.heads, 32, 128, bidirectional=not case.causal, rngs=nnx.Rngs(0)
    )


def segments(rng, rows: int, length: int) -> jax.Array:
    """Three segments of random lengths a row, then padding; the last row is padding alone."""
    ids = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    ids[:, length - length // 8 :] = 0
    ids[-1] = 0
    return jnp.asarray(ids, jnp.int32)


def both(case: Case):
    """Outputs and gradients, (fused, plain): dicts of float32 arrays."""
    rng = np.random.default_rng(0)
    bias = relative_bias(case)
    query_BT = segments(rng, case.rows, case.queries)
    key_BS = query_BT if case.queries == case.keys else segments(rng, case.rows, case.keys)

    def array(length: int) -> jax.Array:
        shape = case.rows, length, case.heads, case.head_dim
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    given = {"q": array(case.queries) / 4, "k": array(case.keys), "v": array(case.keys)}
    if case.biased:
        given["table"] = jnp.asarray(rng.standard_normal((case.heads, 32)), jnp.float32)
    grad = array(case.queries)

    def fused(q, k, v, table=None):
        buckets = bias.buckets() if case.biased else ()
        how = {"causal": case.causal, "buckets": buckets, "interpret": True}
        return fused_attention.fused_attention(q, k, v, query_BT, key_BS, table, **how)

    def plain(q, k, v, table=None):
        logits = jnp.einsum("BTHK,BSHK->BHTS", q, k).astype(jnp.float32)
        if table is not None:
            distances = jnp.arange(case.keys)[None] - jnp.arange(case.queries)[:, None]
            both_ways = {"bidirectional": not case.causal}
            logits += table[:, layers.relative_position_bucket(distances, **both_ways)]
        mask = layers.segment_mask(query_BT, key_BS)
        if case.causal:
            mask &= jnp.tril(jnp.ones((case.queries, case.keys), bool))
        weights = jax.nn.softmax(logits + layers.mask_bias(mask), axis=-1).astype(v.dtype)
        return jnp.einsum("BHTS,BSHK->BTHK", weights, v)

    def run(attend):
        out, back = jax.vjp(lambda given: attend(**given), given)
        found = {"out": out, **back(grad)[0]}
        return {name: np.asarray(x, np.float32) for name, x in found.items()}

    return run(fused), run(plain)


CASES = {
    "encoder, odd length": Case(37, 37, biased=True),
    "decoder, two blocks of queries": Case(150, 150, biased=True, causal=True, rows=3),
    "across, three heads in one block": Case(20, 150, heads=3, head_dim=16),
    "two blocks of heads": Case(20, 20, heads=4, head_dim=64, biased=True),
    "bfloat16": Case(150, 150, biased=True, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_attention_equals_plain_attention(case):
    """Output and gradients, the table's too, with segments, padding and a row of padding alone."""
    fused, plain = both(case)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    assert set(fused) == {"out", "q", "k", "v", *(["table"] if case.biased else [])}
    for name, expected in plain.items():
        limit = tolerance * np.max(np.abs(expected))
        np.testing.assert_allclose(fused[name], expected, atol=limit, err_msg=name)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_begin_where_the_paper_says(bidirectional):
    """Every distance up to 300. Oracle: the paper's rule, in whole numbers."""
    bias = layers.RelativePositionBias(1, 32, 128, bidirectional=bidirectional, rngs=nnx.Rngs(0))
    begins, names = zip(*bias.buckets(), strict=True)
    for distance in range(-300, 301):
        found = names[np.searchsorted(begins, distance, side="right") - 1]
        assert found == bucket_by_the_paper(distance, bidirectional), distance


def network(model, **changes):
    return dataclasses.replace(model, network=dataclasses.replace(model.network, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_rate": 0.2, "remat_policy": "minimal"},
        pytest.param({"relative_attention_per_layer": True}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": False, "remat_policy": "full"}, marks=pytest.mark.slow),
    ],
    ids=["scanned with dropout", "a table a layer", "unrolled"],
)
def test_a_network_learns_the_same(model, packed, make_params, loss_and_grads, changes):
    """Loss and gradients on packed rows; dropout takes the same random numbers."""
    plain, fused = (network(model, attention=a, **changes) for a in ("plain", "fused"))
    params = make_params(plain)
    key = jax.random.key(5) if "dropout_rate" in changes else None
    (expected, _), expected_grads = loss_and_grads(plain, params, packed, key)
    (loss, _), grads = loss_and_grads(fused, params, packed, key)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b)))),
        grads,
        expected_grads,
    )


def test_cudnn_is_called_with_the_same_attention(
    model, params, packed, loss_and_grads, monkeypatch
):
    """Bias, mask and scale of the call to cuDNN. JAX's own implementation stands in for a GPU's."""
    monkeypatch.setattr(partitioning, "platform", lambda: "gpu")
    called, given = [], jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **settings):
        called.append(implementation)
        return given(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    (expected, _), expected_grads = loss_and_grads(model, params, packed, None)
    (loss, _), grads = loss_and_grads(network(model, attention="cudnn"), params, packed, None)
    assert set(called) == {"cudnn"}
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b)))),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize(
    "attention, platform, words",
    [
        ("flash", "cpu", ["'flash'", "'fused'", "'plain'"]),
        ("cudnn", "cpu", ["'cudnn'", "gpu", "cpu"]),
        ("fused", "gpu", ["'fused'", "tpu", "gpu"]),
    ],
)
def test_attention_of_another_device_is_an_error(
    model, packed, monkeypatch, attention, platform, words
):
    """One line that names the setting, the value and the remedy."""
    monkeypatch.setattr(partitioning, "platform", lambda: platform)

    def trace():
        other = network(model, attention=attention)
        jax.eval_shape(lambda p: models.loss(other, p, packed)[0], models.abstract_params(other))

    with pytest.raises(UserError) as error:
        trace()
    assert all(word in str(error.value) for word in words) and error.value.settings == (
        "ATTENTION",
    )


def test_lengths_without_room_are_an_error():
    """Heads of 4,096 keys need more than a chip's 16 MiB: an error, not the compiler's."""
    big = jnp.zeros((1, 4096, 2, 64), jnp.bfloat16)
    ids = jnp.ones((1, 4096), jnp.int32)
    with pytest.raises(UserError, match="4096 queries and 4096 keys"):
        jax.eval_shape(
            lambda: fused_attention.fused_attention(big, big, big, ids, ids, causal=True)
        )


def test_attention_is_chosen_by_chip_and_length(model, packed):
    """Fused on a TPU v4, plain on a v3, a GPU and for lengths without room. Oracle: the docs."""
    left_open = network(model, attention="auto")
    # 16,384 queries and keys have bands of 256 MiB.
    long = {name: jax.ShapeDtypeStruct((1, 2**14), jnp.int32) for name in packed}

    def chosen(model, batch, name):
        return sizing.choose_attention(model, batch, chips.CHIPS[name]).network.attention

    assert [chosen(left_open, packed, name) for name in ("v4", "v5e", "v3", "h100", "cpu")] == [
        "fused",
        "fused",
        "plain",
        "plain",
        "plain",
    ]
    assert chosen(left_open, long, "v4") == "plain"
    assert chosen(network(model, attention="cudnn"), packed, "v4") == "cudnn"


def test_no_scores_are_kept(model, packed):
    """With "none", which keeps all activations, the plain network keeps arrays [B, H, T, S].

    Property: the fused network keeps none of them.
    """
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in packed.items()}
    scores = {(2, 24, 24), (2, 16, 16), (2, 16, 24)}

    def kept(attention):
        arrays = sizing.kept_activations(network(model, attention=attention), batch, "none")
        return scores & {array.shape[-3:] for array in arrays}

    assert kept("plain") == scores
    assert not kept("fused")


def kernels(jaxpr):
    """The kernels of a jaxpr, by name."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found[str(equation.params["name"])] = equation.params["cost_estimate"]
        for inner in core.jaxprs_in_params(equation.params):
            found.update(kernels(inner))
    return found


def test_the_kernel_estimates_what_plain_attention_computes():
    """Products and bytes of whole blocks.

    Oracles: the products of plain attention and of its gradients as XLA compiles them; the bytes
    of all arrays by hand.
    """
    shape = rows, length, heads, size = 2, 256, 4, 64
    q = jax.ShapeDtypeStruct(shape, jnp.float32)
    ids = jnp.ones((rows, length), jnp.int32)
    table = jax.ShapeDtypeStruct((heads, 32), jnp.float32)
    bias = layers.RelativePositionBias(heads, 32, 128, bidirectional=True, rngs=nnx.Rngs(0))

    def fused(q, k, v, table):
        return fused_attention.fused_attention(
            q, k, v, ids, ids, table, causal=False, buckets=bias.buckets()
        ).sum()

    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", q, k))
        return jnp.einsum("BHTS,BSHK->BTHK", weights, v)

    def products(function, *arrays) -> float:
        text = jax.jit(function).lower(*arrays).compile().as_text()
        return hlo_cost.cost(hlo.parse(text)).matmul_flops

    def plain_gradients(q, k, v, grad):
        return jax.vjp(plain, q, k, v)[1](grad)

    found = kernels(jax.make_jaxpr(jax.grad(fused, (0, 1, 2, 3)))(q, q, q, table).jaxpr)
    one = 2 * rows * heads * length * length * size
    forward, backward = found["attention_forward"], found["attention_backward"]
    assert forward.flops == products(plain, q, q, q) == 2 * one
    assert backward.flops == products(plain_gradients, q, q, q, q) == 5 * one
    array = 4 * rows * length * heads * size
    # Two blocks of two heads each read both rows of segment ids.
    ids_and_table = 2 * 2 * 4 * rows * length + 4 * heads * 32
    assert forward.bytes_accessed == 4 * array + ids_and_table
    assert backward.bytes_accessed == 7 * array + ids_and_table + 4 * heads * 32 * 128


def test_a_kernel_in_a_loop_counts_by_its_estimate():
    """A custom call of 100 operations and 7 bytes, 24 times. Oracle: by hand."""
    kernel = (
        '%y = f32[8,32]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"100",'
        '"transcendentals":"5","bytes_accessed":"7","remote_bytes_transferred":"0"}}}'
    )
    from tests.engine.test_engine_hlo import LOOP

    line = "%y = f32[8,32]{1,0} fusion(%x, %w), kind=kOutput, calls=%product"
    assert line in LOOP
    text = LOOP.replace("FIRST", "0").replace("STEP", "1").replace(line, kernel)
    found = hlo_cost.cost(hlo.parse(text))
    assert (found.matmul_flops, found.kernel_flops, found.kernel_bytes) == (2400, 2400, 168)
