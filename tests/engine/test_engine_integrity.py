"""Damaged checkpoints are found, named and stepped over; states move between numbers of devices."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, checkpoint_writer, integrity, run_checkpoints
from tests import warm_process
from tests.engine import fault_driver, faults

OPTIONS = {**fault_driver.OPTIONS, "total_steps": 12, "save_period": 4, "keep": None}


def run(folder, **changes):
    """A training run in this process; the final step."""
    return int(faults.run_here(OPTIONS, folder, **changes).step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints 4, 8 and 12; to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 12
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def files(checkpoint):
    """Files of a checkpoint that hold numbers, or say where they are, the largest first."""
    found = [p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size]
    return sorted(found, key=lambda p: -p.stat().st_size)


def flip(path, seed=0):
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    where = random.Random(seed).randrange(len(content) * 8)
    content[where // 8] ^= 1 << where % 8
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": (lambda c: flip(files(c)[0]), "another checksum than was written"),
    "cut short": (lambda c: os.truncate(files(c)[0], 100), "has 100 bytes"),
    "deleted shard": (lambda c: files(c)[1].unlink(), "is missing"),
    "no manifest": (lambda c: flip(c / "checksums.0.json"), ""),
    "not finished": (lambda c: (c / "commit_success.txt").unlink(), "was not finished"),
    "progress": (lambda c: (c / "progress/metadata").write_text("{}"), "progress/metadata"),
    "another step's": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "8", c)),
        "it is the checkpoint of step 8 under another step's name",
    ),
    "another run's": (
        lambda c: edit_manifest(c, run="of-another"),
        "it belongs to another run: to of-another, and this run is ",
    ),
    # Of an older version: no checksums, but what cannot be read is seen too.
    "unreadable, without checksums": (
        lambda c: ((c / "checksums.0.json").unlink(), files(c)[0].unlink()),
        "cannot be read",
    ),
}


def edit_manifest(folder, **changes):
    """Replace entries of a checkpoint's manifest; None removes one."""
    path = folder / "checksums.0.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_a_renamed_checkpoint_without_a_step_in_its_checksums_is_refused(copied):
    """Of an older version. Oracle: one error with both steps; `train` and `infer` of new ones too.

    Taken as step 10, the state of step 8 would train two updates fewer than TRAIN_STEPS says.
    """
    shutil.rmtree(copied / "checkpoints/12")
    (copied / "checkpoints/8").rename(copied / "checkpoints/10")
    with pytest.raises(UserError, match="damaged: it is the checkpoint of step 8 under another"):
        run_checkpoints.locate(str(copied / "checkpoints/10"))
    edit_manifest(copied / "checkpoints/10", step=None)
    with pytest.raises(UserError, match="checkpoints/10 holds the state of step 8"):
        run(copied)


def test_swapped_checkpoints_get_their_names_back(copied, caplog):
    """Two with each other's names, and one that a kill left half renamed. Oracle: what the run
    saved under these names; nothing is trained again."""
    folder = copied / "checkpoints"
    before = {step: (folder / str(step) / "checksums.0.json").read_text() for step in (8, 12)}
    (folder / "8").rename(folder / "x")
    (folder / "12").rename(folder / "8")
    (folder / "x").rename(folder / "12.misnamed")
    assert run(copied) == 12
    after = {step: (folder / str(step) / "checksums.0.json").read_text() for step in (8, 12)}
    assert after == before and not (copied / "damaged_checkpoints").exists()
    assert "checkpoints/12 was under another step's name, 8, and is renamed" in caplog.text


