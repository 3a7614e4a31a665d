"""The JSON of our own checkpoints with damaged bytes: what cannot be read is one line."""

import random
from collections import Counter

import jax
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, lazy, streaming
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.model import models
from tests.engine import job_settings, tiny_network
from tests.engine.test_interop_fuzz import mutated

CHECKSUMS = "checksums.0.json"
FILES = ("description/metadata", "state/_METADATA", "_CHECKPOINT_METADATA", CHECKSUMS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's folder with the checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    model = models.EncoderDecoderModel(tiny_network.config())
    shapes = models.abstract_params(model)
    params = jax.tree.map(lambda leaf: lazy.from_array(np.ones(leaf.shape, leaf.dtype)), shapes)
    described = describe(model, job_settings.Words())
    streaming.write_checkpoint(str(folder), 1, {"params": params}, described)
    return folder


@pytest.mark.parametrize(
    "count", [pytest.param(25, id="sample"), pytest.param(500, marks=pytest.mark.slow, id="all")]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_one_line(checkpoint, name, count):
    """Property: no error but UserError, and it has one line; the counts are printed."""
    folder, found = checkpoint / "checkpoints/1", Counter()
    file, sums = folder / name, (folder / CHECKSUMS).read_bytes()
    original = file.read_bytes()
    if name != CHECKSUMS:
        (folder / CHECKSUMS).unlink()  # it would find any damage first
    try:
        for seed in range(count):
            file.write_bytes(mutated(original, random.Random(f"{name} {seed}")))
            try:
                assert any_format.open_source(str(checkpoint)).params
                found["read"] += 1
            except UserError as error:
                text = str(error)
                assert "\n" not in text, seed
                found["refused"] += 1
    finally:
        file.write_bytes(original)
        (folder / CHECKSUMS).write_bytes(sums)
    print(f"\n{name}: {count} damaged: {dict(found)}")
    assert found.total() == count
    assert any_format.open_source(str(checkpoint)).params
