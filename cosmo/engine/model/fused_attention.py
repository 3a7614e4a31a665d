"""Compute attention with T5's relative bias in one TPU kernel, which keeps its scores on the chip.

Plain attention writes arrays [B, H, T, S] to memory: logits, weights and their gradients. The
kernel (Pallas) holds the scores of 128 queries at a time. It makes the relative bias from the table
of buckets, and the mask from segment ids. It sums the gradient of the table by bucket.

Shape suffixes are those of `layers`; N is a table's buckets. In the kernel T and S are padded to
whole blocks. J is the joined columns of all heads.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import partitioning

ATTENDED = "attended"  # names the kernel's result for rematerialization policies
MASKED = -1e10  # added to a masked attention logit; T5X's value, so fully masked rows agree too

FAR = 2**30  # tokens: further apart than any two positions

_OUTSIDE = -1e30  # added to logits of the columns that pad S: less than MASKED by far
_BLOCK = 128  # queries at a time; also the lanes of a TPU's vector register

_ON_CHIP_BYTES = 16 * 2**20  # of vector memory on a TPU v3 or v4, which have the least
_SCORES = 5  # arrays [128, S] that the compiler holds at a time: 3.3 and 4.3 were seen

# (first distance, bucket), ascending: a bucket ends where the next begins.
Buckets = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The static settings of one kernel."""

    num_heads: int  # that the kernel takes together
    head_dim: int
    causal: bool
    keys: int  # S without padding
    buckets: Buckets  # empty without a relative bias
    interpret: bool

    @property
    def width(self) -> int:
        """The columns of the heads that the kernel takes together."""
        return self.num_heads * self.head_dim

    def heads(self) -> list[tuple[int, slice]]:
        """Return (place, its columns) of each of these heads."""
        size = self.head_dim
        return [(i, slice(i * size, (i + 1) * size)) for i in range(self.num_heads)]


def fused_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    table_HN: jax.Array | None = None,
    *,
    causal: bool,
    buckets: Buckets = (),
    interpret: bool = False,
) -> jax.Array:
    """Return the attention's output [B, T, H, K], in the queries' type.

    A query attends to the keys of its own segment (`layers.segment_mask`); if `causal`, to none
    behind it. A relative bias has a table and `RelativePositionBias.buckets()`. Softmax and sums
    are float32. With `interpret` the kernel runs on any device, slowly. Under a layout each device
    computes its own rows and heads.
    """
    if table_HN is None:
        table_HN = jnp.zeros((q_BTHK.shape[2], 1), jnp.float32)

    def local(q_BTHK, k_BSHK, v_BSHK, query_BT, key_BS, table_HN):
        _, length, heads, size = q_BTHK.shape
        together = _together(heads, size)
        settings = _Settings(together, size, causal, k_BSHK.shape[1], buckets, interpret)
        joined = [_padded(x.reshape(*x.shape[:2], -1)) for x in (q_BTHK, k_BSHK, v_BSHK)]
        segments = [_padded(x)[:, None] for x in (query_BT, key_BS)]
        return _attend(settings, table_HN, *segments, *joined)[:, :length].reshape(q_BTHK.shape)

    by_head, by_row = ("batch", None, "heads", None), ("batch", None)
    names = [by_head, by_head, by_head, by_row, by_row, ("heads", "buckets")]
    on_devices = partitioning.on_each_device(local, names)
    out = on_devices(q_BTHK, k_BSHK, v_BSHK, query_segments_BT, key_segments_BS, table_HN)
    return checkpoint_name(out, ATTENDED)


def fits(queries: int, keys: int, num_heads: int, head_dim: int, itemsize: int) -> bool:
    """Return whether the kernel has room for so many queries and keys on every TPU's chip."""
    queries, keys = (length + -length % _BLOCK for length in (queries, keys))
    together = _together(num_heads, head_dim)
    width = together * head_dim
    bands = 2 * together * _BLOCK * (queries - _BLOCK + keys) * 4
    blocks = 2 * itemsize * width * (3 * queries + 4 * keys)  # two of each: one loads meanwhile
    sums = 2 * keys * width * 4
    return bands + blocks + sums + _SCORES * _BLOCK * keys * 4 <= _ON_CHIP_BYTES


def _together(num_heads: int, head_dim: int) -> int:
    """Return how many heads the kernel takes together: as few as fill whole registers."""
    able = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return next((n for n in able if n * head_dim % _BLOCK == 0), num_heads)


