"""Compute the parts of a transformer: norm, attention, feed-forward, relative bias, dropout.

Every kernel is stored as a matrix, heads joined: `[M, H*K]`, as in T5X's minimal T5.

Shape suffixes: B batch, T and S query and key positions, M model, H heads, K head size,
F feed-forward, J = H*K joined heads.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import cpu_products, partitioning
from cosmo.engine.model.fused_attention import FAR, MASKED, Buckets, fused_attention

# Kernels are matrices because Adafactor factors matrices: other shapes would train otherwise.
NORM_EPSILON = 1e-6  # T5's
LAYER_NORM_EPSILON = 1e-5  # torch's, and so BlenderBot's
# The kernels that can compute attention, and their platforms: on a CPU, an interpreter for tests.
KERNELS = {"fused": ("tpu", "cpu"), "cudnn": ("gpu",)}

# T5X's initializer of kernels, so that a run from scratch starts alike.
fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ACTIVATIONS: dict[str, Callable] = {
    # T5 1.1's is the tanh approximation, HuggingFace's gelu_new.
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),  # BlenderBot's
    "linear": lambda x: x,
}


def param(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]):
    """Return a float32 parameter that carries the logical name of each of its axes."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def weight(kernel: nnx.Param, dtype, called: str = partitioning.GATHERED) -> jax.Array:
    """Return a parameter for a product: in the compute type, gathered if devices share it."""
    return partitioning.gather(kernel[...].astype(dtype), kernel.get_metadata("axes"), called)


def product(
    x: jax.Array, kernel: nnx.Param, dtype: str | None = None, called: str = partitioning.GATHERED
) -> jax.Array:
    """Return x [..., M] times a kernel [M, N], in x's type; factors are rounded to `dtype`."""
    dtype = dtype or x.dtype
    return times(x.astype(dtype), weight(kernel, dtype, called), x.dtype)


def product_of_copies(
    x_PBSM: jax.Array, kernel: nnx.Param, dtype: str | None, called: str
) -> jax.Array:
    """Return the `product` [B, S, N] of x and a kernel [M, N], from `partitioning.copies` of x.

    Copy p is multiplied by part p of the kernel's columns, which the same devices hold.
    """
    dtype = dtype or x_PBSM.dtype
    weights_MN = weight(kernel, dtype, called)
    weights_MPC = weights_MN.reshape(weights_MN.shape[0], x_PBSM.shape[0], -1)
    out_BSPC = jnp.einsum(
        "PBSM,MPC->BSPC",
        x_PBSM.astype(dtype),
        weights_MPC,
        preferred_element_type=x_PBSM.dtype,
    )
    out_BSN = out_BSPC.reshape(*out_BSPC.shape[:2], -1)
    # Policies of rematerialization take a batched product for one of activations: hence a name.
    return checkpoint_name(out_BSN, partitioning.PROJECTED)


def times(x: jax.Array, weights_MN: jax.Array, dtype) -> jax.Array:
    """Return x [..., M] times weights [M, N] in `dtype`.

    On CPUs gradients are computed in the form that is fast there.
    """
    same = x.dtype == weights_MN.dtype == jnp.dtype(dtype)
    if same and cpu_products.copies_transpose(x):
        return _times(x, weights_MN)
    return jnp.matmul(x, weights_MN, preferred_element_type=dtype)


@jax.custom_vjp
def _times(x, weights_MN):
    return x @ weights_MN


def _times_forward(x, weights_MN):
    return x @ weights_MN, (x, weights_MN)


def _times_backward(kept, grad):
    x, weights_MN = kept
    x_TM, grad_TN = (a.reshape(-1, a.shape[-1]) for a in (x, grad))
    return grad @ weights_MN.T, cpu_products.transposed_product(x_TM, grad_TN)


_times.defvjp(_times_forward, _times_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, shared: bool = True) -> jax.Array:
    """Return `x` [..., T, M] under inverted dropout; without a key or a rate, `x` itself.

    If `shared`, all positions have one mask, as in T5X.
    """
    if key is None or rate == 0.0:
        return x
    shape = (*x.shape[:-2], 1, x.shape[-1]) if shared else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Return `count` keys from one, or `count` Nones from None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Norm(NamedTuple):
    """The arrays of a norm. With a bias it is the usual layer norm, without T5's."""

    scale_M: jax.Array
    bias_M: jax.Array | None = None


