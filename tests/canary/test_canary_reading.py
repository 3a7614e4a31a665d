"""Files of dialogues: which corpus one is of, and what can and cannot be used of it."""

import gzip
import io
import json

import pytest

from canary import pieces, reading
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import record_sources

SODA = {"narrative": "n", "dialogue": ["Hi.", "Hello."], "speakers": ["A", "B"]}
DAILY = "Hi . __eou__ Hello , you . __eou__"


def row(dialogue, place, text="text", **changes):
    return {
        "context": f"{text} {place}",
        "response": f"answer {place}",
        "rots": ["It's wrong."],
        "safety_label": "__needs_caution__",
        "dialogue_id": dialogue,
        "response_id": place,
        "episode_done": False,
        **changes,
    }


def read(path, whole=False, spans=None):
    """(dialogues, rejects) of all of a file, or of some spans."""
    source = reading.source(str(path), whole=whole)
    spans = spans or [(0, source.count)]
    items = [i for some in source.read([record_sources.Span(0, *s) for s in spans]) for i in some]
    rejects = [item for item in items if isinstance(item, record_sources.Rejected)]
    return [item for item in items if not isinstance(item, record_sources.Rejected)], rejects


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_every_format_is_known_by_its_records(tmp_path):
    """Oracle: by hand, the same two utterances in every format."""
    one = {"text": "Hi.", "labels": ["Hello."], "rots": None, "safety_label": "__casual__"}
    files = {
        "soda": write(tmp_path / "a", "", SODA),
        "turns": write(tmp_path / "b", {"turns": ["Hi.", "Hello."]}),
        "dailydialog": write(tmp_path / "c", "Hi. __eou__ Hello. __eou__"),
        "prosocial": write(tmp_path / "d", row(0, 0, context="Hi.", response="Hello.")),
        "prosocial_download": write(tmp_path / "e", json.dumps([[one]], indent=1)),
    }
    for name, path in files.items():
        assert reading.recognise(str(path)).name == name
        (dialogue,), rejects = read(path, whole=True)
        assert (dialogue.turns, rejects) == (("Hi.", "Hello."), [])
    packed = tmp_path / "c.gz"
    packed.write_bytes(gzip.compress(files["dailydialog"].read_bytes()))
    assert read(packed) == read(files["dailydialog"])


def test_prosocial_rows_are_the_dialogue_so_far(tmp_path):
    """Oracle: by hand. Numbers that begin again, or another number, begin another dialogue."""
    path = write(tmp_path / "in", row(0, 0), row(0, 1), "", row(0, 0, "x"), row(1, 0))
    dialogues, rejects = read(path)
    assert [(d.id, d.turns) for d in dialogues] == [
        ("0-0", ("text 0",)),
        ("0-1", ("text 0", "answer 0", "text 1")),
        ("0-0", ("x 0",)),
        ("1-0", ("text 0",)),
    ]
    assert rejects == []
    whole, _ = read(path, whole=True)
    assert whole[0].turns == ("text 0", "answer 0", "text 1", "answer 1")


def test_rows_whose_dialogue_lacks_a_beginning_are_rejected(tmp_path):
    """Oracle: by hand. A hole or a broken row costs the rows after it, none before."""
    path = write(
        tmp_path / "in",
        row(0, 1),
        row(1, 0),
        row(1, 2),
        row(1, 3),
        row(2, 0),
        row(2, 1, context=" "),
        row(2, 2),
        "{broken",
        row(3, 0, rots=None),
    )
    dialogues, rejects = read(path)
    assert [d.id for d in dialogues] == ["1-0", "2-0", "3-0"]
    assert [reject.line for reject in rejects] == [1, 3, 4, 6, 7, 8]
    reasons = [reject.reason for reject in rejects]
    assert "rows before it are missing: got response_id 1, expected response_id 0" in reasons[0]
    assert "rows before it are missing: got response_id 2" in reasons[1]
    assert "a row before it" in reasons[2]
    assert "field 'context' is empty" in reasons[3]
    assert "not JSON" in reasons[5]
    assert json.loads(rejects[0].record) == row(0, 1)
    # Of whole dialogues the usable beginnings.
    whole, rejects = read(path, whole=True)
    assert [len(d.turns) for d in whole] == [2, 2, 2]
    assert [reject.line for reject in rejects] == [1, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**SODA, "dialogue": ["Hi.", " "]}, "dialogue[1]' is empty"),
        ({**SODA, "speakers": ["A"]}, "differ in length"),
        ([1], "not a record"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_records_of_a_file_are_set_aside(tmp_path, record, reason):
    """Every reason names what is wrong; the other records are read."""
    dialogues, (reject,) = read(write(tmp_path / "in", SODA, record, SODA))
    assert [d.id for d in dialogues] == ["0", "2"]
    assert reject.line == 2
    assert reason in reject.reason
    assert str(tmp_path) not in reject.reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"turns": ["Hi.", ""]}, "turn 2 is empty"),
        ({"turns": []}, "at least one"),
        ({"turns": [3]}, "turn 1: got int"),
        ({"turns": ["\ud800"]}, "not valid text"),
        ({}, "field 'turns'"),
    ],
)
def test_bad_turns_are_set_aside(tmp_path, record, reason):
    """Every reason names the turn."""
    dialogues, (reject,) = read(write(tmp_path / "in", {"turns": ["Hi."], "id": "a"}, record))
    assert [d.id for d in dialogues] == ["a"]
    assert reason in reject.reason


