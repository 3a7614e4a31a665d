"""T5X checkpoints in and out, against those that T5X wrote (../shared/golden)."""

import dataclasses
import filecmp
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import serialization

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert, lazy, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import describe, flat, path_of
from cosmo.engine.checkpoints.interop import t5x, t5x_adafactor
from cosmo.engine.model import models, optimizer, partitioning, step

PLAIN = ("t5_1_1_tiny", "t5_1_0_tiny")
CASES = (*PLAIN, "t5_1_1_scan")


def checkpoint(golden: pathlib.Path, name: str) -> str:
    """The folder over a network's checkpoint: its only one is the latest."""
    return str(golden / f"{name}_t5x_ckpt")


def recorded(golden: pathlib.Path, name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """T5X's recorded arrays whose name starts with `prefix`, without it."""
    with np.load(golden / f"{name}.npz") as file:
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def on_one_device(source: any_format.Source, settings: step.StepConfig):
    """(model in float32, abstract state, its shardings) for a source's network."""
    model = models.EncoderDecoderModel(dataclasses.replace(source.network, dtype="float32"))
    partitioner = partitioning.Partitioner()
    mesh = partitioner.mesh(jax.devices()[:1])
    return model, *step.state_shardings(model, settings, partitioner, mesh)


@pytest.mark.parametrize("name", CASES)
def test_network_is_read_from_shapes(golden, name):
    """Oracle: the sizes that T5X's network was built with."""
    source = any_format.open_source(checkpoint(golden, name), "t5x")
    sizes = json.loads((golden / f"{name}.json").read_text())
    found = json.loads(json.dumps(dataclasses.asdict(source.network)))
    assert {k: found[k] for k in sizes if k in found and k != "scan_layers"} == {
        k: v for k, v in sizes.items() if k in found and k != "scan_layers"
    }
    assert source.network.relative_attention_per_layer == (name == "t5_1_1_scan")
    assert source.step == (0 if name == "t5_1_1_scan" else 5)


@pytest.mark.parametrize("name", PLAIN)
def test_scores_of_an_imported_checkpoint(golden, name, jit):
    """Log-likelihoods after five steps. Oracle: T5X's `score_batch`, from the same checkpoint."""
    source = any_format.open_source(checkpoint(golden, name))
    model, abstract, shardings = on_one_device(source, step.StepConfig())
    _, params = any_format.restore_params(source.path, abstract.params, shardings.params, {})
    batch = {k: jnp.asarray(v) for k, v in recorded(golden, name, "batch/").items()}
    ours = jit(models.score, static_argnums=0)(model, params, batch)
    np.testing.assert_allclose(ours["score"], recorded(golden, name)["score_batch"], rtol=1e-5)


def test_logits_of_the_scanned_network(golden, jit):
    """Layers on axis 1, heads apart, a relative bias a layer. Oracle: T5X's logits, to 1e-4."""
    source = any_format.open_source(checkpoint(golden, "t5_1_1_scan"))
    model, abstract, shardings = on_one_device(source, step.StepConfig())
    _, params = any_format.restore_params(source.path, abstract.params, shardings.params, {})
    batch = {k: jnp.asarray(v) for k, v in recorded(golden, "t5_1_1_scan", "batch/").items()}
    ours = jit(models.logits, static_argnums=0)(model, params, batch)
    assert np.max(np.abs(ours - recorded(golden, "t5_1_1_scan")["logits"])) <= 1e-4


def test_decoding_with_a_bias_a_layer(tiny_config, make_params, jit):
    """Oracle: the same network's teacher-forced logits, position by position."""
    config = tiny_config(relative_attention_per_layer=True)
    model = models.EncoderDecoderModel(config)
    params = make_params(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 40, (2, 6)), jnp.int32)
    inputs = jnp.asarray([[0, 5, 9, 3], [0, 8, 2, 7]], jnp.int32)

    def stepwise(params):
        module = models.bind(model, params)
        cache, weights, out = module.start_cache(tokens, 4), module.decoder_weights(), []
        for i in range(4):
            logits, cache = module.decode_step(weights, inputs[:, i], i, cache)
            out.append(logits)
        return jnp.stack(out, axis=1)

    def forced(params):
        return models.bind(model, params)(tokens, inputs, jnp.ones_like(inputs))

    np.testing.assert_allclose(jit(stepwise)(params), jit(forced)(params), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["t5_1_1_tiny", pytest.param("t5_1_0_tiny", marks=pytest.mark.slow)]
)
def test_training_goes_on_as_t5x_would(golden, name):
    """Fifteen steps from step 5 with Adafactor's state. Oracle: T5X's losses and parameters at 20.

    With a fresh optimizer the trace is another one, so the test can tell. T5 1.0 is followed as
    far as its ReLUs open in the same places: rounding then grows tenfold in three steps.
    """
    source = any_format.open_source(checkpoint(golden, name))
    settings = step.StepConfig()
    model, abstract, shardings = on_one_device(source, settings)
    args = abstract.opt_state, shardings.opt_state, {}
    _, params = any_format.restore_params(source.path, abstract.params, shardings.params, {})
    state = any_format.restore_adafactor(source.path, abstract.params, *args)
    batch = {k: jnp.asarray(v) for k, v in recorded(golden, name, "batch/").items()}
    transformation = settings.transformation()

    # Not the fast compiler of the other tests: its rounding grows from step to step.
    @jax.jit
    def update(params, state):
        total, grads = jax.value_and_grad(lambda p: models.loss(model, p, batch)[0])(params)
        updates, state = transformation.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + 1e-3 * u, params, updates), state, total

    def run(params, state):
        losses = []
        for _ in range(5, 20):
            params, state, total = update(params, state)
            losses.append(float(total))
        return params, losses

    fresh = transformation.init(params)
    ended, losses = run(params, state)
    theirs = recorded(golden, name, "adafactor_losses")[""][5:]
    np.testing.assert_allclose(losses[:11], theirs[:11], rtol=1e-4)
    _, other = run(params, fresh)
    assert np.max(np.abs(np.array(other) / theirs - 1)[:11]) > 1e-2
    if name == "t5_1_0_tiny":
        return
    np.testing.assert_allclose(losses, theirs, rtol=1e-3)
    arrays = recorded(golden, name, "adafactor_step20/params/")
    target = {f"target/{k}": lazy.from_array(v) for k, v in arrays.items()}
    for path, array in t5x.read_params("recorded", target, source.network).items():
        ours = flat(ended)[path]
        error = np.max(np.abs(ours - array.whole())) / np.max(np.abs(array.whole()))
        assert error <= 1e-3, path


