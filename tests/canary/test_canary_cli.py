"""`python -m canary`: labels for files, one question, and the errors of both."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from canary.__main__ import main
from cosmo.tasks import safety
from tests import warm_process

WORDS = [
    "kids",
    "bus",
    "late",
    "scare",
    "help",
    "day",
    "friend",
    "work",
    "why",
    "never",
    "money",
    "home",
    "you",
]


def write_input(path, count, bad=()):
    """Dialogues of one to five turns, every third of them the beginning of another."""
    chance = random.Random(0)
    with path.open("w") as file:
        turns: list[str] = []
        for number in range(count):
            if number % 3 == 2:
                turns = turns[: max(1, len(turns) - 1)]
            else:
                turns = [
                    " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))
                    for _ in range(chance.randint(1, 5))
                ]
            shown = [*turns, ""] if number in bad else turns
            file.write(json.dumps({"turns": shown}) + "\n")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def label(run):
    """`label(source, output, *flags)` runs the command in this process; the exit code."""

    def run_it(source, output, *flags):
        command = ["label", f"--checkpoint={run}", f"--input={source}", f"--output={output}"]
        return main([*command, "--batch_size=4", "--quiet", *flags])

    return run_it


def test_lines_are_the_modules_chirps_in_order(label, canary, tmp_path, capsys):
    """Oracle: `Canary.chirp`. What cannot be used is set aside with its line and reason."""
    source, output = write_input(tmp_path / "in.jsonl", 20, bad=(3, 11)), tmp_path / "out.jsonl"
    assert label(source, output) == 0
    found = lines_of(output)
    assert [line["id"] for line in found] == [str(i) for i in range(20) if i not in (3, 11)]
    dialogues = [r["turns"] for i, r in enumerate(lines_of(source)) if i not in (3, 11)]
    for line, turns, chirp in zip(found, dialogues, canary.chirp(dialogues), strict=True):
        assert (line["label"], line["text"]) == (chirp.label, chirp.text)
        assert (tuple(line["rots"]), line["needs_human"]) == (chirp.rots, chirp.needs_human)
        assert line["num_turns"] == len(turns)
        assert list(line["probabilities"]) == list(safety.LABELS)
        wanted = list(chirp.probabilities.values())
        np.testing.assert_allclose(list(line["probabilities"].values()), wanted, atol=1e-5)
    rejects = lines_of(tmp_path / "out.jsonl.rejected.jsonl")
    assert [(r["line"], "is empty" in r["reason"]) for r in rejects] == [(4, True), (12, True)]
    assert "18 records answered, 2 rejected; now 18 in" in capsys.readouterr().out
    # Given again it has nothing to do, and with other settings it refuses.
    assert label(source, output) == 0
    assert "complete: 18 records" in capsys.readouterr().out
    assert label(source, output, "--no_rots") == 1
    assert "rots" in capsys.readouterr().err


def test_dialogues_of_the_same_id_are_told_once(label, tmp_path, caplog):
    """Oracle: two windows of three dialogues, in each of which two share an id: one warning."""
    source = tmp_path / "in.jsonl"
    records = ({"id": name, "turns": ["Hi."]} for name in "aabccd")
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level("WARNING", logger="canary"):
        assert label(source, tmp_path / "out.jsonl", "--no_rots", "--window=3") == 0
    said = [record.message for record in caplog.records if record.name == "canary"]
    assert len(said) == 1 and said[0].startswith("1 of 3 dialogues read together have the id")


def test_shards_and_windows_change_nothing(label, tmp_path):
    """Oracle: the one-file run. Shards given one at a time, in another order."""
    source = write_input(tmp_path / "in.jsonl", 20, bad=(3,))
    assert label(source, tmp_path / "out.jsonl", "--no_rots") == 0
    for shard in (1, 0):
        cut = ["--num_shards=2", f"--shards={shard}", "--window=3", "--no_rots"]
        assert label(source, tmp_path / "parts", *cut) == 0
    parts = [tmp_path / f"parts/predictions-0000{i}-of-00002.jsonl" for i in (0, 1)]
    found = [line for part in parts for line in lines_of(part)]
    assert [x["id"] for x in found] == [x["id"] for x in lines_of(tmp_path / "out.jsonl")]
    assert [x["label"] for x in found] == [x["label"] for x in lines_of(tmp_path / "out.jsonl")]
    assert set(found[0]) == {"id", "label", "probabilities", "needs_human", "num_turns"}
    assert len(lines_of(tmp_path / "parts/rejected.jsonl")) == 1


def test_per_turn_lines_hold_every_beginning(label, canary, tmp_path):
    """Oracle: `label` of the beginnings, each a record of its own."""
    source = write_input(tmp_path / "in.jsonl", 6)
    assert label(source, tmp_path / "turns.jsonl", "--per_turn") == 0
    records = [r["turns"] for r in lines_of(source)]
    every = tmp_path / "every.jsonl"
    beginnings = [{"turns": turns[: k + 1]} for turns in records for k in range(len(turns))]
    every.write_text("".join(json.dumps(b) + "\n" for b in beginnings))
    assert label(every, tmp_path / "one.jsonl") == 0
    one = iter(lines_of(tmp_path / "one.jsonl"))
    for line, turns in zip(lines_of(tmp_path / "turns.jsonl"), records, strict=True):
        assert line["num_turns"] == len(line["turns"]) == len(turns)
        for found in line["turns"]:
            wanted = next(one)
            probabilities = found.pop("probabilities")
            assert found.items() <= wanted.items()
            np.testing.assert_allclose(
                list(probabilities.values()), list(wanted["probabilities"].values()), atol=1e-5
            )


def test_prosocial_rows_give_a_line_each(label, tmp_path, shared):
    """Oracle: the real rows' numbers. A file of dialogues is labelled row by row."""
    source = shared / "data/prosocial_rows.jsonl"
    assert label(source, tmp_path / "out.jsonl") == 0
    wanted = [f"{r['dialogue_id']}-{r['response_id']}" for r in lines_of(source)]
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == wanted
    assert [line["num_turns"] for line in found] == [
        2 * r["response_id"] + 1 for r in lines_of(source)
    ]


