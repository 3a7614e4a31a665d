"""Fixtures of the engine tests: one tiny network, packed rows, and jitted functions they share.

Helpers are fixtures that return functions. Every batch is [8, 24] / [8, 16], so that the whole set
compiles the loss once.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.model import models
from tests.engine import tiny_network

jax.config.update("jax_default_matmul_precision", "highest")

ROWS, SOURCE, TARGET = 8, 24, 16


@pytest.fixture(scope="session")
def jit():
    """Return `jax.jit`; tests/conftest.py makes all compilation fast."""
    return jax.jit


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the references' recorded numbers, or a skip."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
    if not folder.exists():
        pytest.skip("no folder ../shared/golden beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**changes)`: a T5 1.1 of two and three layers in float32."""
    return tiny_network.config


@pytest.fixture(scope="session")
def make_params():
    """`make_params(model, seed=0)`: random numbers in every parameter, norm scales too.

    Larger than a fresh network's, so that attention is uneven and a wrong mask shows.
    """

    def make(model, seed=0):
        rng = np.random.default_rng(seed)

        def fill(path, leaf):
            name = path[-1].key
            noise = rng.standard_normal(leaf.shape)
            if name == "scale":
                noise = 1.0 + 0.2 * noise
            elif name not in ("rel_embedding", "token_embedder"):
                noise /= np.sqrt(leaf.shape[-2])
            return jnp.asarray(noise, leaf.dtype)

        return jax.tree_util.tree_map_with_path(fill, models.abstract_params(model))

    return make


@pytest.fixture(scope="session")
def model(tiny_config) -> models.EncoderDecoderModel:
    return models.EncoderDecoderModel(tiny_config())


@pytest.fixture(scope="session")
def params(model, make_params):
    return make_params(model)


@pytest.fixture(scope="session")
def logits_of(jit):
    """`logits_of(model, params, batch, key=None)`, jitted."""
    return jit(models.logits, static_argnums=0)


@pytest.fixture(scope="session")
def loss_of(jit):
    """`loss_of(model, params, batch, key=None)` -> (loss, sums), jitted."""
    return jit(models.loss, static_argnums=0)


@pytest.fixture(scope="session")
def loss_and_grads(jit):
    """`loss_and_grads(model, params, batch, key=None)` -> ((loss, sums), grads), jitted."""

    @functools.partial(jit, static_argnums=0)
    def run(model, params, batch, key=None):
        return jax.value_and_grad(lambda p: models.loss(model, p, batch, key), has_aux=True)(params)

    return run


@pytest.fixture(scope="session")
def examples() -> list[tuple[np.ndarray, np.ndarray]]:
    """Six (inputs, targets) of random tokens and a final EOS; three fit in a row, none is alike."""
    rng = np.random.default_rng(7)

    def tokens(length):
        return np.append(rng.integers(2, 40, length - 1), 1).astype(np.int32)

    return [(tokens(s), tokens(t)) for s, t in [(7, 5), (4, 3), (9, 6), (11, 2), (3, 7), (8, 4)]]


@pytest.fixture(scope="session")
def pack():
    """`pack(rows, source=24, target=16)`: each row a list of examples, with SeqIO's features.

    Written out here, independently of SeqIO: segments count from 1, the decoder's inputs are the
    targets moved right by one within their segment, starting with 0.
    """

    def make(rows, source=SOURCE, target=TARGET, count=ROWS) -> dict[str, jax.Array]:
        batch = {
            name: np.zeros((count, source if name.startswith("encoder") else target), np.int32)
            for name in (
                "encoder_input_tokens",
                "encoder_segment_ids",
                "decoder_input_tokens",
                "decoder_target_tokens",
                "decoder_segment_ids",
                "decoder_loss_weights",
            )
        }
        for r, row in enumerate(rows):
            s = t = 0
            for segment, (inputs, targets) in enumerate(row, 1):
                here = slice(s, s + len(inputs))
                there = slice(t, t + len(targets))
                batch["encoder_input_tokens"][r, here] = inputs
                batch["encoder_segment_ids"][r, here] = segment
                batch["decoder_input_tokens"][r, there] = np.append(0, targets[:-1])
                batch["decoder_target_tokens"][r, there] = targets
                batch["decoder_segment_ids"][r, there] = segment
                batch["decoder_loss_weights"][r, there] = 1
                s, t = s + len(inputs), t + len(targets)
        return {name: jnp.asarray(array) for name, array in batch.items()}

    return make


@pytest.fixture(scope="session")
def packed(pack, examples) -> dict[str, jax.Array]:
    """Two rows of three examples and six empty rows."""
    return pack([examples[:3], examples[3:]])


@pytest.fixture(scope="session")
def unpacked(pack, examples) -> dict[str, jax.Array]:
    """The same examples, one a row, and two empty rows."""
    return pack([[example] for example in examples])