@pytest.mark.parametrize("name", PLAIN)
def test_round_trip_is_the_same_files(golden, name, tmp_path):
    """T5X -> ours -> T5X, Adafactor's state included. Oracle: the bytes of every file."""
    convert.import_checkpoint(
        checkpoint(golden, name), str(tmp_path / "ours"), optimizer_state=True
    )
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), format="t5x")
    ours, theirs = tmp_path / "back/checkpoint_5", golden / f"{name}_t5x_ckpt/checkpoint_5"
    files = sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(ours)) for p in ours.rglob("*") if p.is_file()) == files
    assert len(files) > 100
    _, differ, broken = filecmp.cmpfiles(ours, theirs, files, shallow=False)
    assert not differ
    assert not broken


def test_round_trip_of_the_scanned_network(golden, tmp_path):
    """Oracle: every parameter's bits, under T5X's names."""
    path = checkpoint(golden, "t5_1_1_scan")
    convert.import_checkpoint(path, str(tmp_path / "ours"))
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), format="t5x")
    _, ours = t5x.open_checkpoint(str(tmp_path / "back/checkpoint_0"))
    _, theirs = t5x.open_checkpoint(f"{path}/checkpoint_0")
    wanted = [name for name in theirs if name.startswith("target/")]
    assert sorted(ours) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(ours[name].whole(), theirs[name].whole())