def _padded(x: jax.Array) -> jax.Array:
    """Return x [B, T, ...], T padded to whole blocks by zeros: as segments they are padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK), *[(0, 0)] * (x.ndim - 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, table_HN, query_B1T, key_B1S, q_BTJ, k_BSJ, v_BSJ):
    return _run(_forward, settings, table_HN, query_B1T, key_B1S, q_BTJ, k_BSJ, v_BSJ)[0]


def _attend_forward(settings: _Settings, *arrays):
    # Nothing else is kept: the backward kernel computes the scores again.
    return _attend(settings, *arrays), arrays


def _attend_backward(settings: _Settings, arrays, grad_BTJ):
    *grads, sums_HNL = _run(_backward, settings, *arrays, grad_BTJ)
    return jnp.sum(sums_HNL, axis=-1), None, None, *grads


_attend.defvjp(_attend_forward, _attend_backward)


def _run(body, settings: _Settings, table_HN, query_B1T, key_B1S, q_BTJ, k_BSJ, *others):
    """Return the results of the kernel `body`: the output, or the four gradients."""
    (rows, queries, columns), keys, width = q_BTJ.shape, k_BSJ.shape[1], settings.width
    sets, num_buckets = columns // width, table_HN.shape[1]
    backward = body is _backward

    # A grid step is one row of the batch and one set of heads. Rows run innermost.
    def block(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, width), lambda heads, row: (row, 0, heads))

    def segments(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, length), lambda heads, row: (row, 0, 0))

    of_queries, of_keys = block(queries), block(keys)
    given = [pl.BlockSpec(memory_space=pltpu.SMEM), segments(queries), segments(keys)]
    given += [of_queries, of_keys, of_keys]
    band = (
        (settings.num_heads, _BLOCK, queries - _BLOCK + keys) if settings.buckets else (1, 8, 128)
    )
    scratch, results, specs = [band], [q_BTJ], [of_queries]
    if backward:
        given.append(of_queries)
        scratch += [band, (keys, width), (keys, width)]
        sums = jax.ShapeDtypeStruct((table_HN.shape[0], num_buckets, _BLOCK), jnp.float32)
        results += [k_BSJ, k_BSJ, sums]
        of_sums = (settings.num_heads, num_buckets, _BLOCK)
        specs += [of_keys, of_keys, pl.BlockSpec(of_sums, lambda heads, row: (heads, 0, 0))]
    if not fits(
        queries, keys, columns // settings.head_dim, settings.head_dim, q_BTJ.dtype.itemsize
    ):
        raise UserError(
            f"fused attention has no room on the chip for {queries} queries and {keys} keys: give "
            "'plain', or shorter lengths",
            setting=("ATTENTION", "TASK_FEATURE_LENGTHS"),
        )
    arrays = [table_HN, query_B1T, key_B1S, q_BTJ, k_BSJ, *others]
    scores = rows * queries * keys
    # Each set of heads reads the segments again.
    moved = [*arrays, *results, *[query_B1T, key_B1S] * (sets - 1)]
    return pl.pallas_call(
        functools.partial(body, settings),
        grid=(sets, rows),
        in_specs=given,
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # All that `plan` can count of a kernel.
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if backward else 2) * scores * columns,
            transcendentals=scores * (columns // settings.head_dim),
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        ),
        interpret=settings.interpret,
        name="attention_backward" if backward else "attention_forward",
    )(*arrays)


def _forward(settings, table_ref, query_ref, key_ref, q_ref, k_ref, v_ref, out_ref, band_ref):
    """Write the output of one row and set of heads."""
    _make_bands(settings, table_ref, q_ref.shape[1], band_ref)

    def attend(block, _):
        at, window = _places(block, q_ref, k_ref)
        mask_TS = _mask(settings, block, query_ref, key_ref)
        for head, columns in settings.heads():
            q_TK, k_SK, v_SK = q_ref[0, at, columns], k_ref[0, :, columns], v_ref[0, :, columns]
            bias_TS = mask_TS + band_ref[head, :, window] if settings.buckets else mask_TS
            weights_TS = _weights(q_TK, k_SK, bias_TS).astype(v_SK.dtype)
            out_ref[0, at, columns] = _product(weights_TS, v_SK, 1, 0).astype(out_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[1] // _BLOCK, attend, None)


def _backward(
    settings,
    table_ref,
    query_ref,
    key_ref,
    q_ref,
    k_ref,
    v_ref,
    grad_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    sums_ref,
    band_ref,
    dband_ref,
    dk_sum_ref,
    dv_sum_ref,
):
    """Write the gradients of one row and set of heads; after the last row, the table's."""
    _make_bands(settings, table_ref, q_ref.shape[1], band_ref)
    dtype = q_ref.dtype

    @pl.when(pl.program_id(1) == 0)
    def _():
        dband_ref[...] = jnp.zeros_like(dband_ref)

    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def attend(block, _):
        at, window = _places(block, q_ref, k_ref)
        mask_TS = _mask(settings, block, query_ref, key_ref)
        for head, columns in settings.heads():
            q_TK, k_SK, v_SK = q_ref[0, at, columns], k_ref[0, :, columns], v_ref[0, :, columns]
            grad_TK = grad_ref[0, at, columns]
            bias_TS = mask_TS + band_ref[head, :, window] if settings.buckets else mask_TS
            weights_TS = _weights(q_TK, k_SK, bias_TS)
            dv_sum_ref[:, columns] += _product(weights_TS.astype(dtype), grad_TK, 0, 0)
            dweights_TS = _product(grad_TK, v_SK, 1, 1)
            mean_T1 = jnp.sum(weights_TS * dweights_TS, axis=-1, keepdims=True)
            dscores_TS = weights_TS * (dweights_TS - mean_T1)
            if settings.buckets:
                dband_ref[head, :, window] += dscores_TS
            dscores_TS = dscores_TS.astype(dtype)
            dq_ref[0, at, columns] = _product(dscores_TS, k_SK, 1, 0).astype(dtype)
            dk_sum_ref[:, columns] += _product(dscores_TS, q_TK, 0, 0)

    jax.lax.fori_loop(0, q_ref.shape[1] // _BLOCK, attend, None)
    dk_ref[0] = dk_sum_ref[...].astype(dtype)
    dv_ref[0] = dv_sum_ref[...].astype(dtype)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        _sum_by_bucket(settings, q_ref.shape[1], dband_ref, sums_ref)


def _places(block: jax.Array, q_ref, k_ref):
    """Return where a block's queries stand, and where its biases stand in a band."""
    # A bias depends on key minus query position alone. So the biases of all blocks are windows
    # [128, S] of one band [128, T - 128 + S], each 128 columns before the last.
    last = q_ref.shape[1] // _BLOCK - 1
    start = pl.multiple_of((last - block) * _BLOCK, _BLOCK)
    return pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK), pl.ds(start, k_ref.shape[1])