def test_checkpoints_copied_alone_keep_their_run(copied):
    """Property: without the file run_id the newest checkpoint's run goes on under its name."""
    before = (copied / "run_id").read_text()
    shutil.rmtree(copied / "checkpoints/12")
    (copied / "run_id").unlink()
    assert run(copied) == 12
    assert (copied / "run_id").read_text() == before
    assert json.loads((copied / "checkpoints/12/checksums.0.json").read_text())["run"] in before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_steps_over_a_damaged_checkpoint(finished, copied, caplog, damage):
    """Oracle: the undamaged run, to the bit, after going on from the checkpoint before; the log
    names the damaged one and why, and it is kept aside."""
    spoil, why = DAMAGES[damage]
    spoil(copied / "checkpoints/12")
    (copied / "checkpoints/16.orbax-checkpoint-tmp").mkdir()  # what a kill leaves
    with caplog.at_level("INFO", "cosmo"):
        assert run(copied) == 12
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("checkpoints/12 is not used: " in w and why in w for w in warnings), warnings
    assert any(r.getMessage().startswith("resuming at step 8") for r in caplog.records)
    assert (copied / "damaged_checkpoints/12").is_dir()
    assert run_checkpoints.completed_steps(str(copied)) == [4, 8, 12]
    assert not list((copied / "checkpoints").glob("*tmp*"))
    assert faults.results(copied) == faults.results(finished)


def test_no_flipped_bit_goes_unnoticed(copied):
    """Property: one bit flipped in each of the files in turn is found; or nothing depends on it:
    Orbax's note of when it wrote."""
    folder = copied / "checkpoints/8"
    unnoticed = []
    assert integrity.find_damage(folder) is None
    for seed, path in enumerate(files(folder)):
        content = path.read_bytes()
        flip(path, seed)
        if integrity.find_damage(folder) is None:
            unnoticed.append(path.name)
        path.write_bytes(content)
    assert set(unnoticed) <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert len(files(folder)) > 15
    assert integrity.find_damage(folder) is None


def test_parts_of_a_checkpoint_are_checked_by_all(copied):
    """Property: of three processes exactly one finds a damaged file, whichever file it is."""
    folder = copied / "checkpoints/8"
    for path in files(folder)[:6]:
        content = path.read_bytes()
        flip(path)
        found = [integrity.find_damage(folder, part, 3) for part in range(3)]
        if not path.name.startswith("checksums"):
            assert sum(problem is not None for problem in found) == 1
        path.write_bytes(content)


def test_a_named_checkpoint_that_is_damaged_is_an_error(copied, caplog):
    """Named: an error, whoever reads it. A run's folder: the one before, with a word."""
    flip(files(copied / "checkpoints/12")[0])
    with pytest.raises(UserError, match=r"checkpoints/12 is damaged: state/.* checksum"):
        any_format.locate(str(copied / "checkpoints/12"))
    assert any_format.locate(str(copied)).step == 8
    assert "checkpoints/12 is damaged and not used" in caplog.text
    assert (copied / "checkpoints/12").exists()  # readers move nothing
    for step in (4, 8):
        files(copied / f"checkpoints/{step}")[0].unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        any_format.locate(str(copied))
    (copied / "checkpoints/4/commit_success.txt").unlink()
    with pytest.raises(UserError, match="was not finished"):
        any_format.locate(str(copied / "checkpoints/4"))


def test_checkpoints_without_checksums_are_read(copied):
    """Oracle: the same state as with them."""
    for manifest in copied.glob("checkpoints/*/checksums*"):
        manifest.unlink()
    assert run(copied, total_steps=16) == 16


def test_a_finished_run_is_left_as_it_is(copied, caplog):
    """The same settings again end well, fewer steps are an error. Oracle: the state that was saved,
    and the files that were there."""
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", "cosmo"):
        assert run(copied) == 12
    assert f"{copied} is finished: it is at step 12, which is TRAIN_STEPS" in caplog.text
    with pytest.raises(UserError, match="is at step 12 and TRAIN_STEPS=8: nothing to do"):
        run(copied, total_steps=8)
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_checksums_by_hand(tmp_path):
    """Oracle: CRC-32's published check value, of the text 123456789."""
    (tmp_path / "a").write_text("123456789")
    assert integrity.checksum(tmp_path / "a") == (9, 0xCBF43926)


@pytest.mark.parametrize(
    "text, names",
    [
        ("# of tasks: 1/2.\nThe first task: 0. Some timed out task names:\n1\n\n\nRPC: /x", "1"),
        ("Some timed out task names:\n/job:jax/task:1\n/job:jax/task:12\n\nRPC", "1, 12"),
        ("UNAVAILABLE: gone", ""),
    ],
)
def test_who_lags_is_read_from_the_barriers_message(text, names):
    """Oracle: messages as the coordination service writes them."""
    assert checkpoint_writer.late_processes(text) == names


# States between devices.

