"""Files that are not what they should be: each is read, or named with its place and a remedy.

Oracle: the readable twin of each file, and the words by hand.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError
from cosmo.tasks.conversations import read_empathetic
from cosmo.tasks.files import files_for_split
from cosmo.tasks.norms import mic_examples, norm_bank_examples
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.vocabularies import load
from tests.tasks.tasks_samples import prosocial_row, soda_row, write_lines
from tests.tasks.test_tasks_casual import ED_HEADER, ed_row

ROWS = [soda_row(i) for i in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def _zip():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("train.jsonl", TEXT)
    return packed.getvalue()


def _tar():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, ["got a Git LFS pointer", "Run `git lfs pull`"]),
        (b"/annex/objects/SHA256E-s1--ab.jsonl\n", ["git-annex pointer", "Run `git annex get"]),
        (_zip(), ["got a zip archive", "Unpack it"]),
        (_tar(), ["got a tar archive", "Unpack it"]),
        (gzip.compress(_tar()), ["got a tar archive"]),
        (b"\n <!DOCTYPE html><html>Sign in", ["got a web page", "login"]),
        (TEXT.decode().encode("utf-16"), ["got text in UTF-16", "iconv"]),
        (b"SQLite format 3\x00" + bytes(100), ["got an SQLite database"]),
        (gzip.compress(TEXT)[:20], ["cut short or damaged"]),
        (b"", ["no record of split 'train'"]),
        (b"\n\n", ["no record of split 'train'"]),
        (gzip.compress(b""), ["no record of split 'train'"]),
    ],
)
@pytest.mark.parametrize("read", [read_soda, read_prosocial])
def test_a_file_that_is_no_text_is_named(tmp_path, content, words, read):
    """Oracle: the kind and the remedy by hand."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read(path))
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_vocabulary_that_is_a_pointer(tmp_path):
    """Oracle: the words by hand."""
    (tmp_path / "v.model").write_bytes(POINTER)
    with pytest.raises(DataError, match=r"Git LFS pointer.*git lfs pull"):
        load(tmp_path / "v.model")


def _arrow(kind, rows):
    pa = pytest.importorskip("pyarrow")
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with getattr(pa.ipc, f"new_{kind}")(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _parquet(rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["data.arrow", "DATA.ARROW", "train.json", "train.jsonl.gz"])
@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_columns_are_read_whatever_the_name(tmp_path, name, kind):
    """Oracle: the same rows as JSON lines."""
    expected = list(read_soda(write_lines(tmp_path / "a.jsonl", ROWS)))
    content = _parquet(ROWS) if kind == "parquet" else _arrow(kind, ROWS)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_soda(tmp_path / name)) == expected


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_every_compression_is_read(tmp_path, packed):
    """Oracle: the plain file; a stream that goes back reads the same again."""
    pa = pytest.importorskip("pyarrow")
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(
        packed, lambda data: pa.compress(data, codec="zstd", asbytes=True)
    )
    expected = list(read_soda(write_lines(tmp_path / "a.jsonl", ROWS)))
    path = tmp_path / f"train.jsonl.{packed}"
    path.write_bytes(pack(TEXT))
    assert list(read_soda(path)) == expected
    with files.opened(path) as stream:
        for place in (40, 7, 0, 300, 9):
            stream.seek(place)
            assert stream.read(20) == TEXT[place : place + 20]


def test_a_folder_as_datasets_saves_it(tmp_path):
    """Oracle: the layout of `save_to_disk`: descriptions lie beside the data."""
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "train" / name).write_text("{}")
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(_arrow("stream", ROWS))
    assert len(list(read_soda(tmp_path))) == 3


def test_endings_and_splits_in_capitals(tmp_path):
    """Oracle: by hand."""
    for name in ("TRAIN.JSONL", "Valid.Json.GZ", "Test.PARQUET"):
        (tmp_path / name).touch()
    for split, name in (
        ("train", "TRAIN.JSONL"),
        ("validation", "Valid.Json.GZ"),
        ("test", "Test.PARQUET"),
    ):
        assert [file.name for file in files_for_split(tmp_path, split)] == [name]


