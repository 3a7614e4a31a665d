"""`python -m cosmo cache`, and training from what it writes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cosmo.__main__ import main
from cosmo.engine.data import reader
from cosmo.engine.data.cache_reading import MANIFEST, Cache
from cosmo.tasks.families import prosocial_file_examples, soda_file_examples
from tests import warm_process

ROOT = pathlib.Path(__file__).resolve().parents[2]

DIALOGUES = 90  # of each corpus
DRAWN = 0.71  # of examples differ between epochs: see the test of it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of the first dialogues of the sample, as soda/ and prosocial/."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, lines in (("soda", DIALOGUES), ("prosocial", 3 * DIALOGUES)):
        (folder / name).mkdir()
        text = (ROOT / f"tasks/sample/{name}/train.jsonl").read_text().splitlines(keepends=True)
        (folder / name / "train.jsonl").write_text("".join(text[:lines]))
    return folder


@pytest.fixture(scope="module")
def sizes(corpus):
    """Examples of each task, counted without SeqIO."""
    return {
        "soda": sum(1 for _ in soda_file_examples(corpus / "soda", "train")),
        "prosocial_dialog": sum(1 for _ in prosocial_file_examples(corpus / "prosocial", "train")),
    }


@pytest.fixture(scope="module")
def arguments(small, corpus, sizes):
    """Of a cache of two epochs in four shards, but for --output and --processes.

    Rates as the sizes: an epoch has every example once.
    """
    paths = [f"--gin.SODA_PATH={corpus}/soda", f"--gin.PROSOCIAL_PATH={corpus}/prosocial"]
    rates = f"--gin.MIXTURE_RATES={sizes}"
    return ["cache", *small, *paths, rates, "--epochs=2", "--shards_per_epoch=2", "--quiet"]


@pytest.fixture(scope="module")
def cached(arguments, tmp_path_factory):
    """A cache that one process has written."""
    folder = tmp_path_factory.mktemp("cache") / "rows"
    assert main([*arguments, f"--output={folder}", "--processes=1"]) == 0
    return folder


@pytest.fixture(scope="module")
def training(small, sizes, cached):
    """Arguments of training from that cache, without evaluation."""
    source = [f"--gin.CACHE_PATH={cached}", f"--gin.MIXTURE_RATES={sizes}"]
    return ["train", *small, *source, "--gin.EVAL_PERIOD=None", "--quiet"]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def segments(cache, number, side="encoder", tokens="encoder_input_tokens"):
    """[(id, tokens)] of a row's examples."""
    (record,) = cache.records([number])
    batch = cache.format.features(cache.format.decode([record]))
    ids = batch[f"{side}_segment_ids"][0]
    return [
        (name, tuple(batch[tokens][0][ids == i].tolist()))
        for i, name in enumerate(cache.format.names(record), 1)
    ]


