"""Postprocessing in processes and by Beam, over what a run has left and over real rows."""

import json

import pytest

from data_pipeline import __main__ as command
from data_pipeline.co3 import clean, postprocess, statistics
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


def test_what_is_clean_stays_and_the_rest_is_said(tmp_path, made, monkeypatch):
    """Oracle: the spoilt rows, by hand; processes change nothing; again it changes nothing."""
    folder, rows = made
    monkeypatch.setattr(clean, "ROWS_PER_CHUNK", 7)  # so that both processes have work
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
    error = capsys.readouterr().err
    assert "/nowhere: " in error and "--canary_labels" in error


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


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_beam_leaves_the_same_bytes(tmp_path, made, shared, monkeypatch):
    """On the DirectRunner. Oracle: each file that processes leave, over two inputs and labels."""
    pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")
    from data_pipeline.co3 import beam

    monkeypatch.setattr(beam, "ROWS_PER_CHUNK", 7)  # duplicates lie in different chunks
    folder, _ = made
    ids = [row["id"] for row in lines(folder / "provenance.jsonl") if row]
    ids += [str(row["original_index"]) for row in lines(shared / "data/soda_rows.jsonl")]
    _labelled(tmp_path / "labels.jsonl", ids, 3)
    more = ["--input", str(folder), str(shared / "data/soda_rows.jsonl"), "--seed=3", "--quiet"]
    more.append(f"--canary_labels={tmp_path / 'labels.jsonl'}")
    for name, executor in (("plain", "--processes=1"), ("beam", "--runner=DirectRunner")):
        output = f"--output={tmp_path / name}"
        assert command.main(["postprocess", *more, executor, output]) == 0
    plain = _files(tmp_path / "plain")
    plain.pop("report.png", None), (tmp_path / "beam/report.png").unlink(missing_ok=True)
    assert _files(tmp_path / "beam") == plain and "report.json" in plain
    reasons = {row["reason"] for row in lines(tmp_path / "beam/rejected.jsonl")}
    assert {"broken row", "duplicate dialogue", "Canary: needs intervention"} <= reasons


def test_beam_keeps_the_first_duplicate_of_many_chunks(tmp_path, shared, monkeypatch):
    """Oracle: the lines of one process, over 49 rows of which many are duplicates or broken."""
    pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")
    from data_pipeline.co3 import beam

    monkeypatch.setattr(beam, "ROWS_PER_CHUNK", 5)
    rows = lines(shared / "data/soda_rows.jsonl")
    source = tmp_path / "rows.jsonl"
    with open(source, "w") as file:
        for number in range(45):
            row = rows[number % 5] | {"original_index": 1000 - number}
            row["dialogue"] = [*row["dialogue"][:-1], f"It is day {number // 15}."]
            file.write(json.dumps(row if number % 7 else rows[0] | {"dialogue": ["Hi."]}) + "\n")
        file.write('{broken\n\n{"original_index": 3}\n\xff\n')
    for name, executor in (("plain", "--processes=1"), ("beam", "--runner=DirectRunner")):
        arguments = [f"--input={source}", f"--output={tmp_path / name}", executor, "--quiet"]
        assert command.main(["postprocess", *arguments, "--no_parquet"]) == 0
    for name in ("soda", "provenance", "rejected"):
        one, two = ((tmp_path / d / f"{name}.jsonl").read_bytes() for d in ("plain", "beam"))
        assert one == two
    gone = [row["reason"] for row in lines(tmp_path / "plain/rejected.jsonl")]
    assert gone.count("duplicate dialogue") > 10 and len(lines(tmp_path / "plain/soda.jsonl")) > 10
    assert sorted(set(gone)) == ["broken row", "duplicate dialogue"]


@pytest.mark.parametrize("executor", ["--processes=1", "--runner=DirectRunner"])
def test_no_record_that_can_be_used_is_an_error(tmp_path, capsys, executor):
    """Oracle: one line, exit code 1, and the corpus of before."""
    if "runner" in executor:
        pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")
    (tmp_path / "rows.jsonl").write_text("{}\n{broken\n")
    (tmp_path / "soda.jsonl").write_text("before")
    arguments = [f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path}", executor]
    assert command.main(["postprocess", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert "2 are broken" in error and "--input" in error and "\n" not in error
    assert (tmp_path / "soda.jsonl").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "soda.jsonl"}


def test_rows_that_share_an_index_keep_their_own_provenance(tmp_path, shared):
    """Two corpora put together. Oracle: rows and provenance are joined line by line."""
    row = lines(shared / "data/soda_rows.jsonl")[0]
    other = row | {"dialogue": [*row["dialogue"][:-1], "It is late."]}
    text = "".join(json.dumps(r) + "\n" for r in (row, other))
    (tmp_path / "soda.jsonl").write_text(text)
    (tmp_path / "provenance.jsonl").write_text('{"id": "one"}\n{"id": "other"}\n')
    arguments = [f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--processes=1"]
    assert command.main(["postprocess", *arguments, "--quiet"]) == 0
    assert [r["id"] for r in lines(tmp_path / "out/provenance.jsonl")] == ["one", "other"]
    assert lines(tmp_path / "out/soda.jsonl")[1]["dialogue"][-1] == "It is late."


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


@pytest.mark.parametrize("size", [1, 2, 200])
def test_positions_count_over_all_inputs(tmp_path, size):
    """Oracle: counting, for any size of the chunks; empty lines are no rows."""
    (tmp_path / "a.jsonl").write_text("1\n\n2\n")
    (tmp_path / "b.jsonl").write_text("3")
    rows = [(0, b"1"), (1, b"2"), (2, b"3")]
    for path in (tmp_path, tmp_path / "*.jsonl"):
        found = [item for chunk in postprocess.chunks([path], size) for item in chunk.read()]
        assert [(position, row) for position, row, _ in found] == rows


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--runner=DirectRunner", "--processes=2"], "--processes"),
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
        again = ["postprocess", f"--input={folder}", f"--output={tmp_path / 'b'}", "--processes=1"]
        again += ["--quiet", f"--canary_labels={labels}"]
        for ids in wrong:
            _labelled(labels, ids, 0)
            assert co3(*run, f"--canary_labels={labels}") == 1
            assert command.main(again) == 1
            assert "canary_labels" in capsys.readouterr().err
            assert (folder / "soda.jsonl").read_bytes() == before and not (tmp_path / "b").exists()
        _labelled(labels, [str(n) for n in range(len(rows))], 2)
        assert command.main(again) == 0
        for _ in range(2):
            assert co3(*run, f"--canary_labels={labels}") == 0
            assert lines(folder / "soda.jsonl") == rows[:2] + rows[3:]
    assert lines(tmp_path / "b/soda.jsonl") == rows[:2] + rows[3:]
    assert not list((tmp_path / "b").glob(".*"))
