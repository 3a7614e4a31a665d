"""The verbs, end to end on the sample corpus, and what each says to bad input."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest

from cosmo.__main__ import main
from cosmo.engine.checkpoints import any_format
from tests import warm_process


def run(*arguments: str) -> int:
    """The exit code of `python -m cosmo ...`, in this process."""
    return main([*arguments, "--quiet"])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    capsys.readouterr()
    assert run(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    found = [line for line in error if line.startswith("error: ")]
    assert len(found) == 1, error
    assert error[-1] == found[0], error  # nothing is printed after it
    return found[0]


def test_train_leaves_what_the_readme_says(trained):
    """Property: checkpoints, metrics of every period, TensorBoard events and the settings."""
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["4", "8"]
    assert list((trained / "tensorboard").glob("events*"))
    assert "TRAIN_STEPS = 8" in (trained / "config.gin").read_text()
    assert json.loads((trained / "settings.json").read_text())["macros"]["TRAIN_STEPS"] == 8
    rows = lines(trained / "metrics.jsonl")
    assert [r["step"] for r in rows if "train/loss" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in rows if "eval/all/loss" in r] == [4, 8]
    last = rows[-1]
    for name in ("soda/f1", "soda/bleu4", "soda/perplexity", "prosocial_dialog/token_accuracy"):
        assert np.isfinite(last[f"infer_eval/{name}"])
    for task in ("soda", "prosocial_dialog", "all"):  # one line tells one story
        loss, perplexity = last[f"eval/{task}/loss"], last[f"eval/{task}/perplexity"]
        assert perplexity == pytest.approx(np.exp(loss))


def test_loss_falls(trained):
    """Property: learning; an untrained model's loss is above ln(vocabulary)."""
    losses = [r["train/loss"] for r in lines(trained / "metrics.jsonl") if "train/loss" in r]
    assert losses[-1] < losses[0] - 0.3


def test_training_again_says_that_it_is_done(trained, small, capsys):
    """A loop that starts a finished run again ends. Oracle: exit code 0 and the line."""
    assert run("train", *small, f"--gin.MODEL_DIR={trained}", "--gin.TRAIN_STEPS=8") == 0
    assert f"done: step 8 in {trained}" in capsys.readouterr().out
    text = refusal(capsys, "train", *small, f"--gin.MODEL_DIR={trained}", "--gin.TRAIN_STEPS=7")
    assert "step 8" in text


def test_eval_needs_only_the_folder(trained, tmp_path, capsys):
    """Oracle: the numbers that training logged for the same examples and parameters."""
    assert (
        run(
            "eval",
            f"--gin.MODEL_DIR={trained}",
            f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
            "--gin.EVAL_NUM_EXAMPLES=3",
        )
        == 0
    )
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["step"] == 8
    logged = lines(trained / "metrics.jsonl")[-1]
    for task, values in report["metrics"].items():
        for name, value in values.items():
            assert value == pytest.approx(logged[f"infer_eval/{task}/{name}"], rel=1e-4), name
    assert len(lines(tmp_path / "soda-predictions.jsonl")) == 3
    assert "perplexity" in capsys.readouterr().out


@pytest.fixture(scope="module")
def predictions(trained, tmp_path_factory):
    """`infer` in predict mode over the validation set, batch 32."""
    folder = tmp_path_factory.mktemp("predictions")
    assert run(
        "infer", f"--gin.MODEL_DIR={trained}", f"--gin.INFER_OUTPUT_DIR={folder}",
        "--gin.INFER_NUM_EXAMPLES=9",
    ) == 0  # fmt: skip
    return folder


def test_infer_writes_the_promised_fields(predictions):
    """Oracle: the format in docs/infer.md."""
    rows = lines(predictions / "soda-predict.jsonl")
    assert len(rows) == 9
    assert set(rows[0]) == {"id", "inputs", "targets", "prediction", "score"}
    assert rows[0]["id"] == "soda-validation-0-1"
    assert " <sep> Imagine you are " in rows[0]["inputs"]
    assert rows[0]["score"] < 0


