"""`python -m tools.emotions` and `tools.soda_stats`. Oracles: files written and counted by hand."""

import json

import pytest

from cosmo.tasks.paper_tables import PROSOCIAL, SODA
from data_pipeline import __main__ as pipeline
from data_pipeline.annotation import answers, report
from data_pipeline.annotation.task_files import read_task
from tests.data_pipeline.annotation_samples import answer
from tools import emotions, soda_stats


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_are_goemotions():
    """Oracle: 12 positive, 11 negative and 4 ambiguous emotions; the paper's 26 are among them."""
    assert {name: len(found) for name, found in emotions.GROUPS.items()} == {
        "positive": 12,
        "ambiguous": 4,
        "negative": 11,
    }
    assert set(emotions.EMOTIONS) - set(SODA["emotions"]) == {"grief"}
    for name, shares in PROSOCIAL["polarity"].items():
        assert name == "columns" or sum(shares) == pytest.approx(100, abs=0.2)


def test_tables_and_plot(tmp_path, capsys):
    """Oracle: 1 joy, 2 anger and 1 surprise of 5, one of them neutral: shares of four."""
    labels = ["joy", "anger", "anger", "surprise", "neutral"]
    path = write(tmp_path / "mine.jsonl", [{"id": n, "label": x} for n, x in enumerate(labels)])
    png = tmp_path / "figure.png"
    pytest.importorskip("matplotlib")
    assert emotions.main(["--labels", str(path), f"--plot={png}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["anger", "50.00", "0.97", "1.68", "1.75"] in rows
    assert ["grief", "0.00", "-", "-", "-"] in rows
    assert ["mine", "25.0", "25.0", "50.0"] in rows
    assert ["paper:", "ProsocialDialog", "26.5", "22.9", "50.5"] in rows
    assert png.read_bytes().startswith(b"\x89PNG")
    for wrong, says in (
        ([{"id": 1, "label": "happy"}], "unknown value"),
        ([{"id": 1, "label": "joy"}] * 2, "an id twice"),
        ([], "no labels"),
    ):
        write(path, wrong)
        assert emotions.main(["--labels", str(path)]) == 1
        assert says in capsys.readouterr().err
    assert emotions.main(["--labels", str(path), str(tmp_path / "x/mine.jsonl")]) == 1
    assert emotions.main([]) == 1
    assert "give --corpus" in capsys.readouterr().err


def test_utterances(tmp_path, capsys):
    """Oracle: by hand: xReact of SODA, empathetic dialogues of BST, DailyDialog's emotions."""
    out = tmp_path / "out.jsonl"
    soda = {"narrative": "n", "speakers": ["A", "B"]}
    rows = [
        {**soda, "dialogue": ["a", "b"], "relation": "xReact"},
        {**soda, "dialogue": ["c", "d"], "relation": "xNeed"},
    ]
    corpus = write(tmp_path / "soda.jsonl", rows)
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}", "--emotional"]) == 0
    assert [one["text"] for one in lines_of(out)] == ["a", "b"]
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}", "--items=3"]) == 0
    three = lines_of(out)
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}"]) == 0
    assert len(three) == 3 and all(one in lines_of(out) for one in three)
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}", "--items=5"]) == 1
    bst = {"free_turker_utterance": "e", "guided_turker_utterance": "f", "dialog": [[0, "g"]]}
    kinds = ("empathetic_dialogues", "convai2")
    corpus = write(tmp_path / "bst.jsonl", [{**bst, "context_dataset": kind} for kind in kinds])
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}", "--emotional"]) == 0
    assert [one["text"] for one in lines_of(out)] == ["e", "f", "g"]
    daily = tmp_path / "daily"
    daily.mkdir()
    (daily / "dialogues_text.txt").write_text("h __eou__ i __eou__\n")
    (daily / "dialogues_emotion.txt").write_text("0 4\n")
    assert emotions.main([f"--corpus={daily}", f"--utterances={out}", "--emotional"]) == 0
    assert lines_of(out) == [{"id": "0", "text": "i"}]
    capsys.readouterr()
    corpus = write(tmp_path / "turns.jsonl", [{"turns": ["a"]}])
    assert emotions.main([f"--corpus={corpus}", f"--utterances={out}", "--emotional"]) == 1
    assert "no corpus of table 4" in capsys.readouterr().err


SODA_ROW = {
    "head": "PersonX wins the race", "relation": "xReact", "tail": "happy",
    "literal": "Ann wins the race. Now Ann feels happy.", "narrative": "Ann won.",
    "dialogue": ["I won!", "Great!"], "speakers": ["Ann", "Bo"], "PersonX": "Ann", "PersonY": "",
    "PersonZ": "", "head_answer": "Yes", "pmi_head_answer": "No", "relation_tail_answer": "Yes",
    "pmi_relation_tail_answer": "Yes",
}  # fmt: skip


def test_triples_of_soda(tmp_path, capsys):
    """Oracle: counted by hand over three rows."""
    rows = [
        SODA_ROW,
        {**SODA_ROW, "tail": "Happy", "relation_tail_answer": "Unknown"},
        {**SODA_ROW, "relation": "xWant", "tail": "to rest", "head_answer": "No"},
    ]
    path = write(tmp_path / "soda.jsonl", rows)
    assert soda_stats.main([str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["reactions"] == {"dialogues": 2, "tails": 1, "common": {"happy": 2}}
    assert made["held"] == {
        "triple": 1, "head": 2, "relation_tail": 2,
        "triple/pmi": 0, "head/pmi": 0, "relation_tail/pmi": 3,
    }  # fmt: skip
    assert soda_stats.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1,003,595" in printed and "33.3" in printed
    write(path, [{**SODA_ROW, "head_answer": None}])
    assert soda_stats.main([str(path)]) == 1
    assert "field 'head_answer' is no text" in capsys.readouterr().err
    path.write_text("")
    assert soda_stats.main([str(path)]) == 1
    assert "no row of SODA" in capsys.readouterr().err


def test_table_10_of_items_of_soda(tmp_path):
    """Oracle: people say Yes to every question of two items: recall by hand."""
    path = write(tmp_path / "soda.jsonl", [SODA_ROW, {**SODA_ROW, "head_answer": "Unknown"}])
    items, task = tmp_path / "items.jsonl", tmp_path / "task.jsonl"
    assert soda_stats.main([str(path), f"--commonsense_items={items}", "--items=2"]) == 0
    assert lines_of(items)[0]["texts"] == {
        "head": "Ann wins the race, is this true?",
        "relation_tail": "Does Ann feel happy after Ann wins the race?",
    }
    command = ["annotate", "make", "--page=commonsense", f"--input={items}", f"--output={task}"]
    assert pipeline.main([*command, "--quiet"]) == 0
    made = read_task(task)
    given = [
        answer(made, item.id, f"j{n}", {"head": "yes", "relation_tail": "yes"})
        for item in made.items
        for n in range(3)
    ]
    found = report.build(made, answers.Answers(tuple(given)), 0)["people"]["predicted"]
    recalls = {way: one["labels"]["yes"]["recall"] for way, one in found.items()}
    assert recalls == {"head": 0.5, "head/pmi": 0.0, "relation_tail": 1.0, "relation_tail/pmi": 1.0}
    assert soda_stats.main([str(path), f"--commonsense_items={items}", "--items=3"]) == 1
