"""T5X checkpoints of Orbax's kind, against one that the real T5X wrote (../shared/golden)."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert
from cosmo.engine.checkpoints.description import path_of
from cosmo.engine.checkpoints.interop import t5x, t5x_adafactor
from cosmo.engine.model import models, partitioning, step

STATE = pathlib.Path("state")


@pytest.fixture
def folder(golden) -> str:
    """The checkpoint of step 12 that the real T5X wrote."""
    return str(golden / "t5x_orbax/checkpoint_12")


@pytest.fixture
def copied(folder, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "checkpoint_12"))


def read_all(path: pathlib.Path) -> None:
    source = any_format.open_source(str(path))
    for array in [*source.params.values(), *source.others.values()]:
        array.whole()


def test_every_array(golden, folder):
    """Oracle: shape, type, sum and first values of all 261 arrays, as T5X's process had them."""
    recorded = json.loads((golden / "t5x_orbax/checkpoint_12.json").read_text())
    found_step, arrays = t5x.open_checkpoint(folder)
    assert found_step == recorded.pop("state/step")["sum"] == t5x.step_of(folder)
    assert arrays.keys() == recorded.keys()
    assert len(arrays) == 260
    for name, wanted in recorded.items():
        array = arrays[name].whole()
        assert [list(array.shape), array.dtype.name] == [wanted["shape"], wanted["dtype"]], name
        np.testing.assert_allclose(array.sum(dtype=np.float64), wanted["sum"], rtol=1e-6, atol=1e-9)
        first = array.reshape(-1)[: len(wanted["first"])]
        np.testing.assert_array_equal(first, np.array(wanted["first"], array.dtype), name)


def test_it_is_found_from_the_folder_above(golden, folder, tmp_path):
    """Oracle: the checkpoint's own path. The latest step wins, whichever kind it is of."""
    assert any_format.locate(str(golden / "t5x_orbax")) == (folder, 12, "t5x")
    for name, source in (
        ("checkpoint_5", golden / "t5_1_1_tiny_t5x_ckpt/checkpoint_5"),
        ("checkpoint_12", folder),
        ("checkpoint_20.orbax-checkpoint-tmp-3", folder),
    ):
        shutil.copytree(source, tmp_path / name)
    assert any_format.locate(str(tmp_path)).step == 12
    with pytest.raises(UserError, match=f"give the folder {tmp_path / 'checkpoint_12'}, which"):
        any_format.locate(str(tmp_path / "checkpoint_12/state"))
    with pytest.raises(UserError, match="was not finished"):
        any_format.locate(str(tmp_path / "checkpoint_20.orbax-checkpoint-tmp-3"))


def test_training_goes_on_with_its_optimizer_state(folder):
    """Adafactor's state on the devices, its counts at step 12. Oracle: the checkpoint's arrays."""
    source = any_format.open_source(folder, "t5x")
    model = models.EncoderDecoderModel(source.network)
    partitioner = partitioning.Partitioner()
    mesh = partitioner.mesh(jax.devices()[:1])
    abstract, shardings = step.state_shardings(model, step.StepConfig(), partitioner, mesh)
    args = abstract.opt_state, shardings.opt_state, {}
    state = any_format.restore_adafactor(folder, abstract.params, *args)
    assert jax.tree.structure(state) == jax.tree.structure(abstract.opt_state)
    wanted = t5x_adafactor.read_state(folder, source.others, source.network, 12, abstract.opt_state)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, ours), array in zip(leaves, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, array.whole())
        kind, _ = t5x_adafactor.meaning(path_of(path))
        assert kind != "count" or np.all(np.asarray(ours) == 12)
    assert not all(np.all(np.asarray(leaf) == 0) for _, leaf in leaves)


def test_import_keeps_parameters_and_state(folder, tmp_path):
    """T5X -> ours -> T5X's names. Oracle: every array of the checkpoint, to the bit."""
    convert.import_checkpoint(
        folder, str(tmp_path / "run"), format="t5x", vocabulary=None, optimizer_state=True
    )
    ours = any_format.open_source(str(tmp_path / "run"))
    assert ours.step == 12
    convert.export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back"), format="t5x")
    _, wanted = t5x.open_checkpoint(folder)
    _, back = t5x.open_checkpoint(str(tmp_path / "back/checkpoint_12"))
    assert back.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(back[name].whole(), array.whole(), name)
    assert t5x_adafactor.to_param_states(ours.others, ours.network) is not None


def test_nothing_is_read_before_it_is_asked_for(copied):
    """Oracle: the file of the arrays' chunks, cut short: opening works, reading is one error."""
    chunks = max(copied.glob("state/ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    chunks.write_bytes(chunks.read_bytes()[:100])
    source = any_format.open_source(str(copied))
    assert len(source.params) == 29
    with pytest.raises(UserError, match=r"cannot be read: .*byte range"):
        source.params["token_embedder",].whole()


def remove(file: pathlib.Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def edit(file: pathlib.Path, change) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def without(prefix: str):
    """A change of the list of arrays: none whose path begins with `prefix`."""

    def change(content):
        tree = content["tree_metadata"]
        for name in [name for name in tree if name.startswith(prefix)]:
            del tree[name]

    return lambda file: edit(file, change)


def outside(file: pathlib.Path) -> None:
    """Name an array that lies outside of the checkpoint."""

    def change(content):
        first = next(iter(content["tree_metadata"].values()))
        first["key_metadata"] = [{"key": "target/../..", "key_type": 2}]

    edit(file, change)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("_METADATA", remove, "state/_METADATA'; copy the whole folder"),
        ("_METADATA", cut, "Unterminated string"),
        ("_METADATA", lambda f: f.write_text("[]"), "lists no arrays"),
        ("_METADATA", lambda f: f.write_text("[" * 100_000), "cannot be read"),
        ("_METADATA", lambda f: f.write_bytes(b"\xff"), "cannot be read"),
        (
            "_METADATA",
            lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
            "Git LFS",
        ),
        ("_METADATA", without("('target'"), "names no target/...: no checkpoint of T5X's"),
        ("_METADATA", without("('target', 'encoder', 'encoder_norm'"), "encoder_norm"),
        ("_METADATA", outside, "which is not an array's path"),
        ("manifest.ocdbt", remove, "state/manifest.ocdbt is missing"),
        ("manifest.ocdbt", cut, "Error decoding manifest"),
        ("d", remove, "cannot be read"),
        ("ocdbt.process_0", remove, "cannot be read"),
    ],
)
def test_a_damaged_folder_is_one_line(copied, file, damage, words):
    """Oracle: the error names the file or the array, in one line, without TensorStore's spec."""
    damage(copied / STATE / file)
    with pytest.raises(UserError) as error:
        read_all(copied)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "tensorstore_spec" not in str(error.value)
    assert str(copied) in str(error.value)


def test_a_step_that_is_none_is_step_0(copied):
    """A checkpoint without the array `state/step`. Oracle: as for T5X's own kind."""
    without("('state', 'step'")(copied / "state/_METADATA")
    assert any_format.locate(str(copied)).step == 0


def test_a_checkpoint_of_ours_is_not_taken_for_t5x_s(tmp_path, folder):
    """Ours are Orbax's too, with a description. Oracle: `t5x.is_checkpoint` of both."""
    convert.import_checkpoint(folder, str(tmp_path / "run"), format="t5x", vocabulary=None)
    ours = epath.Path(tmp_path / "run/checkpoints/12")
    assert (ours / "state/_METADATA").exists()
    assert not t5x.is_checkpoint(ours)
    assert t5x.is_checkpoint(epath.Path(folder))
