"""Choose, by a short measurement, the forms of matrix products that are fast on this processor.

XLA's CPU backend computes equal products by different kernels, and which is faster depends on the
processor's vectors and caches. All forms of a product give the same numbers to rounding.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote
from cosmo.engine.base.worker_processes import usable_cores
from cosmo.engine.model import partitioning

log = logging.getLogger(__name__)

# Elements of x in x^T dy from which a copy of x^T pays: smaller ones stay in the caches.
_MIN_COPIED = 2**17
_REPEATS = 5  # of each form, of which the fastest counts
_CLEARLY_FASTER = 0.9  # of a form's time: another one must need less to be taken instead


class Forms(NamedTuple):
    """The forms of products to compute."""

    # Gradients of weights, x^T dy, with x^T laid out in memory first.
    copies_transpose: bool = False
    # Logits of a few rows as weights @ rows, not rows @ weights.
    weights_first: bool = False
    # Attention of one query a row as products of matrices of one row, not as sums.
    one_row_products: bool = False


def forms() -> Forms:
    """Return the forms for the devices that the current program is traced for."""
    if not partitioning.on_cpu():
        return Forms()
    # Programs of several processes must be alike, and their processors may differ.
    return Forms() if jax.process_count() > 1 else _measured()


def copies_transpose(x: jax.Array) -> bool:
    """Return whether the gradient x^T dy of a weight is to be a `transposed_product`."""
    return x.dtype == jnp.float32 and x.size >= _MIN_COPIED and forms().copies_transpose


def transposed_product(x_TM: jax.Array, y_TN: jax.Array) -> jax.Array:
    """Return x^T y [M, N], by way of a copy of x^T."""
    # The barrier keeps XLA from folding the transpose into the product.
    return jax.lax.optimization_barrier(x_TM.T) @ y_TN


def logits(x_BM: jax.Array, weights_VM: jax.Array) -> jax.Array:
    """Return the logits of a few rows in the form that is fast here: float32 [B, V]."""
    weights_first = x_BM.shape[0] > 1 and forms().weights_first
    return (_weights_first if weights_first else _rows_first)(x_BM, weights_VM)


# Sums in float32: rounded ones would tie, and change which token is taken.
def _rows_first(x_BM, weights_VM) -> jax.Array:
    return jnp.einsum("BM,VM->BV", x_BM, weights_VM, preferred_element_type=jnp.float32)


def _weights_first(x_BM, weights_VM) -> jax.Array:
    # Barriers: XLA would fold a transpose into the product, which is then ten times as slow.
    x_MB = jax.lax.optimization_barrier(x_BM.T)
    logits_VB = jnp.matmul(weights_VM, x_MB, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(logits_VB).T


def weighted(weights_BHS: jax.Array, values_BHSK: jax.Array) -> jax.Array:
    """Return the sum over S of the values, weighted, in the form that is fast here: [B, H, K]."""
    return (_by_product if forms().one_row_products else _by_sum)(weights_BHS, values_BHSK)


def _by_sum(weights_BHS, values_BHSK) -> jax.Array:
    return jnp.sum(weights_BHS[..., None] * values_BHSK, axis=2)


def _by_product(weights_BHS, values_BHSK) -> jax.Array:
    return jnp.einsum("BHNS,BHSK->BHNK", weights_BHS[:, :, None], values_BHSK)[:, :, 0]


@functools.cache
def _measured() -> Forms:
    """Return the forms kept beside the compilation cache, or measure and keep them."""
    folder = jax.config.jax_compilation_cache_dir
    local = folder and not is_remote(folder)  # a bucket is read by machines of many kinds
    path = pathlib.Path(folder) / f"product-forms-{_key()}.json" if local else None
    if path is not None and path.exists():
        return Forms(**json.loads(path.read_text()))
    found = _measure()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found._asdict()))
        except (OSError, UserError) as error:  # each process then measures for itself
            log.warning("the measured forms of products are not kept: %s", error)
    return found


def _key() -> str:
    """Return a name for this processor, its cores, the compiler and its flags."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags"))}) or lines
    parts = [
        Forms._fields,
        kind,
        usable_cores(),
        jaxlib.version.__version__,
        os.environ.get("XLA_FLAGS", ""),
    ]
    return hashlib.sha256(json_lines.encode(json.dumps(parts))).hexdigest()[:16]


def _measure() -> Forms:
    """Return the faster form of each product, at sizes of T5 small."""
    began = time.monotonic()
    found = Forms(
        copies_transpose=_is_faster(
            transposed_product, lambda x, y: x.T @ y, (2048, 512), (2048, 1024)
        ),
        weights_first=_is_faster(_weights_first, _rows_first, (8, 512), (32128, 512)),
        one_row_products=_is_faster(_by_product, _by_sum, (1, 6, 256), (1, 6, 256, 64)),
    )
    log.debug("products measured in %.1f s: %s", time.monotonic() - began, found)
    return found


def _is_faster(form: Callable, other: Callable, *shapes: tuple[int, ...]) -> bool:
    """Return whether `form` is not clearly slower than `other` on float32 arrays of `shapes`."""
    # Compiled ahead of time: a call of a jitted function would join the program being traced.
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = [jax.jit(f).lower(*abstract).compile() for f in (form, other)]
    with jax.ensure_compile_time_eval():
        arrays = [jax.device_put(np.ones(shape, np.float32)) for shape in shapes]
        seconds = [[], []]
        for _ in range(_REPEATS):  # in turn, so that other load falls on both
            for run, taken in zip(compiled, seconds, strict=True):
                began = time.perf_counter()
                jax.block_until_ready(run(*arrays))
                taken.append(time.perf_counter() - began)
    return min(seconds[1]) > _CLEARLY_FASTER * min(seconds[0])