RESHARD = """
import json, sys
sys.path[:0] = ["."]
import jax, numpy as np
from tests.engine import fault_driver
from cosmo.engine.checkpoints import run_checkpoints, checkpoint_writer
from cosmo.engine.checkpoints.description import flat
from cosmo.engine.model import partitioning
from cosmo.engine.model.step import state_shardings

devices, action, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
assert len(jax.devices()) == devices
fault_driver.patch(fault_driver.OPTIONS)
run = fault_driver.settings(folder, fault_driver.OPTIONS)
mesh = partitioning.Partitioner().mesh()
abstract, shardings = state_shardings(run["model"], run["step"], run["partitioner"], mesh)
saver = checkpoint_writer.CheckpointWriter(folder, run["checkpoint"])
if action == "save":
    rng = np.random.default_rng(0)
    fill = lambda a: rng.integers(1, 2**30, a.shape, np.int32).view(np.int32)
    make = lambda a, s: jax.device_put(fill(a).astype(a.dtype), s)
    state = jax.tree.map(make, abstract, shardings)
    state = state._replace(step=jax.device_put(np.int32(5), shardings.step))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    saver.save(5, state, {})
    saver.wait()
else:
    state = saver.restore(run_checkpoints.abstract_like(abstract, shardings), {})
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding and len(leaf.sharding.device_set) == devices
arrays = {"/".join(path): np.asarray(leaf) for path, leaf in flat(state).items()}
np.savez(sys.argv[4], **arrays)
"""


def on_devices(devices: int, action: str, folder) -> dict[str, np.ndarray]:
    """The arrays of the state in FOLDER/run, saved or restored on so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    out = folder / f"{action}{devices}.npz"
    arguments = [str(devices), action, str(folder / "run"), str(out)]
    done = warm_process.run(
        [sys.executable, "-c", RESHARD, *arguments],
        cwd=faults.ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return dict(np.load(out))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(folder, arrays) of a state that eight devices have saved."""
    folder = tmp_path_factory.mktemp("eight")
    saved = on_devices(8, "save", folder)
    assert sum(name.startswith("opt_state/") for name in saved) > 10
    assert {name.split("/")[0] for name in saved} == {"step", "params", "opt_state"}
    return folder, saved


def assert_same_bits(arrays, saved) -> None:
    assert arrays.keys() == saved.keys()
    for name in saved:
        assert arrays[name].dtype == saved[name].dtype, name
        assert arrays[name].tobytes() == saved[name].tobytes(), name


@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_saved_on_eight_devices_restored_on_fewer(eight, devices):
    """Oracle: the arrays that were saved, bitwise, parameters and optimizer state."""
    folder, saved = eight
    assert_same_bits(on_devices(devices, "restore", folder), saved)


def test_saved_on_eight_devices_read_without_any(eight):
    """Oracle: the arrays that were saved. JAX may use no device that exists."""
    folder, saved = eight
    code = "import sys, pickle; from cosmo.engine.checkpoints import any_format as c;"
    code += "pickle.dump(c.read_numpy(sys.argv[1]), sys.stdout.buffer)"
    env = {**os.environ, "JAX_PLATFORMS": "nothing"}
    command = [sys.executable, "-c", code, str(folder / "run")]
    done = warm_process.run(command, cwd=faults.ROOT, env=env, capture_output=True, check=True)
    import pickle

    step, state = pickle.loads(done.stdout)
    assert step == 5
    assert_same_bits({k.lstrip("/"): v for k, v in faults.leaves(state).items()}, saved)


def test_an_imported_checkpoint_has_checksums(tmp_path):
    """Property: whoever writes a checkpoint of ours leaves checksums that hold."""
    from cosmo.engine.checkpoints import lazy, streaming

    state = {"params": {"w": lazy.from_array(np.arange(6.0, dtype=np.float32).reshape(2, 3))}}
    streaming.write_checkpoint(str(tmp_path), 3, state, {"network": "x"})
    folder = tmp_path / "checkpoints/3"
    named = json.loads((folder / "checksums.0.json").read_text())["files"]
    assert len(named) > 3 and integrity.find_damage(folder) is None
    assert any_format.read_numpy(str(tmp_path))[1]["params"]["w"].tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
