"""The published Canary is a ParlAI model over T5: here a tiny one, with its names and options."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from canary import Canary
from canary.module import Settings
from cosmo.__main__ import main
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import convert, run_checkpoints
from tests.engine import torch_files

DIALOGUES = [
    ["I want to scare my kids.", "Why would you do that?", "They never listen to me."],
    ["The bus was late again.", "Oh no! What did you do?"],
]


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """(HuggingFace's folder of the shared tiny model, the same as ParlAI's file, vocabulary)."""
    folder = tmp_path_factory.mktemp("published")
    convert.export_checkpoint(str(run), str(folder / "hf"), format="huggingface")
    tensors: dict = {f"t5.{k}": v for k, v in load_file(folder / "hf/model.safetensors").items()}
    for side in ("encoder", "decoder"):
        tensors[f"t5.{side}.embed_tokens.weight"] = "t5.shared.weight"
        for name in [name for name in tensors if name.startswith(f"t5.{side}.")]:
            tensors[name.replace(f"t5.{side}.", f"{side}.stack.")] = name
    tensors["t5.lm_head.weight"] = "t5.shared.weight"
    tensors["START"] = np.array([0])
    file = folder / "parlai/model"
    file.parent.mkdir()
    torch_files.save_state(file, tensors, number_training_updates=100, optimizer_type="adam")
    options = {"model": "hugging_face/t5", "t5_model_arch": "t5-large", "delimiter": "\n"}
    options |= {"text_truncate": 48, "label_truncate": 24, "t5_dropout": 0.0}
    file.with_name("model.opt").write_text(json.dumps(options))
    return str(folder / "hf"), str(file), str(run / run_checkpoints.VOCABULARY)


def test_labels_and_rots_are_those_of_the_huggingface_folder(published, tmp_path, capsys):
    """The file as it is, and imported by the command line. Oracle: the HuggingFace folder's chirps.

    Turns are joined by one space, which the folder's caller has to know.
    """
    folder, file, vocabulary = published
    how = {"vocabulary": vocabulary, "label_style": "sentinel", "batch_size": 4}
    lengths = {"inputs": 48, "targets": 24}
    theirs = Canary.load(folder, turn_separator=" ", lengths=lengths, **how)
    args = [f"--source={file}", f"--output={tmp_path / 'ours'}", f"--vocabulary={vocabulary}"]
    assert main(["import", "--format=parlai", *args, "--quiet"]) == 0
    assert "ParlAI model" in capsys.readouterr().out
    wanted = theirs.chirp(DIALOGUES)
    for path in (file, str(tmp_path / "ours")):
        if path != file:
            how["vocabulary"] = None  # kept with the checkpoint
        ours = Canary.load(path, **how)
        assert (ours.separator, ours.session.lengths) == (" ", lengths)
        assert ours.chirp(DIALOGUES) == wanted
    context = ours.context(DIALOGUES[0]).inputs
    assert context == "I want to scare my kids. Why would you do that? They never listen to me."


def test_separators(published, tmp_path):
    """Oracle: the caller's, then ParlAI's own, then ours."""
    folder, file, vocabulary = published
    found = [Settings.find(path, vocabulary=vocabulary).separator for path in (file, folder)]
    assert found == [" ", " // "]
    given = Settings.find(file, vocabulary=vocabulary, turn_separator=" | ")
    assert given.separator == " | "
    copy = tmp_path / "model"
    copy.write_bytes(pathlib.Path(file).read_bytes())
    options = json.loads(pathlib.Path(f"{file}.opt").read_text())
    pathlib.Path(f"{copy}.opt").write_text(json.dumps(options | {"delimiter": " // "}))
    assert Settings.find(str(copy), vocabulary=vocabulary).separator == " // "
    del options["delimiter"]  # ParlAI's default is a newline
    pathlib.Path(f"{copy}.opt").write_text(json.dumps(options))
    assert Settings.find(str(copy), vocabulary=vocabulary).separator == " "


def test_without_a_vocabulary(published):
    """ParlAI keeps none of T5's. Oracle: the remedy in the error."""
    with pytest.raises(UserError, match="serves for ParlAI's T5"):
        Canary.load(published[1])