@pytest.mark.parametrize("batch_size", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_padding_of_the_last_batch_changes_nothing(trained, predictions, tmp_path, batch_size):
    """Property: 9 records in batches of 32, 4 (the last has one) and 9 have the same answers."""
    assert run(
        "infer", f"--gin.MODEL_DIR={trained}", f"--gin.INFER_OUTPUT_DIR={tmp_path}",
        "--gin.INFER_NUM_EXAMPLES=9", f"--gin.INFER_BATCH_SIZE={batch_size}",
    ) == 0  # fmt: skip
    ours, theirs = (lines(f / "soda-predict.jsonl") for f in (tmp_path, predictions))
    assert [r["prediction"] for r in ours] == [r["prediction"] for r in theirs]
    np.testing.assert_allclose([r["score"] for r in ours], [r["score"] for r in theirs], rtol=1e-5)


def test_score_mode_agrees_with_perplexity(trained, tmp_path):
    """Oracle: exp(-sum of scores / tokens) is the perplexity that eval prints for the same rows."""
    assert run(
        "infer", f"--gin.MODEL_DIR={trained}", f"--gin.INFER_OUTPUT_DIR={tmp_path}",
        "--gin.INFER_NUM_EXAMPLES=3", "--gin.MODE=score",
    ) == 0  # fmt: skip
    rows = lines(tmp_path / "soda-score.jsonl")
    perplexity = np.exp(-sum(r["score"] for r in rows) / sum(r["num_tokens"] for r in rows))
    logged = lines(trained / "metrics.jsonl")[-1]["infer_eval/soda/perplexity"]
    assert perplexity == pytest.approx(logged, rel=1e-4)


def test_infer_input_without_tensorflow(trained, tmp_path):
    """Property: the command works where TensorFlow and SeqIO cannot be imported; bad records are
    set aside with their reasons, good ones answered in order."""
    records = tmp_path / "in.jsonl"
    good = {"narrative": "Ann met Bo.", "instruction": "Imagine you are Bo and speak to Ann"}
    records.write_text(
        json.dumps({**good, "turns": ["Hi, Bo!"], "id": "first"})
        + "\nnot json\n"
        + json.dumps({**good, "turns": []})
        + "\n"
        + json.dumps({"turns": ["Only this."]})
        + "\n"
    )
    block = "import sys; sys.modules['tensorflow'] = sys.modules['seqio'] = None; "
    start = "from cosmo.__main__ import main; sys.exit(main(sys.argv[1:]))"
    output = tmp_path / "out.jsonl"
    arguments = ["infer", f"--gin.MODEL_DIR={trained}", f"--input={records}", f"--output={output}"]
    done = warm_process.run(
        [sys.executable, "-c", block + start, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = lines(output)
    assert [r["id"] for r in rows] == ["first", "3"]
    assert rows[0]["inputs"] == (
        "Ann met Bo. <sep> Imagine you are Bo and speak to Ann <sep> Hi, Bo!"
    )
    rejected = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert [r["line"] for r in rejected] == [2, 3]
    assert "turns" in rejected[1]["reason"]


def test_input_and_mixture_agree(trained, predictions, tmp_path):
    """Oracle: the SeqIO path. A record read without SeqIO has the same text, tokens and answer."""
    from cosmo.tasks.families import soda_file_examples

    examples = itertools.islice(soda_file_examples("tasks/sample/soda", "validation"), 9)
    records = tmp_path / "in.jsonl"
    records.write_text(
        "".join(
            json.dumps(
                {
                    "id": e.id,
                    "narrative": e.narrative,
                    "instruction": e.instruction,
                    "turns": list(e.turns),
                }
            )
            + "\n"
            for e in examples
        )
    )
    output = tmp_path / "out.jsonl"
    assert (
        run("infer", f"--gin.MODEL_DIR={trained}", f"--input={records}", f"--output={output}") == 0
    )
    ours, theirs = lines(output), lines(predictions / "soda-predict.jsonl")
    assert [r["id"] for r in ours] == [r["id"] for r in theirs]
    assert [r["prediction"] for r in ours] == [r["prediction"] for r in theirs]


@pytest.mark.parametrize("optimizer_state", [False, True])
def test_training_starts_from_another_run(trained, small, tmp_path, optimizer_state):
    """Property: step numbers go on from the checkpoint, and the loss is a trained model's.

    It is nearer to the last loss of the run that it starts from than to that run's first one.
    """
    assert run(
        "train", *small, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=10",
        f"--gin.INITIAL_CHECKPOINT_PATH={trained / 'checkpoints' / '8'}",
        f"--gin.RESTORE_OPTIMIZER_STATE={optimizer_state}", "--gin.STATS_PERIOD=1",
        "--gin.EVAL_PERIOD=None",
    ) == 0  # fmt: skip
    rows = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "train/loss" in r] == [9, 10]
    first_ever, *_, last = [r for r in lines(trained / "metrics.jsonl") if "train/loss" in r]
    began, first, final = (row["train/loss"] for row in (rows[0], first_ever, last))
    assert abs(began - final) < abs(began - first)
    assert began < first - 0.3


# Bad input: one line, what, where and what to do; exit code 1.


def test_missing_data(small, tmp_path, capsys):
    """A data folder that does not exist."""
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}",
        "--gin.SODA_PATH=/no/such/folder", "--gin.TRAIN_STEPS=1",
    )  # fmt: skip
    assert "/no/such/folder" in text