def start(run, source, output):
    command = [sys.executable, "-m", "canary", "label", f"--checkpoint={run}", "--batch_size=4"]
    return warm_process.Popen(
        [*command, f"--input={source}", f"--output={output}", "--window=4", "--per_turn"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_commands_share_one_output(run, label, tmp_path):
    """Oracle: what one command writes, byte for byte. Either ends well, or with one line."""
    source = write_input(tmp_path / "in.jsonl", 60, bad=(7, 50))
    output = tmp_path / "out.jsonl"
    both = [start(run, source, output) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert {process.returncode for process in both} <= {0, 1}
    assert any(process.returncode == 0 for process in both), said
    assert not any("Traceback" in text for text in said), said
    assert label(source, tmp_path / "whole.jsonl", "--window=4", "--per_turn") == 0
    for name in ("{}.jsonl", "{}.jsonl.rejected.jsonl"):
        found, wanted = (tmp_path / name.format(stem) for stem in ("out", "whole"))
        assert found.read_bytes() == wanted.read_bytes()


def test_killed_and_given_again(run, label, tmp_path):
    """Oracle: an uninterrupted run, byte for byte. SIGKILL once some windows are done."""
    source = write_input(tmp_path / "in.jsonl", 60, bad=(7, 50))
    output, parts = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.work"
    process = start(run, source, output)
    while process.poll() is None and len(list(parts.glob("part-*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert len(kept) >= 3
    assert label(source, output, "--window=4", "--per_turn") == 0
    assert label(source, tmp_path / "whole.jsonl", "--window=4", "--per_turn") == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for name in ("out.jsonl", "whole.jsonl"):
        assert len(lines_of(tmp_path / f"{name}.rejected.jsonl")) == 2


def test_ask_prints_label_probabilities_and_rots(run, canary, capsys):
    """Oracle: `Canary.chirp`; turns may be one text or several."""
    turns = ["I want to scare my kids.", "Why?", "They never help."]
    chirp = canary.chirp(turns)
    for given in (turns, ["\n".join(turns)]):
        assert main(["ask", f"--checkpoint={run}", "--quiet", *given]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split()[0] == chirp.label
        assert [line.split()[1] for line in printed[1:6]] == list(safety.LABELS)
        assert printed[6:] == [f"- {rot}" for rot in chirp.rots]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sing"], "invalid choice"),
        (["label", "--checkpoint=c", "--input=i"], "required: --output"),
        (["label", "--checkpoint=c", "--input=i", "--output=o", "--per-turn"], "mean --per_turn?"),
        (["ask", "--checkpoint=c", "Hi.", "--window=3"], "it belongs to label"),
    ],
)
def test_mistyped_commands_are_one_line(capsys, arguments, expected):
    """What is wrong, and where to read on; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert "--help" in error


@pytest.mark.parametrize("verb", [[], ["label"], ["ask"], ["eval"]])
def test_help_is_readable_and_loads_no_jax(verb):
    """Property: every flag is explained, in lines of a terminal, at once."""
    program = (
        "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
        f"from canary.__main__ import main\nmain({[*verb, '--help']!r})"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert shown.startswith("usage: python -m canary")
    if verb:
        assert "examples:\n  python -m canary" in shown
        assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"input": "/nowhere.jsonl"},
            "/nowhere.jsonl cannot be read: No such file or directory (--input)",
        ),
        ({"checkpoint": "/nowhere"}, "/nowhere: it does not exist"),
        ({"checkpoint": ""}, "its path is empty (--checkpoint)"),
        ({"checkpoint": "empty"}, "give another folder (--checkpoint)"),
        ({"num_shards": "2"}, "give a folder"),
        ({"output": "/tmp/x.csv"}, "/tmp/x.csv: .csv files are not written; give FILE"),
        ({"output": "/tmp/x.jsonl.gz"}, "/tmp/x.jsonl.gz: .gz files are not written"),
        ({"window": "0"}, "window=0; it must be at least 1 record (--window)"),
        ({"temperature": "-1"}, "it must be 0 (greedy) or above, and finite (--temperature)"),
        ({"vocabulary": "/nowhere.model"}, "Correct the path. (--vocabulary)"),
        ({"turn_separator": "|"}, "one token (--turn_separator)"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, changes, expected):
    """Property: exit code 1 and a line that names the value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    flags = {
        "checkpoint": run,
        "input": write_input(tmp_path / "in.jsonl", 2),
        "output": tmp_path / "out.jsonl",
        **changes,
    }
    assert main(["label", "--quiet", *(f"--{k}={v}" for k, v in flags.items())]) == 1
    error = capsys.readouterr().err.splitlines()
    assert expected in error[-1]
    assert error[-1].startswith("error: ")


def test_flags_of_generation_are_fields_of_decoding(label, canary, tmp_path):
    """Oracle: `Canary.chirp` with the fields."""
    source, output = write_input(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    fields = {"beam_size": 2, "min_length": 3, "block_ngram": 2, "context_block_ngram": 3}
    flags = [f"--{name}={value}" for name, value in fields.items()]
    assert label(source, output, *flags, "--beam_search=parlai", "--banned_ids=5,9") == 0
    dialogues = [record["turns"] for record in lines_of(source)]
    expected = canary.chirp(dialogues, search="parlai", banned_ids=(5, 9), **fields)
    assert [line["text"] for line in lines_of(output)] == [chirp.text for chirp in expected]
    assert any(chirp.rots for chirp in expected)


def test_a_file_of_nothing_but_bad_records_says_so(label, tmp_path, capsys):
    """Exit code 1, and where the reasons are."""
    source = write_input(tmp_path / "in.jsonl", 3, bad=(0, 1, 2))
    assert label(source, tmp_path / "out.jsonl") == 1
    assert "the reasons are in" in capsys.readouterr().err
