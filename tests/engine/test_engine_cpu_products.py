"""Forms of products for processors: equal numbers, one measurement for each processor."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.model import cpu_products, layers, partitioning

NEW = cpu_products.Forms(True, True, True)


def random(*shape: int) -> jax.Array:
    numbers = np.random.default_rng(len(shape)).standard_normal(shape)
    return jnp.asarray(numbers, jnp.float32)


def with_forms(forms: cpu_products.Forms):
    return mock.patch.object(cpu_products, "_measured", return_value=forms)


def test_cpu_products_gradients_are_numpys():
    """Oracle: the two products written in float64 NumPy; the copied transpose is in the program."""
    x, weights, grad = random(4, 128, 512), random(512, 96), random(4, 128, 96)

    def both(x, weights):
        return jax.vjp(lambda x, w: layers.times(x, w, jnp.float32), x, weights)[1](grad)

    with with_forms(NEW):
        assert x.size >= cpu_products._MIN_COPIED
        assert "optimization_barrier" in str(jax.make_jaxpr(both)(x, weights))
        grad_x, grad_weights = jax.jit(both)(x, weights)
    x64, weights64, grad64 = (np.asarray(a, np.float64) for a in (x, weights, grad))
    np.testing.assert_allclose(grad_x, grad64 @ weights64.T, atol=2e-4)
    expected = x64.reshape(-1, 512).T @ grad64.reshape(-1, 96)
    np.testing.assert_allclose(grad_weights, expected, atol=2e-4)


@pytest.mark.parametrize("forms", [cpu_products.Forms(), NEW])
@pytest.mark.parametrize("rows", [1, 3])
def test_cpu_products_of_few_rows_are_numpys(rows, forms):
    """Oracle: the product and the weighted sum in float64 NumPy."""
    x, weights = random(rows, 64), random(96, 64)
    shares, values = random(rows, 2, 5), random(rows, 2, 5, 8)
    with with_forms(forms):
        logits = cpu_products.logits(x, weights)
        mixed = cpu_products.weighted(shares, values)
    np.testing.assert_allclose(logits, np.float64(x) @ np.float64(weights).T, atol=1e-4)
    expected = np.einsum("bhs,bhsk->bhk", np.float64(shares), np.float64(values))
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_cpu_products_are_measured_once_for_a_processor(tmp_path):
    """The result is kept beside the compilation cache and read from there. Oracle: the calls."""
    measure = mock.Mock(return_value=cpu_products.Forms(copies_transpose=True))
    cpu_products._measured.cache_clear()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with mock.patch.object(cpu_products, "_measure", measure):
            for _ in range(2):
                assert cpu_products._measured() == cpu_products.Forms(copies_transpose=True)
                cpu_products._measured.cache_clear()
        (path,) = tmp_path.glob("product-forms-*.json")
        assert json.loads(path.read_text())["copies_transpose"] is True
        assert measure.call_count == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_cpu_products_choose_the_faster_form():
    """Oracle: a form that computes forty times as much is the slower one."""

    def slow(x):
        return jax.lax.fori_loop(0, 40, lambda i, y: x @ y, x)

    assert cpu_products._is_faster(lambda x: x @ x, slow, (256, 256))
    assert not cpu_products._is_faster(slow, lambda x: x @ x, (256, 256))


def test_cpu_products_of_other_devices_stay_as_they_are():
    """A program planned for absent devices has the usual forms. Property."""
    layout = partitioning.Layout(partitioning.abstract_mesh(2, 1))
    with with_forms(NEW), layout.active():
        assert cpu_products.forms() == cpu_products.Forms()
    with with_forms(NEW):
        assert cpu_products.forms() == NEW