@pytest.mark.parametrize("make", [_parquet, lambda rows: _arrow("file", rows)])
def test_a_damaged_table_is_one_error_or_right(tmp_path, make):
    """Property: every cut is an error; a byte flipped anywhere raises nothing but DataError."""
    whole = make([soda_row(i) for i in range(40)])
    path = tmp_path / "train.parquet"
    for size in range(0, len(whole) - 1, max(1, len(whole) // 100)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            list(read_soda(path))
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        with contextlib.suppress(DataError):
            list(read_soda(path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ("1" * 5_000, "a whole number of more than 4,300 digits"),
    ],
)
@pytest.mark.parametrize("form", ["line", "field", "list"])
@pytest.mark.parametrize(
    ("read", "row"), [(read_soda, soda_row()), (read_prosocial, prosocial_row(0, 0))]
)
def test_deep_values_and_endless_numbers(tmp_path, value, words, form, read, row):
    """Oracle: the place by hand: the second record, on line 2 or 3."""
    text = json.dumps(row)
    odd = value if form == "line" else f'{text[:-1]}, "extra": {value}}}'
    path = tmp_path / "train.json"
    path.write_text(f"[\n{text},\n{odd}]" if form == "list" else f"{text}\n{odd}\n")
    with pytest.raises(DataError) as error:
        list(read(path))
    message = str(error.value)
    assert message.startswith(f"{path}:{3 if form == 'list' else 2}: broken JSON"), message
    assert words in message and len(message) < 1000


SAID = ['He said "yes", twice.', '"Yes"', 'A 14" screen, "new"', "2,000", "so_comma_ so", "plain"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_empathetic_dialogues_that_were_saved_again(tmp_path, quoting):
    """Oracle: Python's csv writer wrote these texts."""
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=quoting)
        writer.writerow(ED_HEADER.strip().split(","))
        for number, text in enumerate(SAID, 1):
            row = ["hit:0_conv:1", number, "proud", "I won, once.", 7, text, "5|5|5_2|2|5", ""]
            writer.writerow(row)
    (dialogue,) = read_empathetic(path)
    # A csv writer leaves `"Yes"` alone only if it quotes nothing, as the publisher.
    assert dialogue.turns == tuple(text.replace("_comma_", ",") for text in SAID)


def test_empathetic_dialogues_as_published_keep_their_quotes(tmp_path):
    """Oracle: the texts by hand: a raw quote is a character, even alone at a field's start."""
    said = ['"Yes"', '"Hm', 'so "it" is', 'end"', '""']
    path = tmp_path / "train.csv"
    path.write_text(ED_HEADER + "".join(ed_row("c", i, text) for i, text in enumerate(said, 1)))
    assert next(read_empathetic(path)).turns == tuple(said)


@pytest.mark.parametrize(
    "row",
    [
        "c,1,proud,I won.,7,Yes, I did.,5|5|5_2|2|5,",  # an utterance with a comma
        "c,1,proud,I won.,7,Worth 2,000,5|5|5_2|2|5,",  # one that is cut between digits
        "c,1,proud,I won.,7,Yes,,5|5|5_2|2|5,",
        "c,1,proud,I won 2,000,7,Yes.,5|5|5_2|2|5,",  # a prompt with a comma: 7 as the utterance
        "3,c,1,proud,I won.,7,Yes.,5|5|5_2|2|5,",  # a column of row numbers
        'c,1,proud,I won.,7,"Yes, I did.,5|5|5_2|2|5,',  # a quote that is never closed
        '"c,1,proud,I won.,7,Yes.,5|5|5_2|2|5,',
        "c,1,proud,I won.,seven,Yes.,5|5|5_2|2|5,",
    ],
)
def test_a_cut_row_of_empathetic_dialogues_is_refused(tmp_path, row):
    """Oracle: the place by hand: line 3, which no way of reading makes right."""
    path = tmp_path / "train.csv"
    path.write_text(ED_HEADER + ed_row("b", 1, "Hi.") + row + "\n" + ed_row("d", 1, "Bye."))
    with pytest.raises(DataError) as error:
        list(read_empathetic(path))
    assert str(error.value).startswith(f"{path}:3: "), error.value


def test_tables_with_stray_quotes_lose_no_row(tmp_path):
    """Oracle: by hand: quotes of a raw table are characters; a lost quote is an error."""
    path = tmp_path / "moral_acceptability" / "train.tsv"
    path.parent.mkdir()
    raw = [("a", '"Fine" she said'), ("b", '"It is'), ("c", "Bad"), ("d", 'It is"'), ("e", '"')]
    path.write_text("inputs\ttargets\n" + "".join(f"{one}\t{two}\n" for one, two in raw))
    found = list(norm_bank_examples(tmp_path, "free_form"))
    assert [(e.turns[0][-1], e.response) for e in found] == raw
    path = tmp_path / "MIC.csv"
    row = '"Q, and",A,"Lying is wrong.",train\n'
    path.write_text("Q,A,rot,split\n" + row + '"Q\nof two lines, too",A,rot,train\n' + row)
    assert [e.turns[0] for e in mic_examples(path)] == ["Q, and", "Q\nof two lines, too", "Q, and"]
    path.write_text("Q,A,rot,split\n" + row + '"Q, and,A,rot,train\n' + row * 3)
    with pytest.raises(DataError, match=r"MIC.csv:3: "):
        list(mic_examples(path))