def test_bad_lines_of_dailydialog_are_set_aside(tmp_path):
    """An utterance that is empty, or a line that breaks off."""
    path = write(tmp_path / "in", DAILY, "Hi . __eou__ __eou__", "Hi . __eou__ Hel")
    dialogues, rejects = read(path)
    assert [d.turns for d in dialogues] == [("Hi.", "Hello, you.")]  # as in training
    for reject, says in zip(rejects, ("utterance 2 is empty", "not a line of"), strict=True):
        assert says in reject.reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no dialogues"),
        (" \n\n", "no dialogues"),
        ('{"head": "a", "relation": "b", "tail": "c"}\n', "ATOMIC"),
        ('{"reddit_thread": []}\n', "ToxiChat"),
        ("hello\n", "no corpus known here"),
        ("[3]", "no corpus known here"),
        ("[]", "no corpus known here"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, says):
    """What it looks like is said, and what was expected."""
    with pytest.raises(UserError, match=says) as error:
        reading.source(str(write(tmp_path / "in", text.rstrip("\n")) if text else _empty(tmp_path)))
    assert "ProsocialDialog rows" in str(error.value)


def _empty(folder):
    (folder / "in").write_text("")
    return folder / "in"


def test_missing_and_damaged_files_are_named(tmp_path):
    """The path, and why it cannot be read."""
    with pytest.raises(UserError, match=r"nowhere.*cannot be read"):
        reading.source(str(tmp_path / "nowhere"))
    (tmp_path / "in.gz").write_bytes(gzip.compress(DAILY.encode())[:-9])
    with pytest.raises(UserError, match=r"in\.gz cannot be read"):
        reading.source(str(tmp_path / "in.gz"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_elements_of_a_list_are_found_whatever_the_chunks(monkeypatch, chunk):
    """Oracle: json.loads of the whole; strings hold brackets, quotes and backslashes."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", chunk)
    values = [[{"a": 'x]"} \\'}, [1, [2]]], {"b": "\\\\"}, "s,]t", 3, [], None, ["ü\n"]]
    for indent in (None, 1):
        text = json.dumps(values, indent=indent).encode()
        found = list(pieces.elements(io.BytesIO(text)))
        assert [json.loads(piece.lines[0]) for piece in found] == values
        for piece in found:
            assert text[piece.start :].startswith(piece.lines[0])
            assert piece.line == text.count(b"\n", 0, piece.start)
        file = io.BytesIO(text)
        file.seek(found[2].start)
        rest = list(pieces.elements(file, found[2].start, found[2].line))
        assert rest == found[2:]


def test_a_list_that_breaks_off_is_one_reject(tmp_path):
    """Property: what came before is used."""
    one = {"text": "Hi.", "labels": ["Hello."], "rots": None, "safety_label": "__casual__"}
    text = json.dumps([[one], [one], [{"text": 3}], []])
    path = tmp_path / "in.json"
    path.write_text(text)
    dialogues, rejects = read(path)
    assert [d.id for d in dialogues] == ["0-0", "1-0"]
    assert ["field 'labels'" in rejects[0].reason, "at least one row" in rejects[1].reason] == [
        True,
        True,
    ]
    path.write_text(text[: text.index("]", 150)])
    dialogues, (reject,) = read(path)
    assert "not JSON" in reject.reason
    assert len(dialogues) == 1


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_what_follows_a_list_is_not_dropped(tmp_path, monkeypatch, chunk):
    """Oracle: by hand, of `cat a.json b.json`; what is not a list is a reject."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", chunk)
    one = {"text": "Hi.", "labels": ["Hello."], "rots": None, "safety_label": "__casual__"}
    path = tmp_path / "in.json"
    path.write_text(f"{json.dumps([[one], [one]])}\n{json.dumps([[one]], indent=1)}\n\n[] rest\n")
    dialogues, (reject,) = read(path)
    assert [d.id for d in dialogues] == ["0-0", "1-0", "2-0"]
    assert reject.record == "rest"
    assert read(path, spans=[(0, 1), (2, 3)])[0] == [dialogues[0], dialogues[2]]


@pytest.mark.parametrize("every", [1, 4])
def test_any_span_can_be_read(tmp_path, monkeypatch, every):
    """Oracle: the whole file, read at once."""
    monkeypatch.setattr(record_sources, "INDEX_EVERY", every)
    hub = write(tmp_path / "hub", *(row(d, r) for d in range(9) for r in range(d % 3 + 1)))
    one = {"text": "Hi.", "labels": ["Hello."], "rots": None, "safety_label": "__casual__"}
    nested = write(tmp_path / "nested", json.dumps([[one] * (d % 3 + 1) for d in range(9)]))
    for path in (hub, nested):
        everything, _ = read(path)
        assert read(path, spans=[(k, k + 1) for k in range(9)])[0] == everything
        tail = [d for d in everything if int(d.id.split("-")[0]) in (5, 8)]
        assert read(path, spans=[(5, 6), (8, 9)])[0] == tail


def test_soda_in_parquet(tmp_path, caplog):
    """Oracle: the same rows as JSON lines; any span of several row groups can be read."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**SODA, "dialogue": [f"Hi {i}.", "Hello."]} for i in range(10)]
    rows[4]["dialogue"] = ["Hi.", " "]
    path = tmp_path / "soda.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    wanted, (reject,) = read(write(tmp_path / "soda.jsonl", *rows))
    caplog.clear()
    dialogues, (found,) = read(path)
    assert dialogues == wanted
    assert f"rejected: {path}:5: " in caplog.text
    assert (found.line, found.reason) == (reject.line, reject.reason)
    assert read(path, spans=[(0, 2), (7, 8)])[0] == [wanted[0], wanted[1], wanted[6]]
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="the columns"):
        read(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="no whole Parquet"):
        read(path)


@pytest.mark.parametrize("name", ["soda.arrow", "renamed.jsonl"])
def test_soda_in_arrow(tmp_path, name):
    """Oracle: the same rows as JSON lines."""
    pa = pytest.importorskip("pyarrow")
    rows = [{**SODA, "dialogue": [f"Hi {i}.", "Hello."]} for i in range(10)]
    wanted, _ = read(write(tmp_path / "soda.jsonl", *rows))
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        table = pa.Table.from_pylist(rows)
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        assert read(tmp_path / name) == (wanted, [])
        assert read(tmp_path / name, spans=[(2, 5), (8, 9)])[0] == [*wanted[2:5], wanted[8]]


def test_a_damaged_part_of_a_parquet_file_is_set_aside(tmp_path):
    """Oracle: by hand: zeros over the pages of the second of three row groups, rows 3 to 5."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**SODA, "dialogue": [f"Hi {i}.", "Hello."]} for i in range(9)]
    path = tmp_path / "soda.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    wanted, _ = read(path)
    group, content = pq.ParquetFile(path).metadata.row_group(1), bytearray(path.read_bytes())
    for column in (group.column(i) for i in range(group.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    dialogues, rejects = read(path)
    assert dialogues == [*wanted[:3], *wanted[6:]]
    assert [reject.line for reject in rejects] == [4, 5, 6]
    assert all("the Parquet file is damaged here" in reject.reason for reject in rejects)
    assert len(read(path, spans=[(4, 7)])[1]) == 2


def test_half_a_character_in_an_id_is_kept(tmp_path):
    """Oracle: by hand; a turn with one is set aside."""
    half = "\\ud800"
    path = write(
        tmp_path / "in", f'{{"id": "{half}", "turns": ["Hi."]}}', f'{{"turns": ["{half}"]}}'
    )
    (dialogue,), (reject,) = read(path)
    assert dialogue.id == "\ud800" and "half a character" in reject.reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04zip", "a zip archive"),
        (json.dumps(SODA).encode("utf-16"), "text in UTF-16"),
        (gzip.compress(json.dumps(SODA).encode())[:-12], "cannot be read"),
        (b"PAR1", "no whole Parquet"),
        (b"", "has no dialogues"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, words):
    """Oracle: the words by hand, in one line."""
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "in.jsonl")
    assert str(tmp_path / "in.jsonl") in str(caught.value) and "\n" not in str(caught.value)


def test_real_rows(shared):
    """Oracle: counts of the files, by hand; cosmo.tasks.readers reads the same dialogues."""
    from cosmo.tasks import readers

    data = shared / "data"
    dialogues, rejects = read(data / "soda_rows.jsonl")
    assert (len(dialogues), rejects) == (5, [])
    dialogues, rejects = read(data / "dailydialog_validation.txt")
    assert (len(dialogues), rejects) == (1000, [])
    for name in ("prosocial_rows.jsonl", "prosocial_direct_download.json"):
        contexts, rejects = read(data / name)
        assert rejects == []
        whole, _ = read(data / name, whole=True)
        wanted = list(readers.read_prosocial(data / name))
        assert [d.turns for d in whole] == [
            tuple(text for t in d.turns for text in (t.context, t.response)) for d in wanted
        ]
        assert len(contexts) == sum(len(d.turns) for d in wanted)
