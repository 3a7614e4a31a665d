"""A tiny T5 1.0 with random weights, saved as a run, for all tests of Canary.

Random weights label at random; what is tested is that every door says the same about a dialogue.
"""

import pathlib

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from canary import Canary
from canary.prost import Prost
from cosmo.engine.checkpoints import lazy, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.model import blenderbot, models, t5
from cosmo.tasks import safety, vocabularies

VOCABULARY = "tasks/sample/vocabulary.model"
LENGTHS = {"inputs": 48, "targets": 24}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> pathlib.Path:
    """A MODEL_DIR with a checkpoint, its vocabulary and its settings."""
    folder = tmp_path_factory.mktemp("canary")
    # With T5's sentinels, which the sample's vocabulary has not.
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(pathlib.Path(VOCABULARY).read_bytes())
    for label in safety.LABELS:
        proto.pieces.add(piece=safety.label_text(label, "sentinel"), score=0.0, type=4)
    kept = folder / run_checkpoints.VOCABULARY
    kept.write_bytes(proto.SerializeToString())
    vocabulary = vocabularies.load(kept)
    model = models.EncoderDecoderModel(
        t5.T5Config(
            vocab_size=vocabulary.size,
            emb_dim=16,
            num_heads=2,
            num_encoder_layers=1,
            num_decoder_layers=1,
            head_dim=8,
            mlp_dim=16,
            mlp_activations=("relu",),
            logits_via_embedding=True,
            dtype="float32",
        )
    )
    save(folder, model, vocabulary)
    # Labels of one piece each: random weights would always take the one of fewest pieces.
    (folder / "config.gin").write_text(
        f"TASK_FEATURE_LENGTHS = {LENGTHS}\nLABEL_STYLE = 'sentinel'\n"
    )
    return folder


def save(folder, model, vocabulary) -> None:
    """Save random parameters as step 1 of a run."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        # Larger than a fresh network's, so that answers differ from dialogue to dialogue.
        name, noise = path[-1].key, random.standard_normal(leaf.shape)
        if name == "scale":
            noise = 1.0 + 0.2 * noise
        elif len(leaf.shape) > 1 and name not in ("rel_embedding", "token_embedder"):
            noise /= np.sqrt(leaf.shape[-2])
        return noise.astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, models.abstract_params(model))
    lazy_params = jax.tree.map(lazy.from_array, params)
    streaming.write_checkpoint(str(folder), 1, {"params": lazy_params}, describe(model, vocabulary))


@pytest.fixture(scope="session")
def canary(run) -> Canary:
    return Canary.load(str(run), batch_size=4)


@pytest.fixture(scope="session")
def prost_run(tmp_path_factory) -> pathlib.Path:
    """A MODEL_DIR of a tiny BlenderBot with the bundled byte-level BPE."""
    folder = tmp_path_factory.mktemp("prost")
    run_checkpoints.copy_vocabulary(str(folder), "tasks/sample/prost/vocabulary.json")
    vocabulary = vocabularies.load(folder / run_checkpoints.VOCABULARY)
    network = blenderbot.BlenderbotConfig(
        vocab_size=vocabulary.size,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_dim=16,
        max_positions=64,
        dtype="float32",
    )
    save(folder, models.EncoderDecoderModel(network), vocabulary)
    (folder / "config.gin").write_text(
        "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 64}\nMIXTURE_OR_TASK_NAME = 'prost'\n"
        "PROST_VARIANT = 'rot_and_response'\nMAX_NEW_TOKENS = 12\n"
    )
    return folder


@pytest.fixture(scope="session")
def prost(prost_run) -> Prost:
    return Prost.load(str(prost_run), batch_size=4)