def corpus(tmp_path, change) -> str:
    """The sample corpus's SODA folder with line 2 of the training file changed."""
    folder = tmp_path / "soda"
    shutil.copytree("tasks/sample/soda", folder)
    path = folder / "train.jsonl"
    rows = path.read_text().splitlines()
    rows[1] = change(rows[1])
    path.write_text("\n".join(rows) + "\n")
    return str(folder)


def shorter(row: str) -> str:
    record = json.loads(row)
    return json.dumps({**record, "speakers": record["speakers"][:-1]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: row[:50], "JSON"),
        (shorter, "speakers"),
        (lambda row: json.dumps({**json.loads(row), "dialogue": [], "speakers": []}), "dialogue"),
    ],
    ids=["broken JSON line", "speakers of another length", "empty dialogue"],
)
def test_bad_records_stop_training(small, tmp_path, capsys, change, expected):
    """File, line and what is wrong with it."""
    folder = corpus(tmp_path, change)
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}",
        f"--gin.SODA_PATH={folder}", "--gin.TRAIN_STEPS=1",
    )  # fmt: skip
    assert "train.jsonl:2" in text
    assert expected in text


def test_vocabulary_of_another_checkpoint(trained, tmp_path, capsys):
    """The two vocabularies are named."""
    other = tmp_path / "other.model"
    from tools.train_vocabulary import main as train_vocabulary

    arguments = ["--input", "tasks/sample/soda", f"--output={other}", "--vocab_size=500"]
    assert train_vocabulary(arguments) == 0
    text = refusal(
        capsys, "eval", f"--gin.MODEL_DIR={trained}", f"--gin.VOCABULARY_PATH={other}",
        f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
    )  # fmt: skip
    assert "vocabulary mismatch" in text
    assert "tasks/sample/vocabulary.model" in text
    assert str(other) in text


def test_vocabulary_larger_than_the_embedding(small, tmp_path, capsys):
    """Pieces without a row in the embedding."""
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.VOCAB_SIZE=100"
    )
    assert "100 rows" in text


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_checkpoint_of_another_size(trained, small, tmp_path, capsys, verb):
    """The parameter and both shapes."""
    arguments = [*small, f"--gin.MODEL_DIR={trained}", "--gin.t5.T5Config.mlp_dim=48"]
    arguments += (
        ["--gin.TRAIN_STEPS=9"] if verb == "train" else [f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    )
    text = refusal(capsys, verb, *arguments)
    assert "layers/mlp/w" in text
    assert "32" in text
    assert "48" in text


def test_no_checkpoint(tmp_path, small, capsys):
    """A folder without checkpoints, and one that does not exist."""
    text = refusal(capsys, "eval", *small, f"--gin.MODEL_DIR={tmp_path}")
    assert f"no checkpoint in {tmp_path}" in text
    text = refusal(capsys, "infer", f"--gin.MODEL_DIR={tmp_path / 'none'}")
    assert "settings.json" in text


def test_missing_validation_set_is_said_before_training(small, tmp_path, capsys):
    """A corpus with a training split alone: an error at once, or EVAL_PERIOD=None trains."""
    for corpus_name in ("soda", "prosocial"):
        (tmp_path / corpus_name).mkdir()
        shutil.copy(
            f"tasks/sample/{corpus_name}/test.jsonl", tmp_path / corpus_name / "train.jsonl"
        )
    arguments = [
        "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TRAIN_STEPS=1",
        f"--gin.SODA_PATH={tmp_path}/soda", f"--gin.PROSOCIAL_PATH={tmp_path}/prosocial",
    ]  # fmt: skip
    assert "'validation'" in refusal(capsys, *arguments)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert run(*arguments, "--gin.EVAL_PERIOD=none") == 0


@pytest.mark.parametrize(
    "setting",
    ["EVAL_PERIOD=0", "STATS_PERIOD=0", "TRAIN_STEPS=100k", "MIXTURE_OR_TASK_MODULE=no.such"],
)
def test_impossible_settings(small, tmp_path, capsys, setting):
    """One line that names the setting."""
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=1",
        f"--gin.{setting}",
    )  # fmt: skip
    assert setting.split("=")[0] in text


