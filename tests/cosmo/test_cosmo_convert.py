"""The verbs `import` and `export`, and the other formats wherever a checkpoint is asked for."""

import json
import pathlib

import pytest

import cosmo
from cosmo.__main__ import main

DIALOGUES = [["I lost my key.", "Where did you see it last?"], ["What is for dinner?"]]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """{format: a folder with the shared run's last checkpoint in it}."""
    folder = tmp_path_factory.mktemp("exported")
    for format in ("hf", "t5x"):
        args = [f"--format={format}", f"--checkpoint={trained}", f"--output={folder / format}"]
        assert main(["export", *args, "--quiet"]) == 0
    return {format: folder / format for format in ("hf", "t5x")}


def test_files(exported):
    """Oracle: the file names that transformers and T5X look for."""
    assert {p.name for p in exported["hf"].iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (exported["t5x"] / "checkpoint_8/checkpoint").is_file()


@pytest.mark.parametrize("format", ["hf", "t5x"])
def test_answers_are_the_same_from_every_format(trained, exported, format):
    """Oracle: the run's own answers and scores."""
    ours = cosmo.load(str(trained))
    theirs = cosmo.load(str(exported[format]), lengths=ours.session.lengths)
    assert theirs.step == (8 if format == "t5x" else 0)
    assert theirs.generate(DIALOGUES, max_new_tokens=8) == ours.generate(
        DIALOGUES, max_new_tokens=8
    )


@pytest.mark.parametrize("format", ["hf", "t5x"])
def test_import_of_what_was_exported(trained, exported, format, tmp_path, capsys):
    """There and back by the command line. Oracle: the answers of the run."""
    args = [f"--format={format}", f"--source={exported[format]}", f"--output={tmp_path / 'back'}"]
    args += ["--optimizer_state"] if format == "t5x" else []
    assert main(["import", *args, "--quiet"]) == 0
    assert "parameters" in capsys.readouterr().out
    ours, back = cosmo.load(str(trained)), cosmo.load(str(tmp_path / "back"))
    assert back.session.vocabulary.fingerprint == ours.session.vocabulary.fingerprint
    assert back.generate(DIALOGUES, max_new_tokens=8) == ours.generate(DIALOGUES, max_new_tokens=8)


def test_import_of_bytes_and_export_as_mt5(tmp_path, capsys):
    """ByT5's network in, mT5's class out. Oracle: the message, and config.json's `model_type`."""
    folder = pathlib.Path(__file__).resolve().parents[1] / "golden/hf_classes/byt5"
    ours, out = tmp_path / "ours", tmp_path / "hf"
    assert main(["import", f"--source={folder}", f"--output={ours}", "--quiet"]) == 0
    assert "its tokens are bytes (ByT5Tokenizer" in capsys.readouterr().out
    args = [f"--checkpoint={ours}", f"--output={out}", "--format=hf", "--model_type=mt5"]
    assert main(["export", *args, "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "mt5"


def test_infer_reads_a_huggingface_folder(trained, exported, tmp_path):
    """CHECKPOINT_PATH in another format. Oracle: the answers from the run's own checkpoint."""
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in DIALOGUES))
    answers = []
    for path in (trained, exported["hf"]):
        output = tmp_path / f"{len(answers)}.jsonl"
        args = [f"--gin.MODEL_DIR={trained}", f"--gin.CHECKPOINT_PATH={path}", "--quiet"]
        assert main(["infer", *args, f"--input={records}", f"--output={output}"]) == 0
        answers.append(output.read_text())
    assert answers[0] == answers[1]


def test_training_starts_from_every_format(trained, exported, small, tmp_path, caplog):
    """INITIAL_CHECKPOINT_PATH. Oracle: the first loss, which is that of the run resumed.

    T5X's checkpoint brings Adafactor's state when asked: its second loss is the run's too.
    """
    losses = {}
    starts = {
        "ours": (trained, 8, True),
        "t5x": (exported["t5x"], 8, True),
        "hf": (exported["hf"], 0, False),
    }
    for name, (path, step, state) in starts.items():
        folder = tmp_path / name
        args = [*small, f"--gin.MODEL_DIR={folder}", f"--gin.INITIAL_CHECKPOINT_PATH={path}"]
        args += [f"--gin.RESTORE_OPTIMIZER_STATE={state}", f"--gin.TRAIN_STEPS={step + 2}"]
        args += [
            "--gin.STATS_PERIOD=1",
            "--gin.EVAL_PERIOD=None",
            "--gin.train/datasets.DatasetConfig.seed=5",
        ]
        caplog.clear()
        caplog.set_level("INFO")
        assert main(["train", *args]) == 0
        found = {"ours": "starting from", "t5x": "T5X checkpoint", "hf": "HuggingFace folder"}
        assert found[name] in caplog.text
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines]
    assert losses["t5x"] == pytest.approx(losses["ours"], rel=1e-5)
    # Another starting step reads the data in another order: only the level is comparable.
    assert losses["hf"][0] == pytest.approx(losses["ours"][0], rel=0.2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["export", "--format=hf", "--checkpoint=RUN", "--output=NEW", "--dtype=float16"],
            "overflow",
        ),
        (["export", "--format=hf", "--checkpoint=RUN", "--output=RUN"], "exists already"),
        *(
            (["export", "--format=hf", "--checkpoint=RUN", "--output=NEW", flag], words)
            for flag, words in (
                ("--vocabulary=tasks/sample/canary/vocabulary.model", "vocabulary mismatch"),
                ("--vocabulary=tasks/sample/prost/vocabulary.json", "ends a text with id 2"),
                ("--max_shard_gb=0", "must be above 0, such as 5.0 (--max_shard_gb)"),
                ("--max_shard_gb=nan", "must be above 0"),
                ("--max_shard_gb=inf", "must be above 0"),
            )
        ),
        (["import", "--source=T5X", "--output=NEW", "--step=3000000000"], "0 to 2147483647"),
        (
            ["export", "--format=t5x", "--checkpoint=RUN", "--output=NEW", "--dtype=bfloat16"],
            "float32",
        ),
        (["export", "--format=hf", "--checkpoint=NEW", "--output=NEW"], "does not exist"),
        (["import", "--format=hf", "--source=T5X", "--output=NEW"], "is a T5X checkpoint"),
        (["import", "--source=RUN", "--output=NEW"], "of ours already"),
        (["import", "--source=HF", "--output=NEW", "--optimizer_state"], "no optimizer state"),
        (["import", "--source=HF", "--output=/proc/nothing"], "cannot write"),
    ],
)
def test_mistakes_are_one_line(trained, exported, tmp_path, capsys, args, words):
    """Oracle: exit code 1, one line with the words, and nothing left behind."""
    places = {"RUN": trained, "NEW": tmp_path / "new", "T5X": exported["t5x"], "HF": exported["hf"]}
    for name, path in places.items():
        args = [arg.replace(f"={name}", f"={path}") for arg in args]
    assert main([*args, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_vocabulary_with_too_many_pieces(exported, shared, tmp_path, capsys):
    """Oracle: both sizes in the message: 32,100 pieces for 2,048 rows."""
    args = [f"--source={exported['hf']}", f"--output={tmp_path / 'new'}"]
    path = shared / "data/t5_cc_all.32000.100extra.model"
    assert main(["import", *args, f"--vocabulary={path}", "--quiet"]) == 1
    assert "32100 pieces" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_spare_rows_are_said(exported, tmp_path, caplog):
    """Oracle: the sample vocabulary's 2,000 pieces and the model's 2,048 rows."""
    caplog.set_level("INFO")
    args = [f"--source={exported['hf']}", f"--output={tmp_path / 'new'}"]
    assert main(["import", *args]) == 0
    assert "2,048 rows are 48 more than the vocabulary's 2,000 pieces" in caplog.text


def test_transformers_says_what_infer_says(trained, exported):
    """The exported folder in transformers. Oracle: our greedy text. Needs the extra `hf`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = cosmo.load(str(trained))
    rows = ours._rows(DIALOGUES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported["hf"]))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(str(exported["hf"])).eval()
    for row, reply in zip(rows, ours.generate(DIALOGUES, max_new_tokens=8), strict=True):
        inputs = tokenizer(row.inputs, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == list(row.input_ids)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == reply.text


def test_another_vocabulary_is_refused(trained, exported, tmp_path, capsys):
    """A HuggingFace folder says what its ids mean. Oracle: the mismatch, in import and in infer."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((exported["hf"] / "spiece.model").read_bytes())
    model.pieces[100].piece, model.pieces[101].piece = "one", "two"
    other = tmp_path / "other.model"
    other.write_bytes(model.SerializeToString())
    args = [f"--source={exported['hf']}", f"--output={tmp_path / 'new'}", f"--vocabulary={other}"]
    assert main(["import", *args, "--quiet"]) == 1
    assert "vocabulary mismatch" in capsys.readouterr().err
    args = [f"--gin.MODEL_DIR={trained}", f"--gin.CHECKPOINT_PATH={exported['hf']}", "--quiet"]
    args += [f"--gin.VOCABULARY_PATH={other}", "--input=tasks/sample/questions.jsonl"]
    assert main(["infer", *args, f"--output={tmp_path / 'out.jsonl'}"]) == 1
    assert "vocabulary mismatch" in capsys.readouterr().err


def test_engine_and_tasks_agree_on_fingerprints(trained, shared):
    """Oracle: `cosmo.tasks.vocabularies`, of which the engine knows nothing."""
    from cosmo.engine.checkpoints.interop import tokenizer
    from cosmo.tasks import vocabularies

    for path in (trained / "vocabulary.model", shared / "data/t5_cc_all.32000.100extra.model"):
        assert tokenizer.fingerprint(str(path)) == vocabularies.load(path).fingerprint


def test_a_run_uses_its_own_copy_of_the_vocabulary(trained, tmp_path, monkeypatch):
    """The file it was trained with is gone. Oracle: the answers with the copy are the run's own."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    text = (folder / "config.gin").read_text()
    gone = text.replace("'tasks/sample/vocabulary.model'", f"'{tmp_path}/gone.model'")
    assert gone != text
    (folder / "config.gin").write_text(gone)
    answers = []
    for run in (trained, folder):
        output = tmp_path / f"{len(answers)}.jsonl"
        args = ["--input=tasks/sample/questions.jsonl", f"--output={output}", "--quiet"]
        assert main(["infer", f"--gin.MODEL_DIR={run}", *args]) == 0
        answers.append(output.read_text())
    assert answers[0] == answers[1]
