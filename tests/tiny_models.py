"""Tiny models of random weights, saved as runs, for tests of whatever opens a checkpoint."""

import dataclasses
import pathlib

import jax
import numpy as np

from cosmo.engine.checkpoints import lazy, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.model import blenderbot, models, t5
from cosmo.tasks import vocabularies


def write_prost(folder: pathlib.Path) -> pathlib.Path:
    """Save a BlenderBot of random weights, which writes rules of thumb, as a run."""
    run_checkpoints.copy_vocabulary(str(folder), "tasks/sample/prost/vocabulary.json")
    known = vocabularies.load(folder / run_checkpoints.VOCABULARY)
    network = blenderbot.BlenderbotConfig(
        vocab_size=known.size,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_dim=16,
        max_positions=64,
        dtype="float32",
    )
    save(folder, models.EncoderDecoderModel(network), known)
    (folder / "config.gin").write_text(
        "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 64}\nMIXTURE_OR_TASK_NAME = 'prost'\n"
        "PROST_VARIANT = 'rot_and_response'\nMAX_NEW_TOKENS = 12\n"
    )
    return folder


def t5_1_1(vocab_size: int) -> t5.T5Config:
    """A network of T5 1.1."""
    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=16,
        dtype="float32",
    )


def t5_1_0(vocab_size: int) -> t5.T5Config:
    """A network of T5 1.0: relu, and logits by the embedding."""
    return dataclasses.replace(
        t5_1_1(vocab_size), mlp_activations=("relu",), logits_via_embedding=True
    )


def save(folder: pathlib.Path, model: models.EncoderDecoderModel, vocabulary) -> None:
    """Save random parameters as step 1 of a run."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        # Larger than a fresh network's, so that answers differ from input to input.
        name, noise = path[-1].key, random.standard_normal(leaf.shape)
        if name == "scale":
            noise = 1.0 + 0.2 * noise
        elif len(leaf.shape) > 1 and name not in ("rel_embedding", "token_embedder"):
            noise /= np.sqrt(leaf.shape[-2])
        return noise.astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, models.abstract_params(model))
    arrays = {"params": jax.tree.map(lazy.from_array, params)}
    streaming.write_checkpoint(str(folder), 1, arrays, describe(model, vocabulary))
