"""The checkpoint that a run starts from, as one object, whatever its format."""

import jax
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import convert, lazy, streaming
from cosmo.engine.checkpoints.description import describe, flat
from cosmo.engine.checkpoints.initial import InitialCheckpoint
from cosmo.engine.model import models, partitioning, step


@pytest.fixture(scope="module")
def state_of(tiny_config):
    """(model, a state of random numbers, its abstract shapes, its shardings)."""
    model = models.EncoderDecoderModel(tiny_config(relative_attention_per_layer=False))
    settings, partitioner = step.StepConfig(), partitioning.Partitioner()
    mesh = partitioner.mesh(jax.devices()[:1])
    abstract, shardings = step.state_shardings(model, settings, partitioner, mesh)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: rng.random(a.shape).astype(a.dtype), abstract)
    return model, state._replace(step=np.int32(4)), abstract, shardings


@pytest.fixture(scope="module")
def folders(state_of, tmp_path_factory):
    """{format: a checkpoint of the state in that format}."""
    model, state, _, _ = state_of
    root = tmp_path_factory.mktemp("initial")
    run = str(root / "run")
    arrays = jax.tree.map(lambda a: lazy.from_array(np.asarray(a)), state)
    streaming.write_checkpoint(run, 4, arrays, describe(model, None))
    for format in ("t5x", "huggingface"):
        convert.export_checkpoint(run, str(root / format), format=format)
    return {name: str(root / name) for name in ("run", "t5x", "huggingface")}


@pytest.mark.parametrize("name, first_step", [("run", 4), ("t5x", 4), ("huggingface", 0)])
def test_parameters_come_from_every_format(state_of, folders, name, first_step):
    """Oracle: the parameters that were written, and the step that each format stores."""
    model, state, abstract, shardings = state_of
    initial = InitialCheckpoint(folders[name])
    assert initial.step() == first_step
    start = initial.read(abstract, shardings, describe(model, None))
    assert (start.step, start.opt_state) == (first_step, None)
    jax.tree.map(np.testing.assert_array_equal, start.params, state.params)


@pytest.mark.parametrize("name", ["run", "t5x"])
def test_the_optimizer_state_comes_if_asked_for(state_of, folders, name):
    """Oracle: the statistics that were written. T5X stores its step instead of each count, and
    zeros for rows and columns of tensors that are too small to be factored."""
    model, state, abstract, shardings = state_of
    start = InitialCheckpoint(folders[name], True).read(abstract, shardings, describe(model, None))
    assert start.step == 4
    wanted = flat(state.opt_state)
    for path, array in flat(start.opt_state).items():
        if name == "run" or "v" in path:
            np.testing.assert_array_equal(array, wanted[path])
        else:
            np.testing.assert_array_equal(array, 4 if path[-1] == "count" else 0)


def test_a_huggingface_folder_has_no_optimizer_state(state_of, folders):
    """Oracle: DESIGN, habit 3: the error names the setting to leave out."""
    _, _, abstract, shardings = state_of
    with pytest.raises(UserError, match=r"leave out \(setting: RESTORE_OPTIMIZER_STATE"):
        InitialCheckpoint(folders["huggingface"], True).read(abstract, shardings, {})


def test_without_a_path_there_is_nothing_to_read(state_of):
    """Oracle: fresh parameters start at step 0."""
    _, _, abstract, shardings = state_of
    assert InitialCheckpoint().step() == 0
    assert InitialCheckpoint().read(abstract, shardings, {}) is None


@pytest.mark.parametrize("name", ["run", "t5x", "huggingface"])
def test_another_model_is_refused(folders, tiny_config, name):
    """Oracle: the array whose shape differs, in the message."""
    model = models.EncoderDecoderModel(tiny_config(mlp_dim=48))
    partitioner = partitioning.Partitioner()
    mesh = partitioner.mesh(jax.devices()[:1])
    abstract, shardings = step.state_shardings(model, step.StepConfig(), partitioner, mesh)
    with pytest.raises(UserError, match=r"of another model size: \S*mlp/wi_0 is"):
        InitialCheckpoint(folders[name]).read(abstract, shardings, describe(model, None))