def test_adafactor_of_the_scanned_network(golden):
    """Which side is the row, and where the layers are. Oracle: the shapes that T5X wrote.

    And that reading gives back what was written, for a network that is wide and one that is narrow.
    """
    _, theirs = t5x.open_checkpoint(checkpoint(golden, "t5_1_1_scan") + "/checkpoint_0")
    config = t5x.network("recorded", theirs)
    for network, recorded_shapes in (
        (config, True),
        (dataclasses.replace(config, mlp_dim=32), False),
    ):
        model = models.EncoderDecoderModel(network)
        settings = step.StepConfig(optimizer.Adafactor(min_dim_size_to_factor=16))
        abstract = jax.eval_shape(lambda: step.init_state(model, settings, 0)).opt_state  # noqa: B023
        rng = np.random.default_rng(0)
        values = {}
        for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
            path = ("opt_state", *path_of(keys))
            values[path] = lazy.from_array(rng.random(leaf.shape).astype(np.float32))
        states = t5x_adafactor.to_param_states(values, network)
        arrays = {
            f"state/param_states/{name}/{kind}": lazy.from_array(array)
            for name, kinds in states.items()
            for kind, array in kinds.items()
        }
        if recorded_shapes:
            compared = 0
            for name, array in arrays.items():
                if name.endswith("kernel/v_row") and "logits" not in name:
                    for kind in ("v_row", "v_col"):
                        key = name.replace("v_row", kind)
                        assert arrays[key].shape == theirs[key].shape, key
                        compared += 1
                elif name.endswith("scale/v"):
                    assert array.shape == theirs[name].shape, name
            assert compared == 2 * (7 + 11)
        arrays |= {f"target/{side}/{side}/x": lazy.from_array(np.zeros(1)) for side in t5x.SIDES}
        back = t5x_adafactor.read_state("written", arrays, network, 3, abstract)
        for keys, array in jax.tree_util.tree_flatten_with_path(back)[0]:
            path = ("opt_state", *path_of(keys))
            kind, _ = t5x_adafactor.meaning(path)
            unused = array.shape[-1:] == (1,)
            wanted = 3 if kind == "count" else 0 if unused else values[path].whole()
            np.testing.assert_array_equal(array.whole(), np.broadcast_to(wanted, array.shape))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, tiny_config, make_params) -> epath.Path:
    """A T5X checkpoint of step 7. Tests copy it."""
    config = tiny_config()
    params = make_params(models.EncoderDecoderModel(config))
    arrays = {k: lazy.from_array(np.asarray(a)) for k, a in flat(params).items()}
    folder = epath.Path(tmp_path_factory.mktemp("untouched"))
    t5x.write_checkpoint(folder, 7, arrays, config, None, lambda count: None)
    return folder


@pytest.fixture
def written(tmp_path, untouched):
    """`written(change)`: a T5X checkpoint whose msgpack index went through `change`."""

    def make(change=lambda optimizer: None):
        folder = shutil.copytree(untouched, tmp_path / "checkpoint_7")
        index = serialization.msgpack_restore((folder / t5x.INDEX).read_bytes())
        change(index["optimizer"])
        (folder / t5x.INDEX).write_bytes(serialization.msgpack_serialize(index))
        return str(folder)

    return make


def drop(optimizer):
    del optimizer["target"]["decoder"]["layers_2"]["mlp"]["wo"]


def add(optimizer):
    optimizer["target"]["decoder"]["layers_2"]["mlp"]["gate"] = np.zeros((2, 2), np.float32)


def misshape(optimizer):
    optimizer["target"]["encoder"]["layers_1"]["mlp"]["wi_0"]["kernel"] = np.zeros((16, 25), "f4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["lacks decoder/layers_2/mlp/wo/kernel"]),
        (add, ["decoder/layers_2/mlp/gate", "no place"]),
        (misshape, ["encoder/layers_1/mlp/wi_0/kernel", "(16, 25)", "(16, 24)"]),
        (lambda optimizer: optimizer.pop("target"), ["no optimizer/target"]),
        (lambda optimizer: optimizer["target"].pop("token_embedder"), ["token_embedder/embedding"]),
    ],
)
def test_every_tensor_is_accounted_for(written, change, words):
    """Oracle: the name of the tensor that was taken away, added or reshaped, in the message."""
    with pytest.raises(UserError) as caught:
        any_format.open_source(written(change))
    for word in words:
        assert word in str(caught.value)


def odd_leaf(value):
    """A change of the index: one parameter's entry becomes `value`, or what it gives."""

    def change(optimizer):
        parent = optimizer["target"]["encoder"]["encoder_norm"]
        parent["scale"] = value(parent["scale"]) if callable(value) else value

    return change


def nested_deeply(entry):
    for _ in range(300):
        entry = {"a": entry}
    return entry