@pytest.mark.parametrize(
    ("content", "name"), [("checkpoint", "T5X"), ("config.json", "HuggingFace")]
)
def test_checkpoints_of_other_formats_are_refused_by_name(small, tmp_path, capsys, content, name):
    """A T5X or HuggingFace folder is told apart from a folder with nothing in it."""
    (tmp_path / content).write_text("{}")
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}",
        f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path}",
    )  # fmt: skip
    assert name in text


def test_model_dir_not_writable(small, tmp_path, capsys):
    """A path below a regular file, which not even root can write to."""
    (tmp_path / "file").write_text("")
    text = refusal(capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'file' / 'run'}")
    assert "MODEL_DIR" in text
    assert "cannot be written to" in text
    assert text.endswith("give another folder (--gin.MODEL_DIR)")


def test_batch_size_that_does_not_divide(small, tmp_path, capsys):
    """The value, the rule and the gin name."""
    text = refusal(
        capsys, "train", *small, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.NUM_MICROBATCHES=3"
    )
    assert "batch_size=8 does not divide over 1 data shard x 3 microbatches" in text
    assert "BATCH_SIZE" in text


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(small, tmp_path, capsys):
    """A learning rate that explodes: the step is named, no checkpoint of NaNs is left."""
    folder = tmp_path / "run"
    start = ["train", *small, f"--gin.MODEL_DIR={folder}", "--gin.EVAL_PERIOD=None"]
    assert run(*start, "--gin.TRAIN_STEPS=2") == 0
    text = refusal(
        capsys, *start, "--gin.TRAIN_STEPS=40", "--gin.BASE_LEARNING_RATE=1e38",
        "--gin.WARMUP_STEPS=1", "--gin.CHECKPOINT_PERIOD=1",
    )  # fmt: skip
    assert "is bad: loss nan" in text or "is bad: loss inf" in text
    step = int(text.split("step ")[1].split()[0])
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept
    assert max(kept) < step
    assert f"step {max(kept)} is kept in {folder}" in text
    (line,) = (folder / "bad_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == step


def test_no_gin_file(capsys):
    """A new user's first mistake."""
    assert "--gin_file=gin/cosmo/tiny.gin" in refusal(capsys, "train")
    assert "--gin.MODEL_DIR=DIR" in refusal(capsys, "chat")


def test_a_run_that_is_stopped_early(small, tmp_path, capsys):
    """Nothing is better by a million, so the second evaluation ends the run. Oracle: by hand."""
    folder = f"--gin.MODEL_DIR={tmp_path}"
    early = ("--gin.EARLY_STOPPING_PATIENCE=1", "--gin.EARLY_STOPPING_MIN_DELTA=1e6")
    for _ in range(2):
        command = ["train", *small, folder, *early, "--gin.TRAIN_STEPS=20", "--quiet"]
        assert main(command) == 0
        assert f"done: stopped early at step 8 in {tmp_path}" in capsys.readouterr().out
    assert any_format.locate(f"{tmp_path}/best").step == 4