def kill_when_under_way(command, folder):
    """Start a command and kill it with SIGKILL when its first shard is finished.

    The file of a shard is put in place after its note.
    """
    process = warm_process.Popen(
        [sys.executable, "-m", "cosmo", *command], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list(folder.glob("rows-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_processes_write_the_same_bytes_as_one(arguments, cached, tmp_path):
    """Oracle: the files of one process."""
    folder = tmp_path / "rows"
    assert main([*arguments, f"--output={folder}", "--processes=2"]) == 0
    assert files(folder) == files(cached)


@pytest.mark.slow
def test_killed_and_gone_on_gives_the_same_bytes(arguments, cached, tmp_path):
    """SIGKILL of the parent of two workers, and the same command with one process.

    Oracle: the files of one process that was not disturbed.
    """
    folder, command = tmp_path / "rows", [*arguments, f"--output={tmp_path / 'rows'}"]
    kill_when_under_way([*command, "--processes=2"], folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*")}
    done = len(kept)
    assert 1 <= done < 4 and not (folder / MANIFEST).exists()
    assert main([*command, "--processes=1"]) == 0
    assert files(folder) == files(cached)
    same = [name for name, when in kept.items() if (folder / name).stat().st_mtime_ns == when]
    assert len(same) >= done


@pytest.mark.slow
def test_killed_again_and_again_gives_the_same_bytes(arguments, cached, tmp_path):
    """Three workers, their parent killed at six moments. Oracle: one process, undisturbed."""
    folder = tmp_path / "rows"
    command = [sys.executable, "-m", "cosmo", *arguments, f"--output={folder}", "--processes=3"]
    for seconds in (4, 9, 14, 17, 20, 23):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert files(folder) == files(cached)


def test_counts_are_the_corpus_s(cached, sizes):
    """Oracle: examples that the readers give, counted without SeqIO."""
    manifest = json.loads((cached / MANIFEST).read_text())
    counted = {name: entry["cached"]["examples"] for name, entry in manifest["tasks"].items()}
    assert counted == {name: 2 * size for name, size in sizes.items()}
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"]


def test_epochs_hold_all_examples_with_other_drops_and_neighbours(cached, sizes):
    """Oracle: each id once an epoch; the share whose inputs differ, by hand: narrative and
    instruction are both as before with (0.7^2 + 0.3^2)(0.5^2 + 0.5^2) = 0.29. Lengths are such that
    long inputs are cut at the front, where a drop may not show."""
    cache = Cache(str(cached))
    epochs = [{}, {}]
    neighbours = [set(), set()]
    for number in range(cache.rows):
        epoch = cache.place(number)[0]["epoch"]
        found = segments(cache, number)
        assert not set(epochs[epoch]) & {name for name, _ in found}
        epochs[epoch].update(found)
        neighbours[epoch].add(tuple(name for name, _ in found))
    assert set(epochs[0]) == set(epochs[1]) and len(epochs[0]) == sum(sizes.values())
    changed = np.mean([epochs[0][name] != epochs[1][name] for name in epochs[0]])
    assert DRAWN - 0.15 < changed < DRAWN + 0.06
    together = [{row for row in rows if len(row) > 1} for rows in neighbours]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])
    # Neighbours of a dialogue do not stand together: the shuffle has come before the packing.
    dialogues = [[name.rsplit("-", 1)[0] for name in row] for row in together[0]]
    assert np.mean([len(set(row)) < len(row) for row in dialogues]) < 0.2


def test_training_loads_no_tensorflow(training, tmp_path):
    """Oracle: the modules of a process that has trained two steps."""
    command = [*training, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=2"]
    code = (
        "import sys\nfrom cosmo.__main__ import main\n"
        f"assert main({command!r}) == 0\n"
        "print(*[m for m in ('tensorflow', 'seqio', 'tensorflow_datasets') if m in sys.modules])"
    )
    done = warm_process.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert (tmp_path / "checkpoints/2").is_dir()
    # Whoever evaluates the run finds its task in config.gin, although training has not called it.
    assert main(["eval", f"--gin.MODEL_DIR={tmp_path}", "--gin.EVAL_NUM_EXAMPLES=2"]) == 0


def test_resumed_run_sees_the_same_batches(training, tmp_path, monkeypatch):
    """Three steps, then three more. Oracle: six in one go: same rows, same losses to the bit."""
    seen = []
    read = reader.train_batches

    def watched(*args, **kwargs):
        seen.append([])
        for batch in read(*args, **kwargs):
            seen[-1].append(batch.rows)
            yield batch

    monkeypatch.setattr(reader, "train_batches", watched)
    losses = {}
    for folder, stops in (("once", (6,)), ("twice", (3, 6))):
        for stop in stops:
            command = [*training, f"--gin.MODEL_DIR={tmp_path / folder}", "--gin.STATS_PERIOD=1"]
            assert main([*command, f"--gin.TRAIN_STEPS={stop}"]) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        losses[folder] = [json.loads(line)["train/loss"] for line in lines]
    once, first, second = seen
    np.testing.assert_array_equal(once[:3], first[:3])
    np.testing.assert_array_equal(once[3:6], second[:3])
    assert len(set(np.concatenate(once[:6]).tolist())) == 6 * 8
    assert len(losses["once"]) == 6 and losses["once"] == losses["twice"]


def test_training_refuses_another_vocabulary_at_once(training, tmp_path, capsys, shared):
    """Oracle: one line with both vocabularies, before anything is compiled."""
    other = shared / "data/t5_cc_all.32000.100extra.model"
    command = [*training, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=2"]
    assert main([*command, f"--gin.VOCABULARY_PATH={other}", "--gin.VOCAB_SIZE=32128"]) == 1
    said = capsys.readouterr().err
    assert "vocabulary mismatch" in said and str(other) in said and said.count("\n") == 1


def test_input_wait_is_measured(training, tmp_path, monkeypatch):
    """A reader that sleeps 0.5 s a batch keeps a fast step waiting. Oracle: most of the time, also
    on a machine where other processes slow the step."""
    read = reader.train_batches

    def slow(*args, **kwargs):
        for batch in read(*args, **kwargs):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(reader, "train_batches", slow)
    command = [*training, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=6"]
    assert main([*command, "--gin.STATS_PERIOD=3"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0.5 < lines[-1]["train/input_wait"] <= 1.0


def test_show_prints_ids_and_text(cached, corpus, capsys):
    """Oracle: the corpus's own text of the first example, found by its id."""
    assert main(["cache", f"--output={cached}", "--show=0,5"]) == 0
    shown = capsys.readouterr().out
    name, _ = segments(Cache(str(cached)), 5)[0]
    read = soda_file_examples if name.startswith("soda") else prosocial_file_examples
    (example,) = [x for x in read(corpus / name.split("-")[0], "train") if x.id == name]
    assert "row 0 (rows-00000-of-00004.arrayrecord, record 0, epoch 0)" in shown
    after = shown[shown.index("row 5") :]
    assert f"1. {name}" in after and f"targets: {example.response}" in after
    assert example.turns[-1] in after
    for rows in ("4000000", "x", "-1"):
        assert main(["cache", f"--output={cached}", f"--show={rows}"]) == 1
        assert "is no row; there are 0 to" in capsys.readouterr().err


def test_t5_separators_are_no_unknown_text(small, tmp_path, shared, capsys):
    """In T5's real vocabulary `<` is unknown, so all separators are: they do not count as text.

    Oracle: the sample's text has no `<`, so it has no unknown pieces; the sample corpus's
    vocabulary over Chinese text has.
    """
    other = shared / "data/t5_cc_all.32000.100extra.model"
    command = ["cache", *small, "--split=validation", "--processes=1", "--quiet"]
    command += ["--gin.MIXTURE_OR_TASK_NAME=soda", "--shards_per_epoch=1"]
    command += [f"--output={tmp_path / 'rows'}"]
    t5 = [f"--gin.VOCABULARY_PATH={other}", "--gin.VOCAB_SIZE=32128"]
    assert main([*command, *t5]) == 0
    tasks = Cache(str(tmp_path / "rows")).manifest["tasks"]
    assert [entry["unknown_share"] for entry in tasks.values()] == [0]
    text = (ROOT / "tasks/sample/soda/validation.jsonl").read_text()
    line = json.loads(text.splitlines()[0])
    line["dialogue"] = ["你好 世界 " * 3 for _ in line["dialogue"]]
    (tmp_path / "validation.jsonl").write_text(json.dumps(line))
    shutil.rmtree(tmp_path / "rows")
    command += [f"--gin.SODA_PATH={tmp_path}"]
    assert main(command) == 1
    assert "of task 'soda' are unknown to the vocabulary" in capsys.readouterr().err
    assert main([*command, "--allow_unknown"]) == 0


def test_errors_of_the_command_line(small, tmp_path, capsys):
    """Oracle: one line that names what is wrong."""
    out = f"--output={tmp_path / 'rows'}"
    (tmp_path / "rows/.work").mkdir(parents=True)  # as a command that was stopped leaves it
    for arguments, said in (
        (["cache", out], "needs --gin_file"),
        (["cache", *small, out, "--epochs=0"], "epochs=0; it must be at least 1 (--epochs)"),
        (["cache", *small, out, "--split=nowhere"], "has a split 'nowhere'"),
        (["cache", *small, out, "--gin.SODA_PATH=/nowhere"], "/nowhere"),
        (["train", *small, f"--gin.MODEL_DIR={tmp_path}/m", "--gin.TRAIN_STEPS=1",
          f"--gin.CACHE_PATH={tmp_path}/rows"], "is not finished"),
    ):  # fmt: skip
        assert main([*arguments, "--quiet"]) == 1
        captured = capsys.readouterr().err
        assert said in captured and captured.count("\n") == 1, captured


@pytest.mark.parametrize(
    "setting", ["NARRATIVE_DROPOUT=0.9", "MIXTURE_OR_TASK_NAME=soda", "SEPARATOR=' | '"]
)
def test_a_cache_of_other_settings_is_refused(arguments, cached, tmp_path, capsys, setting):
    """Training would use other rows than the run says. Oracle: the setting is named."""
    settings = [a for a in arguments if a.startswith("--gin")]
    folder = f"--gin.MODEL_DIR={tmp_path}/run"
    cache = f"--gin.CACHE_PATH={cached}"
    code = main(["train", *settings, folder, cache, "--gin.TRAIN_STEPS=1", f"--gin.{setting}"])
    error = capsys.readouterr().err
    assert code == 1 and f"was written with {setting.split('=')[0]}=" in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_source_that_changed_is_not_taken_for_the_same(small, tmp_path, capsys):
    """The same command, but a file has lost half of its lines. Oracle: both counts are named."""
    for name, lines in (("soda", 8), ("prosocial", 8)):
        (tmp_path / name).mkdir()
        text = (ROOT / f"tasks/sample/{name}/train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "train.jsonl").write_text("".join(text[:lines]))
    paths = [f"--gin.SODA_PATH={tmp_path}/soda", f"--gin.PROSOCIAL_PATH={tmp_path}/prosocial"]
    command = ["cache", *small, *paths, f"--output={tmp_path}/rows", "--processes=1", "--quiet"]
    assert main(command) == 0
    file = tmp_path / "soda/train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    assert main(command) == 1
    assert "the source of task 'soda' has" in capsys.readouterr().err