@pytest.mark.parametrize(
    "value",
    [
        "text",
        b"bytes",
        5,
        2.5,
        1 + 2j,
        [1, 2],
        [{"kvstore": {}}],
        {},
        {"kvstore": None},
        {"kvstore": "file:///etc"},
        lambda entry: {**entry, "driver": None},
        lambda entry: {**entry, "driver": "json"},
        lambda entry: {**entry, "kvstore": {"driver": "file", "path": "../secret/"}},
        lambda entry: {**entry, "kvstore": {"driver": "file", "path": "/etc/"}},
        lambda entry: {**entry, "kvstore": {"driver": "file", "path": 5}},
        lambda entry: {**entry, "kvstore": {"driver": "file", "path": "x|gzip:"}},
        lambda entry: {**entry, "kvstore": {"driver": "file", "path": "other"}},
        np.zeros(16, np.int32),
        np.zeros(16, np.complex64),
        nested_deeply,
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_odd_leaves_of_the_index_are_refused_in_one_line(written, value):
    """Oracle: a UserError of one line that names the parameter."""
    with pytest.raises(UserError) as caught:
        any_format.open_source(written(odd_leaf(value)))
    text = str(caught.value)
    assert "encoder/encoder_norm" in text and "\n" not in text and len(text) < 1000


@pytest.mark.parametrize("step", ["text", [1], -1, 2.5, np.zeros(3, np.int32)], ids=str)
def test_a_step_that_is_none_is_refused(written, step):
    """Oracle: a UserError that names the entry, from the step alone and from the whole."""
    folder = written(lambda optimizer: optimizer["state"].update(step=step))
    for read in (any_format.locate, any_format.open_source):
        with pytest.raises(UserError, match="state/step"):
            read(folder)


@pytest.mark.parametrize("content", [b"", b"\xc0", b"\x80", b"\x91" * 100_000, b"\xc7\x01\x01\x00"])
def test_an_index_that_is_none_is_refused_in_one_line(tmp_path, content):
    """Oracle: a UserError that names the folder."""
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    (folder / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match="checkpoint_3") as caught:
        any_format.open_source(str(folder))
    assert "\n" not in str(caught.value)


def test_a_cut_shape_in_the_index_is_no_size_of_the_cache(written):
    """Oracle: the parameters that were written; the array's own folder has the shape."""
    shape = {"shape": [2**62, 2**62]}
    folder = written(odd_leaf(lambda entry: {**entry, "metadata": shape}))
    params = any_format.open_source(folder).params
    assert params["encoder", "encoder_norm", "scale"].whole().shape == (16,)


def test_a_parameter_that_is_no_number_is_refused(written):
    """Oracle: the parameter's name in the message."""
    folder = written(odd_leaf(np.full(16, np.inf, np.float32)))
    source = any_format.open_source(folder)
    with pytest.raises(UserError, match="encoder/encoder_norm/scale holds NaN or infinity"):
        source.params["encoder", "encoder_norm", "scale"].whole()


def test_untouched_checkpoint_is_accepted(written):
    """The checks above refuse the change, not the checkpoint. Oracle: the step that was written."""
    assert any_format.open_source(written()).step == 7


def test_broken_index(tmp_path):
    """Oracle: a UserError that names the file's folder."""
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    (folder / "checkpoint").write_bytes(b"\x93garbage")
    with pytest.raises(UserError, match="checkpoint_3"):
        any_format.open_source(str(folder))


def test_missing_array_file(written):
    """An array that the index promises and the folder lacks. Oracle: its name in the message."""
    folder = written()
    for path in (epath.Path(folder) / "target.encoder.encoder_norm.scale").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"target/encoder/encoder_norm/scale"):
        any_format.open_source(folder)


def test_optimizer_state_must_be_there(written, golden):
    """Oracle: UserErrors that say what is missing or different."""
    with pytest.raises(UserError, match="no Adafactor state"):
        convert.import_checkpoint(written(), "unused", optimizer_state=True)
    _, arrays = t5x.open_checkpoint(checkpoint(golden, "t5_1_1_tiny") + "/checkpoint_5")
    config = t5x.network("recorded", arrays)
    model = models.EncoderDecoderModel(config)
    settings = step.StepConfig(optimizer.Adafactor(min_dim_size_to_factor=256))
    abstract = jax.eval_shape(lambda: step.init_state(model, settings, 0)).opt_state
    with pytest.raises(UserError, match="min_dim_size_to_factor"):
        t5x_adafactor.read_state("recorded", arrays, config, 5, abstract)
    momentum = {
        k: lazy.from_array(np.zeros((4, 4))) if k.endswith("/m") else v for k, v in arrays.items()
    }
    with pytest.raises(UserError, match="momentum"):
        t5x_adafactor.read_state("recorded", momentum, config, 5, abstract)


def test_missing_chunk(written):
    """Half a copy: an array's description without its data. Oracle: an error, not zeros."""
    folder = written()
    (epath.Path(folder) / "target.encoder.encoder_norm.scale/0").unlink()
    source = any_format.open_source(folder)
    with pytest.raises(UserError, match="target/encoder/encoder_norm/scale"):
        source.params["encoder", "encoder_norm", "scale"].whole()


def test_scanned_optimizer_state_by_the_checkpoint(tmp_path, tiny_config):
    """A run of the scanned network to T5X and back, its state too. Oracle: what was written."""
    config = tiny_config(relative_attention_per_layer=True)
    model = models.EncoderDecoderModel(config)
    state = step.init_state(model, step.StepConfig(), 0)
    arrays = jax.tree.map(lambda a: lazy.from_array(np.asarray(a) + 1), state)
    description = describe(model, None)
    streaming.write_checkpoint(str(tmp_path / "run"), 4, arrays, description)
    convert.export_checkpoint(str(tmp_path / "run"), str(tmp_path / "t5x"), format="t5x")
    source = any_format.open_source(str(tmp_path / "t5x"))
    _, abstract, shardings = on_one_device(source, step.StepConfig())
    back = any_format.restore_adafactor(
        source.path, abstract.params, abstract.opt_state, shardings.opt_state, {}
    )
    for (path, ours), wanted in zip(
        jax.tree_util.tree_flatten_with_path(back)[0],
        jax.tree.leaves(state.opt_state),
        strict=True,
    ):
        kind, _ = t5x_adafactor.meaning(path_of(path))
        unused = kind != "v" and kind != "count"  # tensors this small are not factored
        expected = 4 if kind == "count" else 0 if unused else np.asarray(wanted) + 1
        np.testing.assert_array_equal(ours, np.broadcast_to(expected, ours.shape))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mlp_activations": ("silu", "linear")}, "mlp_activations"),
        ({"relative_attention_max_distance": 64}, "max_distance"),
        ({"logits_via_embedding": True, "scale_decoder_outputs": False}, "logits_scale"),
    ],
)
def test_what_t5x_cannot_compute_is_not_exported(
    tmp_path, tiny_config, make_params, changes, field
):
    """Oracle: the field in the message, and no folder."""
    model = models.EncoderDecoderModel(tiny_config(**changes))
    arrays = jax.tree.map(lambda a: lazy.from_array(np.asarray(a)), make_params(model))
    streaming.write_checkpoint(str(tmp_path / "run"), 4, {"params": arrays}, describe(model, None))
    with pytest.raises(UserError, match=field):
        convert.export_checkpoint(str(tmp_path / "run"), str(tmp_path / "t5x"), format="t5x")
    assert not (tmp_path / "t5x/checkpoint_4").exists()


def test_a_failed_import_leaves_nothing(written, tmp_path, capfd):
    """A tensor that cannot be read halfway. Oracle: one error, no partial data, no other output."""
    folder = written()
    (epath.Path(folder) / "target.token_embedder.embedding/0.0").write_bytes(b"broken")
    with pytest.raises(UserError, match="token_embedder/embedding"):
        convert.import_checkpoint(folder, str(tmp_path / "new"))
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()]
    assert "Traceback" not in capfd.readouterr().err


def test_an_output_with_a_checkpoint_is_refused(written, tmp_path):
    """Any step: a foreign checkpoint must not become a run's latest. Oracle: what was there."""
    folder = written()
    convert.import_checkpoint(folder, str(tmp_path / "new"))
    for number in (3, 7, 9):
        with pytest.raises(UserError, match="has a checkpoint already"):
            convert.import_checkpoint(folder, str(tmp_path / "new"), step=number)
    with pytest.raises(UserError, match="step=-1"):
        convert.import_checkpoint(folder, str(tmp_path / "other"), step=-1)
    assert run_checkpoints.completed_steps(str(tmp_path / "new")) == [7]