class RMSNorm(nnx.Module):
    """T5's layer norm, by the root mean square: [..., M] to [..., M]."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, nnx.initializers.ones, (dim,), ("norm",))

    def arrays(self) -> Norm:
        """Return the norm's arrays, for `normalize`."""
        return Norm(self.scale[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x` divided by its root mean square, times the scale."""
        return rms_norm(x, self.scale[...])


class LayerNorm(nnx.Module):
    """The usual layer norm, by mean and variance, with a bias: [..., M] to [..., M]."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, nnx.initializers.ones, (dim,), ("norm",))
        self.bias = param(rngs, nnx.initializers.zeros, (dim,), ("norm",))

    def arrays(self) -> Norm:
        """Return the norm's arrays, for `normalize`."""
        return Norm(self.scale[...], self.bias[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x` with mean 0 and variance 1, times the scale, plus the bias."""
        return normalize(x, self.arrays())


def new_norm(dim: int, use_bias: bool, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """Return a norm over `dim` numbers: the usual one, or T5's without a bias."""
    return LayerNorm(dim, rngs=rngs) if use_bias else RMSNorm(dim, rngs=rngs)


def normalize(x: jax.Array, norm: Norm, axis: int = -1) -> jax.Array:
    """Return x normalised along `axis` (0 or the last), by the arrays of `norm`.

    It is computed in float32 and returned in x's type.
    """
    if norm.bias_M is None:
        return rms_norm(x, norm.scale_M, axis)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=axis, keepdims=True)
    scale, bias = (a.reshape(-1, *[1] * (x.ndim - 1)) if axis == 0 else a for a in norm)
    return (x32 * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale + bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale_M: jax.Array, axis: int = -1) -> jax.Array:
    """Return x over its root mean square along `axis` (0 or the last), times `scale_M`.

    It is computed in float32 and returned in x's type.
    """
    x32 = x.astype(jnp.float32)
    # Unlike the usual layer norm, T5's subtracts no mean and adds no bias.
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axis, keepdims=True) + NORM_EPSILON)
    scale = scale_M.reshape(-1, *[1] * (x.ndim - 1)) if axis == 0 else scale_M
    return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)


def relative_position_bucket(
    relative_position: np.ndarray | jax.Array,
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """Return the bucket of (key position - query position), in tokens: int32, same shape.

    Half of the buckets hold exact distances, half grow logarithmically up to `max_distance`
    (Raffel et al. 2020, section 2.1).
    """
    distance = -jnp.asarray(relative_position)
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        # A decoder sees only the past, so no bucket is spent on the future.
        distance = jnp.maximum(distance, 0)
    exact = num_buckets // 2
    # The epsilon keeps log finite at 0 and is well under one bucket's width elsewhere.
    ratio = jnp.log(distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps)
    large = exact + (ratio / math.log(max_distance / exact) * (num_buckets - exact)).astype(
        jnp.int32
    )
    large = jnp.minimum(large, num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, large)).astype(jnp.int32)


