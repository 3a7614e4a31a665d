"""CO3's demo: its triples, its split, its verdict; and all of it, small, as a slow proof."""

import collections
import json
import math
import subprocess
import sys

import pytest

from cosmo.tasks.formatting import Example
from data_pipeline.co3 import triples
from tools import co3_demo


def test_the_bundled_triples():
    """Oracle: counting. 300 that can be used, of all six relations, and some to be dropped."""
    found = list(triples.read(co3_demo.TRIPLES))
    usable = [row for row in found if isinstance(row, triples.Triple)]
    first = usable[:300]
    assert len(first) == 300
    assert {row.relation for row in first} == set(triples.SODA_RATIOS)
    assert {row.split for row in first} >= {"train", "valid"}
    reasons = collections.Counter(row.reason for row in found if row not in usable)
    assert set(reasons) == {
        "relation not used",
        "blank",
        "none",
        "no PersonX in head",
        "duplicate",
    }


def test_split_by_what_each_record_names():
    """Oracle: by hand; order is kept, nothing is lost."""
    lines = [json.dumps({"n": n, "split": s}) for n, s in enumerate(["train", "valid", "train"])]
    assert co3_demo.by_split(lines) == {"train": [lines[0], lines[2]], "valid": [lines[1]]}
    assert co3_demo.by_split([]) == {}


def test_share_of_the_usable_triples():
    """Oracle: by hand. 10 of 100 cannot be used, 45 of the other 90 are records."""
    rejected = {"triples": {"none": 6, "blank": 2}, "sentence": {"x": 2}, "human": {"y": 45}}
    made = {"triples": 100, "records": 45, "rejected": rejected}
    assert co3_demo.kept_share(made) == 0.5


def test_the_question_is_in_the_middle():
    """Oracle: by hand: the first with two turns, else the first."""
    one, two, three = (Example(str(n), "", "", ("a",) * n, "b") for n in (1, 2, 3))
    assert co3_demo.question([one, three, two]) is two
    assert co3_demo.question([three, one]) is three


def left(folder, records: int, perplexity: float):
    """What a demo leaves in `folder`, of 10 triples."""
    for name in ("corpus", "soda", "model"):
        (folder / name).mkdir()
    row = {"narrative": "Ann waits.", "dialogue": ["Hi.", "Hello there."], "speakers": ["A", "B"]}
    for split in ("train", "valid"):
        (folder / f"soda/{split}.jsonl").write_text(json.dumps(row) + "\n")
    made = {"triples": 10, "conversations": 10, "records": records, "rejected": {}}
    made |= {"corpus": {"turns": 2, "utterance_length": 2}, "this_start": {"calls": 9}}
    (folder / "corpus/report.json").write_text(json.dumps(made))
    rows = [
        {"step": 0, "eval/all/loss": 8.0, "eval/all/perplexity": 3000.0},
        {"step": 5, "train/loss": 4.0},
        {"step": 9, "eval/all/loss": math.log(perplexity), "eval/all/perplexity": perplexity},
    ]
    (folder / "model/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"inputs": "Ann. <sep> Hi.", "targets": "Hello there.", "prediction": "Hey."}
    (folder / "answer.jsonl").write_text(json.dumps(answer))


@pytest.mark.parametrize(
    ("records", "perplexity", "fault"),
    [(9, 5.0, None), (4, 5.0, "40% of the usable triples"), (9, 1000.0, "did not learn")],
    ids=["good", "too few records", "perplexity too high"],
)
def test_the_verdict(tmp_path, capsys, records, perplexity, fault):
    """Property: it fails loudly, and says of what, unless records and perplexity are good."""
    pytest.importorskip("matplotlib")
    left(tmp_path, records, perplexity)
    assert co3_demo.report(tmp_path, {"corpus": 1.0}) is (fault is None)
    captured = capsys.readouterr()
    assert (fault or "") in captured.err and ("FAILED" in captured.err) is (fault is not None)
    assert "model:     Hey." in captured.out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    """Nothing but an earlier demo is ever emptied."""
    (tmp_path / "precious").write_text("x")
    assert co3_demo.main([f"--output={tmp_path}"]) == 1
    assert (tmp_path / "precious").exists()
    assert "is no folder of a co3 demo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    """Few triples and steps, twice. Oracle: the report; so few steps are not enough to learn."""
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "tools.co3_demo", f"--output={folder}"]
    for steps in (3, 2):
        done = subprocess.run(
            [*command, "--limit=60", f"--train_steps={steps}"], capture_output=True, text=True
        )
        assert done.returncode == 1 and "did not learn" in done.stderr, done.stderr
        assert "usable triples became" not in done.stderr and "Broken pipe" not in done.stderr
        assert "reference:" in done.stdout and f"validation, {steps} steps" in done.stdout
    assert "removing the earlier demo" in done.stdout
    rows = (folder / "corpus/soda.jsonl").read_text().splitlines()
    split = [line for path in (folder / "soda").iterdir() for line in path.open()]
    assert sorted(rows) == sorted(line.rstrip("\n") for line in split)
