"""Postprocessing in processes and by Beam, over what a run has left and over real rows."""

import json
import subprocess
import sys

import pytest

from data_pipeline import __main__ as command
from data_pipeline.co3 import batch, statistics
from data_pipeline.co3.schema import SODA_FIELDS
from tests.data_pipeline.loopback import co3, lines, teacher, write_triples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder: some records have their names not yet replaced, one is there twice, one is
    too long, one line is broken."""
    folder = tmp_path_factory.mktemp("made")
    write_triples(folder / "triples.jsonl", 40)
    with teacher() as (url, _):
        assert co3(folder / "triples.jsonl", folder, url, "--concurrency=8") == 0
    rows, origins = (lines(folder / f"{name}.jsonl") for name in ("soda", "provenance"))
    for origin in origins[:5]:
        origin["renamed"] = False
    rows[6] = {**rows[6], "dialogue": rows[6]["dialogue"] * 3, "speakers": rows[6]["speakers"] * 3}
    rows.append({**rows[2], "original_index": 900})
    origins.append({**origins[2], "original_index": 900, "position": 900, "id": "again"})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"head": 3}\n'
    (folder / "soda.jsonl").write_text(text)
    text = "".join(json.dumps(row) + "\n" for row in origins) + "{}\n"
    (folder / "provenance.jsonl").write_text(text)
    return folder, rows


def test_what_is_clean_stays_and_the_rest_is_said(tmp_path, made):
    """Oracle: the spoilt rows, by hand; processes change nothing; again it changes nothing."""
    folder, rows = made
    for name, processes in (("one", 1), ("two", 2)):
        more = [f"--processes={processes}", "--quiet"]
        arguments = ["postprocess", f"--input={folder}", f"--output={tmp_path / name}", *more]
        assert command.main(arguments) == 0
    for name in ("soda", "provenance", "rejected"):
        one, two = ((tmp_path / d / f"{name}.jsonl").read_bytes() for d in ("one", "two"))
        assert one == two
    kept = lines(tmp_path / "one/soda.jsonl")
    assert len(kept) == len(rows) - 2
    assert kept[5:] == [*rows[5:6], *rows[7:-1]]
    assert all(kept[number] != rows[number] for number in range(5))
    reasons = {row["reason"] for row in lines(tmp_path / "one/rejected.jsonl")}
    assert "duplicate dialogue" in reasons and "broken row" in reasons and len(reasons) == 3
    again = ["postprocess", f"--input={tmp_path / 'one'}", f"--output={tmp_path / 'again'}"]
    assert command.main([*again, "--processes=1", "--quiet"]) == 0
    assert lines(tmp_path / "again/soda.jsonl") == kept
    assert (tmp_path / "again/rejected.jsonl").read_text() == ""


def test_canary_takes_out_what_needs_intervention(tmp_path, made, capsys):
    """Oracle: the labels that were given; a missing file is one line."""
    folder, _ = made
    ids = [row["id"] for row in lines(folder / "provenance.jsonl") if row]
    labels = tmp_path / "labels.jsonl"
    with open(labels, "w") as file:
        for number, name in enumerate(ids):
            label = "__needs_intervention__" if number == 3 else "__casual__"
            file.write(json.dumps({"id": name, "label": label}) + "\n")
    output = tmp_path / "out"
    arguments = ["postprocess", f"--input={folder}", f"--output={output}", "--processes=1"]
    assert command.main([*arguments, f"--canary_labels={labels}", "--quiet"]) == 0
    out = [row for row in lines(output / "rejected.jsonl") if row["stage"] == "canary"]
    assert [row["id"] for row in out] == [ids[3]]
    assert command.main([*arguments, "--canary_labels=/nowhere"]) == 1
    assert "--canary_labels=/nowhere" in capsys.readouterr().err


def test_the_published_rows_pass(tmp_path, shared):
    """The five real rows, as JSON lines and as Parquet. Oracle: they themselves, renamed."""
    source = shared / "data/soda_rows.jsonl"
    arguments = ["postprocess", f"--input={source}", f"--output={tmp_path / 'a'}", "--quiet"]
    assert command.main([*arguments, "--processes=1"]) == 0
    kept, real = lines(tmp_path / "a/soda.jsonl"), lines(source)
    assert len(kept) == 5 and not (tmp_path / "a/rejected.jsonl").read_text()
    for new, old in zip(kept, real, strict=True):
        assert tuple(new) == tuple(old) == SODA_FIELDS
        assert len(new["dialogue"]) == len(old["dialogue"]) and new["PersonX"] != old["PersonX"]
    parquet = tmp_path / "a/soda.parquet"
    arguments = ["postprocess", f"--input={parquet}", f"--output={tmp_path / 'b'}", "--quiet"]
    assert command.main([*arguments, "--processes=1"]) == 0
    assert len(lines(tmp_path / "b/soda.jsonl")) == 5


def test_beam_writes_the_same_lines(tmp_path, made):
    """Oracle: the lines of the plain way, in any order, and its statistics."""
    pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")
    folder, _ = made
    plain = ["postprocess", f"--input={folder}", f"--output={tmp_path / 'plain'}", "--processes=1"]
    assert command.main([*plain, "--quiet"]) == 0
    beamed = tmp_path / "beam"
    arguments = [f"--input={folder}", f"--output={beamed}", "--runner=DirectRunner", "--quiet"]
    subprocess.run([sys.executable, "-m", "data_pipeline", "postprocess", *arguments], check=True)
    plain = tmp_path / "plain"
    for name, dropped in (("soda", []), ("provenance", ["position"])):
        found = [row for path in beamed.glob(f"{name}-*") for row in lines(path)]
        expected = lines(plain / f"{name}.jsonl")
        expected = [{k: v for k, v in row.items() if k not in dropped} for row in expected]
        assert sorted(map(str, found)) == sorted(map(str, expected))
    rejected = [row["reason"] for path in beamed.glob("rejected-*") for row in lines(path)]
    assert sorted(rejected) == sorted(row["reason"] for row in lines(plain / "rejected.jsonl"))
    report = json.loads((plain / "report.json").read_text())
    assert json.loads((beamed / "statistics.json").read_text()) == report["corpus"]


def test_statistics_by_hand():
    """Oracle: sums by hand."""
    row = {
        "dialogue": ["Hi there.", "Hello to you too."],
        "relation": "xWant",
        "split": "train",
        "head_answer": "Yes",
        "relation_tail_answer": "No",
        "narrative": "Ann wants an apple.",
    }
    first, second = statistics.Statistics(), statistics.Statistics()
    first.add(row)
    second.add({**row, "dialogue": ["Hi."] * 4, "relation": "xNeed"})
    table = first.merge(second).table()
    assert table["dialogues"] == 2 and table["turns"] == 3
    assert table["utterance_length"] == round(10 / 6, 2)
    assert table["turns_histogram"] == {"2": 1, "4": 1}
    assert table["relations"]["xWant"]["percent"] == 50.0
    assert table["common_keywords"] == ["apple"]


def test_lexical_diversity_is_that_of_lexical_diversity(shared):
    """Oracle: lexical-diversity 0.1.1 on DailyDialog's validation set, 69.79967674685759 over the
    982 of 1,000 dialogues in which a word occurs twice; 79.36405066532811 over the first 40."""
    numbers = statistics.Statistics()
    row = {"relation": "", "split": "", "head_answer": "", "relation_tail_answer": ""}
    text = (shared / "data/dailydialog_validation.txt").read_text(encoding="utf-8")
    for count, line in enumerate(text.splitlines(), 1):
        said = [turn.strip() for turn in line.split("__eou__") if turn.strip()]
        numbers.add({**row, "narrative": "", "dialogue": said})
        if count == 40:
            assert numbers.diversity / numbers.measured == pytest.approx(79.36405066532811)
    assert (numbers.dialogues, numbers.measured) == (1000, 982)
    assert numbers.diversity / numbers.measured == pytest.approx(69.79967674685759)
    assert numbers.table()["lexical_diversity"] == 69.8


def test_positions_count_over_all_inputs(tmp_path):
    """Oracle: counting; a folder without records is said."""
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    (tmp_path / "b.jsonl").write_text("3\n")
    found = list(batch.pairs([tmp_path]))
    assert [(p, row.strip()) for p, row, _ in found] == [(0, "1"), (1, "2"), (2, "3")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--runner=DirectRunner", "--no_parquet"], "--no_parquet"),
        (["--runner=DirectRunner", "--processes=2"], "--processes"),
        (["--runner=DirectRunner", "--prompts=x.toml"], "--prompts"),
        (["--runner=DirectRunner", "--input", "a", "b"], "--input"),
        (["--", "--direct_num_workers=2"], "--runner"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys, more, said):
    """Oracle: one line that names the flag, and nothing written. Needs no Beam."""
    output = tmp_path / "out"
    assert command.main(["postprocess", "--input=x", f"--output={output}", *more]) == 1
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not output.exists()


def _labelled(path, ids, out):
    """Labels for `ids`; the number `out` needs intervention."""
    labels = ("__needs_intervention__" if n == out else "__casual__" for n in range(len(ids)))
    rows = ({"id": i, "label": label} for i, label in zip(ids, labels, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_labels_of_row_numbers_are_of_the_rows(tmp_path, capsys):
    """What `canary label` writes. Oracle: row 2 and only it goes, however often the command is
    given; a file that fits nothing leaves the finished corpus byte for byte."""
    write_triples(tmp_path / "triples.jsonl", 14)
    folder, labels = tmp_path / "soda", tmp_path / "labels.jsonl"
    with teacher() as (url, _):
        run = (tmp_path / "triples.jsonl", folder, url)
        labels.write_text('{"id": "0", "label": "__casual__"}\n')
        assert co3(*run, f"--canary_labels={labels}") == 1
        assert "without it" in capsys.readouterr().err
        assert co3(*run) == 0
        rows = lines(folder / "soda.jsonl")
        before = (folder / "soda.jsonl").read_bytes()
        wrong = ["x", "y"], [str(n) for n in range(len(rows) - 1)], ["0"]
        clean = ["postprocess", f"--input={folder}", f"--output={tmp_path / 'b'}", "--processes=1"]
        clean += ["--quiet", f"--canary_labels={labels}"]
        for ids in wrong:
            _labelled(labels, ids, 0)
            assert co3(*run, f"--canary_labels={labels}") == 1
            assert command.main(clean) == 1
            assert "canary_labels" in capsys.readouterr().err
            assert (folder / "soda.jsonl").read_bytes() == before and not (tmp_path / "b").exists()
        _labelled(labels, [str(n) for n in range(len(rows))], 2)
        assert command.main(clean) == 0
        for _ in range(2):
            assert co3(*run, f"--canary_labels={labels}") == 0
            assert lines(folder / "soda.jsonl") == rows[:2] + rows[3:]
    assert lines(tmp_path / "b/soda.jsonl") == rows[:2] + rows[3:]
    assert not list((tmp_path / "b").glob(".*"))