class RelativePositionBias(nnx.Module):
    """One learned scalar per head and bucket, of one layer or shared by all layers of a stack."""

    def __init__(
        self,
        num_heads: int,
        num_buckets: int,
        max_distance: int,
        *,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        self.max_distance, self.bidirectional = max_distance, bidirectional
        init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")  # as T5X
        self.rel_embedding = param(rngs, init, (num_heads, num_buckets), ("heads", "buckets"))

    def __call__(self, positions_T: jax.Array) -> jax.Array:
        """Return the bias of attention logits between all positions: float32 [1, H, T, T]."""
        return self.at_distances(positions_T[None, :] - positions_T[:, None])[None]

    def at_distances(self, distances: jax.Array) -> jax.Array:
        """Return the bias [H, ...] of keys at `distances` (key minus query position, in tokens)."""
        table_HN = self.rel_embedding[...]
        buckets = relative_position_bucket(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=table_HN.shape[1],
            max_distance=self.max_distance,
        )
        return table_HN[:, buckets].astype(jnp.float32)

    def buckets(self) -> Buckets:
        """Return where each bucket begins, as `fused_attention` takes it."""
        return _buckets(self.bidirectional, self.rel_embedding.shape[1], self.max_distance)


@functools.lru_cache(maxsize=16)
def _buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> Buckets:
    distances = np.arange(-max_distance, max_distance + 1)  # beyond them nothing changes
    with jax.ensure_compile_time_eval():
        found = relative_position_bucket(
            distances,
            bidirectional=bidirectional,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        found = np.asarray(found)
    begins = np.flatnonzero(found[1:] != found[:-1]) + 1
    return (-FAR, int(found[0])), *((int(distances[i]), int(found[i])) for i in begins)


def add_bias_param(module: nnx.Module, rngs: nnx.Rngs, name: str, size: int, axis: str) -> None:
    """Give the module a bias for its kernel `name`, of zeros."""
    setattr(module, f"{name}_bias", param(rngs, nnx.initializers.zeros, (size,), (axis,)))


def add_bias(x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
    """Return x [..., N] plus the bias of the module's kernel `name`, if it has biases."""
    if not module.use_bias:
        return x
    return x + getattr(module, f"{name}_bias")[...].astype(x.dtype)


def scale_query(query: jax.Array, use_bias: bool) -> jax.Array:
    """Return queries [..., K] over sqrt(K); T5's, which have no bias, as they are."""
    # T5 folds the scale into the query's initial weights.
    return query / math.sqrt(query.shape[-1]) if use_bias else query


class Attention(nnx.Module):
    """Multi-head attention: T5's without biases and scale, or the usual one with both."""

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        product_dtype: str | None = None,
        use_bias: bool = False,
    ):
        joined = num_heads * head_dim

        init = nnx.initializers.xavier_normal() if use_bias else fan_in  # ParlAI's, T5X's

        def query_init(key, shape, dtype):
            return init(key, shape, dtype) / (1.0 if use_bias else math.sqrt(head_dim))

        self.num_heads, self.head_dim = num_heads, head_dim
        self.product_dtype, self.use_bias = product_dtype, use_bias
        self.query = param(rngs, query_init, (emb_dim, joined), ("embed", "joined_kv"))
        self.key = param(rngs, init, (emb_dim, joined), ("embed", "joined_kv"))
        self.value = param(rngs, init, (emb_dim, joined), ("embed", "joined_kv"))
        self.out = param(rngs, init, (joined, emb_dim), ("joined_kv", "embed"))
        if use_bias:
            for name in ("query", "key", "value"):
                add_bias_param(self, rngs, name, joined, "joined_kv")
            add_bias_param(self, rngs, "out", emb_dim, "norm")

    def heads(self, x_BTM: jax.Array, name: str) -> jax.Array:
        """Return x [B, T, M] projected by the kernel `name`, split into heads: [B, H, T, K]."""
        # Heads come before positions, so that every later product is over adjacent matrices: XLA's
        # CPU backend runs them up to five times as fast. A TPU's compiler chooses layouts itself.
        multiply = product if x_BTM.ndim == 3 else product_of_copies
        kernel = getattr(self, name)
        x_BTJ = multiply(x_BTM, kernel, self.product_dtype, partitioning.GATHERED_ATTENTION)
        x_BTJ = add_bias(x_BTJ, self, name)
        x_BTHK = x_BTJ.reshape(*x_BTJ.shape[:-1], self.num_heads, self.head_dim)
        return x_BTHK.swapaxes(-3, -2)

    def keys_values(self, x_BSM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of x or of its copies [P, B, S, M], each [B, H, S, K]."""
        return self.heads(x_BSM, "key"), self.heads(x_BSM, "value")

    def __call__(
        self,
        q_BTM: jax.Array,
        k_BHSK: jax.Array,
        v_BHSK: jax.Array,
        relative_bias: "jax.Array | RelativePositionBias | None",
        mask: "jax.Array | Segments",
        *,
        rate: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the attention's output, projected back: [B, T, M].

        `relative_bias` [1, H, T, S] is learned; `mask` broadcasts to [B, H, T, S] and is not. Both
        are float32 and added; the softmax is float32. With segments for a mask the relative bias is
        its module. `rate` is dropout's, on the attention's weights.
        """
        q_BHTK = scale_query(self.heads(q_BTM, "query"), self.use_bias)
        if isinstance(mask, Segments):
            kept_BH1S = dropout(jnp.ones_like(v_BHSK[..., 0])[:, :, None], rate, key)
            # All queries share the mask of dropout, so dropped weights are dropped values.
            mixed_BTHK = mask.attend(
                q_BHTK.swapaxes(1, 2),
                k_BHSK.swapaxes(1, 2),
                (v_BHSK * kept_BH1S.swapaxes(2, 3)).swapaxes(1, 2),
                relative_bias,
            )
        else:
            biases = relative_bias, mask
            mixed_BHTK = attend_all(q_BHTK, k_BHSK, v_BHSK, *biases, rate=rate, key=key)
            mixed_BTHK = mixed_BHTK.swapaxes(1, 2)
        mixed_BTJ = mixed_BTHK.reshape(*q_BTM.shape[:-1], -1)
        out_BTM = product(mixed_BTJ, self.out, self.product_dtype, partitioning.GATHERED_ATTENTION)
        return add_bias(out_BTM, self, "out")


class Segments(NamedTuple):
    """Segment ids in place of a mask, and the kernel that computes attention with them."""

    kernel: str  # a key of KERNELS
    query_BT: jax.Array
    key_BS: jax.Array
    causal: bool = False

    def attend(self, q_BTHK, k_BSHK, v_BSHK, relative: RelativePositionBias | None) -> jax.Array:
        """Return the weighted values [B, T, H, K]."""
        platform = partitioning.platform()
        if platform and platform not in KERNELS[self.kernel]:
            raise UserError(
                f"attention={self.kernel!r} runs on {' and '.join(KERNELS[self.kernel])}, this is "
                f"{platform}: give 'plain' or 'auto'",
                setting="ATTENTION",
            )
        if self.kernel == "fused":
            return fused_attention(
                q_BTHK,
                k_BSHK,
                v_BSHK,
                self.query_BT,
                self.key_BS,
                None if relative is None else relative.rel_embedding[...],
                buckets=() if relative is None else relative.buckets(),
                causal=self.causal,
                interpret=platform == "cpu",
            )
        length = q_BTHK.shape[1]
        bias = None if relative is None else relative(jnp.arange(length)).astype(q_BTHK.dtype)
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BSHK,
            v_BSHK,
            bias,
            visible(self.query_BT, self.key_BS, self.causal),
            scale=1.0,  # `scale_query` has scaled
            implementation="cudnn",
        )


def attend_all(
    q_BHTK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    relative_bias: jax.Array | None,
    mask_bias: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the values mixed for each query [B, H, T, K]; see `Attention`."""
    logits_BHTS = jnp.einsum("BHTK,BHSK->BHTS", q_BHTK, k_BHSK).astype(jnp.float32)
    if relative_bias is not None:
        logits_BHTS = add_over_batch(logits_BHTS, relative_bias)
    weights_BHTS = jax.nn.softmax(logits_BHTS + mask_bias, axis=-1).astype(q_BHTK.dtype)
    weights_BHTS = dropout(weights_BHTS, rate, key)
    return jnp.einsum("BHTS,BHSK->BHTK", weights_BHTS, v_BHSK)


@jax.custom_vjp
def add_over_batch(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [B, ...] + bias [1, ...], whose gradient is summed over B as a product with ones."""
    # The sum that JAX would write is a strided reduction: on a CPU the costliest step of attention.
    return x + bias


def _add_forward(x, bias):
    return x + bias, None


def _add_backward(_, grad):
    ones = jnp.ones((1, grad.shape[0]), grad.dtype)
    # Full precision, because the bias is a float32 sum over the whole batch.
    summed = jax.lax.dot_general(
        ones, grad, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    return grad, summed


add_over_batch.defvjp(_add_forward, _add_backward)


class MLP(nnx.Module):
    """Feed-forward. Two activations make it gated: `gelu(x wi_0) * (x wi_1)` (Shazeer 2020)."""

    def __init__(
        self,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        *,
        rngs: nnx.Rngs,
        product_dtype: str | None = None,
        use_bias: bool = False,
    ):
        self.activations, self.product_dtype = activations, product_dtype
        self.use_bias = use_bias
        init = nnx.initializers.xavier_uniform() if use_bias else fan_in  # ParlAI's, T5X's
        # T5X's names, so that its checkpoints map one to one.
        self.branches = ("wi_0", "wi_1") if len(activations) > 1 else ("wi",)
        for name in self.branches:
            setattr(self, name, param(rngs, init, (emb_dim, mlp_dim), ("embed", "mlp")))
            if use_bias:
                add_bias_param(self, rngs, name, mlp_dim, "mlp")
        self.wo = param(rngs, init, (mlp_dim, emb_dim), ("mlp", "embed"))
        if use_bias:
            add_bias_param(self, rngs, "wo", emb_dim, "norm")

    def __call__(self, x_BTM: jax.Array, *, rate: float = 0.0, key=None) -> jax.Array:
        """Return the feed-forward output [B, T, M]; dropout of `rate` where a key is given."""
        branches = [
            add_bias(product(x_BTM, getattr(self, name), self.product_dtype), self, name)
            for name in self.branches
        ]
        hidden_BTF = dropout(activate(self.activations, branches), rate, key)
        return add_bias(product(hidden_BTF, self.wo, self.product_dtype), self, "wo")


def activate(activations: tuple[str, ...], branches: list[jax.Array]) -> jax.Array:
    """Return the product of every branch under its activation."""
    parts = [ACTIVATIONS[n](branch) for n, branch in zip(activations, branches, strict=True)]
    return math.prod(parts[1:], start=parts[0])


def segment_mask(query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
    """Return which key each query may attend to in packed rows: bool [B, 1, T, S].

    Both are of the same segment; segment 0 is padding.
    """
    same = query_BT[:, :, None] == key_BS[:, None, :]
    return (same & (key_BS > 0)[:, None, :])[:, None]


def visible(query_BT: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array:
    """Return `segment_mask`; if `causal`, without the keys behind a query."""
    mask = segment_mask(query_BT, key_BS)
    return jnp.tril(mask) if causal else mask


def mask_bias(mask: jax.Array) -> jax.Array:
    """Return float32 0 where `mask` holds, else a number that softmax turns into 0."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