def _mask(settings: _Settings, block: jax.Array, query_ref, key_ref) -> jax.Array:
    """Return what is added to logits: 0 where a query attends, else a number that mutes them."""
    at = pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK)
    # Turned into a column through a square, which is what a TPU can turn.
    query_T1 = jnp.broadcast_to(query_ref[0, :, at], (_BLOCK, _BLOCK)).T[:, :1]
    key_1S = key_ref[0]
    shape = (_BLOCK, key_1S.shape[1])
    visible_TS = (query_T1 == key_1S) & (key_1S > 0)
    place_TS = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if settings.causal:
        own_TS = block * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        visible_TS = visible_TS & (place_TS <= own_TS)
    masked = jnp.where(place_TS < settings.keys, MASKED, _OUTSIDE)
    return jnp.where(visible_TS, 0.0, masked)


def _weights(q_TK: jax.Array, k_SK: jax.Array, bias_TS: jax.Array) -> jax.Array:
    """Return the softmax of queries times keys plus a bias: float32 [T, S]."""
    scores_TS = _product(q_TK, k_SK, 1, 1) + bias_TS
    exp_TS = jnp.exp(scores_TS - jnp.max(scores_TS, axis=-1, keepdims=True))
    return exp_TS * (1.0 / jnp.sum(exp_TS, axis=-1, keepdims=True))


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Return the float32 product of two matrices, summed over one axis of each."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _make_bands(settings: _Settings, table_ref, queries: int, band_ref) -> None:
    """Write the biases of a set of heads, once for all rows of the batch."""
    first_head = pl.program_id(0) * settings.num_heads

    @pl.when(pl.program_id(1) == 0)
    def _():
        distance_LL = _distances()
        for head, _ in settings.heads():
            place = first_head + head
            for columns, pieces in _tiles(settings, queries, band_ref):
                tile_LL = jnp.full((_BLOCK, _BLOCK), table_ref[place, pieces[0][0]])
                for bucket, first, _ in pieces[1:]:
                    tile_LL = jnp.where(distance_LL < first, tile_LL, table_ref[place, bucket])
                band_ref[head, :, columns] = tile_LL


def _sum_by_bucket(settings: _Settings, queries: int, dband_ref, sums_ref) -> None:
    """Write the sum of a band's gradients over each bucket; the lanes are left to sum."""
    distance_LL = _distances()
    sums_ref[...] = jnp.zeros_like(sums_ref)
    for head, _ in settings.heads():
        for columns, pieces in _tiles(settings, queries, dband_ref):
            tile_LL = dband_ref[head, :, columns]
            for bucket, first, end in pieces:
                own_LL = (first <= distance_LL) & (distance_LL < end)
                part_LL = tile_LL if len(pieces) == 1 else jnp.where(own_LL, tile_LL, 0.0)
                sums_ref[head, bucket : bucket + 1] += jnp.sum(part_LL, axis=0, keepdims=True)


def _distances() -> jax.Array:
    """Return column minus row of a tile [128, 128]."""
    shape = (_BLOCK, _BLOCK)
    column_LL = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return column_LL - jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _tiles(
    settings: _Settings, queries: int, band_ref
) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
    """Yield (columns, [(bucket, first, end)]) of each tile [128, 128] of a band.

    The tile has the bucket where `first <= column - row < end`.
    """
    # Beyond the table's largest distance all of a tile is one bucket.
    ends = [first for first, _ in settings.buckets[1:]] + [FAR]
    for start in range(0, band_ref.shape[2], _BLOCK) if settings.buckets else ():
        shift = start - (queries - _BLOCK)  # key minus query position at the tile's corner
        pieces = [
            (bucket, first - shift, end - shift)
            for (first, bucket), end in zip(settings.buckets, ends, strict=True)
            if first - shift < _BLOCK and end - shift > -_BLOCK
        ]
        yield slice(start, start + _BLOCK), pieces
