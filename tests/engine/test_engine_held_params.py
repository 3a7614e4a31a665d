"""Parameters as a session holds them: laid out once, with the results of plain ones."""

import jax
import numpy as np
import pytest

from cosmo.engine.model import blenderbot, generate, held_params, models, partitioning
from cosmo.engine.model.decoding import DecodingConfig
from tests.engine import tiny_network

BLENDERBOT = blenderbot.BlenderbotConfig(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_dim=24,
    max_positions=24,
    logits_bias=True,
)
NETWORKS = {
    "t5": tiny_network.config(dtype="bfloat16"),
    "tied": tiny_network.config(
        dtype="float32",
        logits_via_embedding=True,
        mlp_activations=("relu",),
        relative_attention_per_layer=True,
        scan_layers=False,
    ),
    "blenderbot": BLENDERBOT,
}


def held_and_plain(network):
    """(model, plain parameters in float32, the same as a session holds them)."""
    model = models.EncoderDecoderModel(network)
    plain = models.init(model, jax.random.key(0))
    layout = partitioning.Layout(partitioning.Partitioner().mesh())
    wanted = held_params.abstract_params(model)
    restored = jax.tree.map(lambda x, like: x.astype(like.dtype), plain, wanted)
    held = held_params.hold(model, restored, layout)
    assert not restored, "the caller's dict keeps matrices alive"
    return model, plain, held


@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_those_of_plain_parameters(name):
    """Oracle: the same functions of float32 parameters, which they cast at every call."""
    model, plain, held = held_and_plain(NETWORKS[name])
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(3, 40, (2, 9)), rng.integers(3, 40, (2, 5))
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }

    def everything(params, batch):
        inputs = batch["encoder_input_tokens"]
        greedy = generate.predict(model, params, inputs, DecodingConfig(6, min_length=5))
        scores = generate.score(model, params, batch)
        choices = generate.score_choices(model, params, inputs, ((5, 6, 1), (7, 1)))
        return greedy, scores, choices

    wanted, found = (jax.jit(everything)(params, batch) for params in (plain, held))
    np.testing.assert_array_equal(found[0].tokens, wanted[0].tokens)
    # Equal but for the order of sums, which a compiler may choose by an operand's layout.
    tolerance = 2e-2 if model.network.dtype == "bfloat16" else 1e-5
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_a_matrix_is_held_once():
    """Hand calculation: 2 bytes for each number of a matrix, 4 for those of vectors and of tables
    of relative biases; a decoder's norms and biases are few, and may be twice there."""
    model, plain, held = held_and_plain(tiny_network.config(dtype="bfloat16", emb_dim=64))
    count = models.parameter_count(model)
    small = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain)
        if path[-1].key in ("scale", "rel_embedding")
    )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    assert total == 2 * (count - small) + 4 * small
    assert held_params.bytes_per_parameter(model, held) == total / count


def test_type_of_products():
    """Oracle: the docstring. Matrices are held in the wider of the types that they are used in."""
    types = {("float32", "bfloat16"): "float32", ("bfloat16", None): "bfloat16"}
    types["bfloat16", "float32"] = "float32"
    for (dtype, product), wanted in types.items():
        network = tiny_network.config(dtype=dtype, product_dtype=product)
        assert held_params.held_dtype(network) == wanted
