"""A tiny T5 1.0 with random weights, saved as a run, for all tests of Canary.

Random weights label at random; what is tested is that every door says the same about a dialogue.
"""

import pathlib

import pytest
from sentencepiece import sentencepiece_model_pb2

from canary import Canary
from canary.prost import Prost
from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.model import models
from cosmo.tasks import safety, vocabularies
from tests.tiny_models import save, t5_1_0, write_prost

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
    model = models.EncoderDecoderModel(t5_1_0(vocabulary.size))
    save(folder, model, vocabulary)
    # Labels of one piece each: random weights would always take the one of fewest pieces.
    (folder / "config.gin").write_text(
        f"TASK_FEATURE_LENGTHS = {LENGTHS}\nLABEL_STYLE = 'sentinel'\n"
    )
    return folder


@pytest.fixture(scope="session")
def canary(run) -> Canary:
    return Canary.load(str(run), batch_size=4)


@pytest.fixture(scope="session")
def prost_run(tmp_path_factory) -> pathlib.Path:
    """A MODEL_DIR of a tiny BlenderBot with the bundled byte-level BPE."""
    return write_prost(tmp_path_factory.mktemp("prost"))


@pytest.fixture(scope="session")
def prost(prost_run) -> Prost:
    return Prost.load(str(prost_run), batch_size=4)
