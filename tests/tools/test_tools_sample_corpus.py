"""The sample corpus and its vocabulary.

Oracles: the committed files (same seed, same bytes), the published field lists of both corpora,
the published rule from annotators' votes to safety labels, and SentencePiece itself.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import sentencepiece

from cosmo.engine.base import byte_level_bpe
from cosmo.tasks.readers import read_prosocial, read_soda
from tests.sample_corpus import make_sample_corpus
from tests.sample_corpus.sample_corpus_grammar import (
    GrammarError,
    load_grammar,
    parse_script,
    parse_slots,
)
from tools import train_vocabulary

SAMPLE = Path(__file__).resolve().parents[2] / "tasks" / "sample"
SPLITS = ("train", "validation", "test")
FILES = [f"{corpus}/{split}.jsonl" for corpus in ("soda", "prosocial") for split in SPLITS]
INPUTS = [str(SAMPLE / "soda"), str(SAMPLE / "prosocial")]

# Fields and their types as the corpora are published.
SODA_FIELDS = dict.fromkeys(
    [
        "head",
        "relation",
        "tail",
        "literal",
        "narrative",
        "PersonX",
        "PersonY",
        "PersonZ",
        "split",
        "head_answer",
        "pmi_head_answer",
        "relation_tail_answer",
        "pmi_relation_tail_answer",
    ],
    str,
) | {"dialogue": list, "speakers": list, "original_index": int}
PROSOCIAL_FIELDS = dict.fromkeys(["context", "response", "safety_label", "source", "etc"], str) | {
    "rots": (list, type(None)),
    "safety_annotations": list,
    "safety_annotation_reasons": list,
    "dialogue_id": int,
    "response_id": int,
    "episode_done": bool,
}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text().splitlines()]


def dialogues(corpus: str, split: str) -> list[tuple[str, ...]]:
    found = rows(f"{corpus}/{split}.jsonl")
    if corpus == "soda":
        return [tuple(row["dialogue"]) for row in found]
    joined: dict[int, list[str]] = {}
    for row in found:
        joined.setdefault(row["dialogue_id"], []).extend((row["context"], row["response"]))
    return [tuple(lines) for lines in joined.values()]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "again.model"
    assert train_vocabulary.main(["--input", *INPUTS, f"--output={path}"]) == 0
    return path


def test_same_seed_gives_the_committed_bytes(tmp_path):
    assert make_sample_corpus.main([f"--output={tmp_path}"]) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == sorted(
        FILES
    )


def test_another_seed_gives_another_corpus(tmp_path):
    assert make_sample_corpus.main([f"--output={tmp_path}", "--seed=1"]) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() != (SAMPLE / name).read_bytes(), name


def test_sizes():
    assert [len(dialogues("soda", split)) for split in SPLITS] == [600, 80, 40]
    assert [len(dialogues("prosocial", split)) for split in SPLITS] == [340, 50, 25]
    assert sum((SAMPLE / name).stat().st_size for name in FILES) < 1_500_000


@pytest.mark.parametrize("corpus", ["soda", "prosocial"])
def test_no_dialogue_occurs_twice(corpus):
    found = [lines for split in SPLITS for lines in dialogues(corpus, split)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("split", SPLITS)
def test_soda_rows_have_every_published_field(split):
    for row in rows(f"soda/{split}.jsonl"):
        assert set(row) == set(SODA_FIELDS)
        for field, kind in SODA_FIELDS.items():
            assert isinstance(row[field], kind), field
        assert row["split"] == {"validation": "valid"}.get(split, split)
        assert row["PersonX"] in row["speakers"]
        assert row["PersonX"] in row["narrative"] and row["PersonX"] in row["literal"]
        assert not row["PersonY"] or row["PersonY"] in row["speakers"]
        assert len({row["PersonX"], row["PersonY"], row["PersonZ"]} - {""}) == sum(
            bool(row[f"Person{letter}"]) for letter in "XYZ"
        )
        assert len(row["speakers"]) == len(row["dialogue"])
        assert row["speakers"][0] != row["speakers"][1]
        assert row["speakers"] == (row["speakers"][:2] * 5)[: len(row["dialogue"])]
        assert "Person" not in row["literal"]


def test_original_index_is_unique():
    found = [row["original_index"] for split in SPLITS for row in rows(f"soda/{split}.jsonl")]
    assert sorted(found) == list(range(720))


@pytest.mark.parametrize("split", SPLITS)
def test_prosocial_rows_have_every_published_field_and_label_rule(split):
    previous = None
    for row in rows(f"prosocial/{split}.jsonl"):
        assert set(row) == set(PROSOCIAL_FIELDS)
        for field, kind in PROSOCIAL_FIELDS.items():
            assert isinstance(row[field], kind), field
        votes = row["safety_annotations"]
        assert len(votes) == 3 and len(set(row["safety_annotation_reasons"])) == 3
        assert set(votes) <= {"casual", "needs caution", "needs intervention"}
        # Kim et al. 2022, appendix A.4: a single vote for intervention decides.
        if "needs intervention" in votes:
            expected = "__needs_intervention__"
        else:
            expected = [
                "__casual__",
                "__possibly_needs_caution__",
                "__probably_needs_caution__",
                "__needs_caution__",
            ][votes.count("needs caution")]
        assert row["safety_label"] == expected
        assert (row["rots"] is None) == (expected == "__casual__")
        assert row["rots"] is None or row["rots"]
        starts = previous is None or previous["episode_done"]
        assert row["response_id"] == (0 if starts else previous["response_id"] + 1)
        assert row["dialogue_id"] == (
            (0 if previous is None else previous["dialogue_id"] + 1)
            if starts
            else previous["dialogue_id"]
        )
        previous = row
    assert previous["episode_done"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_readers_take_every_dialogue(split):
    assert len(list(read_soda(str(SAMPLE / "soda"), split))) == len(dialogues("soda", split))
    assert len(list(read_prosocial(str(SAMPLE / "prosocial"), split))) == len(
        dialogues("prosocial", split)
    )


def test_utterances_are_plain_and_of_everyday_length():
    lines = [
        line
        for corpus in ("soda", "prosocial")
        for split in SPLITS
        for dialogue in dialogues(corpus, split)
        for line in dialogue
    ]
    for line in lines:
        assert 5 <= len(line.split()) <= 25, line
        assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ,.!?:'-]*[.!?]", line), line
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouhAEIOUH]", line), line


def test_dialogues_have_four_to_ten_turns():
    for corpus in ("soda", "prosocial"):
        lengths = {len(lines) for split in SPLITS for lines in dialogues(corpus, split)}
        assert {4, 6, 8, 10} == lengths


def test_breadth():
    text = " ".join((SAMPLE / name).read_text() for name in ("soda/train.jsonl",))
    spoken = " ".join(
        line for corpus in ("soda", "prosocial") for d in dialogues(corpus, "train") for line in d
    )
    assert len(set(re.findall(r"[a-z']+", spoken.lower()))) >= 1_800
    assert len(load_grammar("topics_")) >= 30 and len(load_grammar("problems_")) >= 30
    for entry in load_grammar("topics_"):
        opening = parse_script(entry["script"])[0].alternatives
        assert len(opening) >= 2, entry["name"]
    assert '"PersonZ":""' in text
    problems = {row["etc"] for row in rows("prosocial/validation.jsonl")}
    assert len(problems) >= 35


def test_validation_is_not_only_repeated_training_lines():
    seen = {line for lines in dialogues("soda", "train") for line in lines}
    lines = [line for found in dialogues("soda", "validation") for line in found]
    assert 0.3 < sum(line in seen for line in lines) / len(lines) < 0.7


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_script, "a\nb\nc\n---\nd", "odd number of utterances"),
        (parse_script, "a\nb\n--- maybe\nc", "unknown stage header"),
        (parse_slots, "thing, place: lamp", "2 names but 1 values"),
        (parse_slots, "no colon here", "not a slot line"),
    ],
)
def test_grammar_mistakes_are_told(read, text, message):
    with pytest.raises(GrammarError, match=message):
        read(text)


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_sample_corpus.main([f"--output={tmp_path}/file"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("make_sample_corpus: ") and error.count("\n") == 1


def test_vocabulary_is_the_committed_one(vocabulary):
    assert vocabulary.read_bytes() == (SAMPLE / "vocabulary.model").read_bytes()


def test_vocabulary_has_t5s_layout_and_the_separators():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "vocabulary.model"))
    assert pieces.get_piece_size() == 2000
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id())
    assert ids == (0, 1, 2, -1)
    text = "Nora is happy. <sep> Hi, Ben! <turn> Hello, Nora!"
    assert pieces.encode(text, out_type=str).count("<sep>") == 1
    assert pieces.decode(pieces.encode(text)) == text
    assert not any(pieces.is_byte(id) for id in range(pieces.get_piece_size()))


def test_vocabulary_knows_all_text():
    model = (SAMPLE / "vocabulary.model").read_bytes()
    for split in SPLITS:
        texts = list(train_vocabulary.corpus_texts(INPUTS, split))
        unknown, total = train_vocabulary.unknown_rate(model, texts)
        assert unknown == 0 < total
    printable = "".join(map(chr, range(32, 127)))
    assert train_vocabulary.unknown_rate(model, [printable])[0] == 0


def test_bpe_is_the_committed_one(tmp_path):
    """Oracle: the bundled file, made by the command in docs/extend.md; BlenderBot's layout."""
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocabulary.json"
    inputs = ["--input", *(str(SAMPLE / name) for name in ("prosocial", "canary", "soda"))]
    arguments = [*inputs, "--kind=bpe", "--vocab_size=1008", f"--output={path}"]
    assert train_vocabulary.main(arguments) == 0
    assert path.read_bytes() == (SAMPLE / "prost/vocabulary.json").read_bytes()
    bpe = byte_level_bpe.read(path)
    assert bpe.pieces[:4] == ("<pad>", "<s>", "</s>", "<unk>")
    assert bpe.spare_ids == {f"__FP16_PAD_{i}__": 1004 + i for i in range(4)}
    # A merge makes the next piece, in their order.
    assert ["".join(pair) for pair in bpe.merges] == list(bpe.pieces[260:1004])


def test_bpe_needs_room_and_its_library(tmp_path, capsys, monkeypatch):
    """Oracle: the words of the error; 4 special, 256 bytes, a merge, 4 spare."""
    pytest.importorskip("tokenizers")
    arguments = ["--input", INPUTS[0] + "/test.jsonl", f"--output={tmp_path}/v", "--kind=bpe"]
    assert train_vocabulary.main([*arguments, "--vocab_size=264"]) == 1
    assert "--vocab_size=264 is less than the 265 needed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert train_vocabulary.main(arguments) == 1
    error = capsys.readouterr().err
    assert "cosmo-dialogue[blenderbot]" in error and error.count("\n") == 1
    assert not (tmp_path / "v").exists()


def test_symbols_and_size_are_settings(tmp_path):
    path = tmp_path / "v.model"
    arguments = ["--input", INPUTS[0] + "/test.jsonl", f"--output={path}"]
    assert train_vocabulary.main([*arguments, "--vocab_size=300", "--symbols=<x>"]) == 0
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert pieces.get_piece_size() <= 300
    assert pieces.piece_to_id("<x>") != pieces.unk_id() == pieces.piece_to_id("<sep>")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "no data"),
        ('{"other": 1}\n', [], "cannot be told"),
        ('{"dialogue": 1, "speakers": 2}\n', [], "narrative"),
        ("not json\n", [], "cannot be told"),
        ((SAMPLE / "soda/test.jsonl"), ["--vocab_size=20"], "--vocab_size=20"),
    ],
)
def test_trainer_errors_are_one_line(tmp_path, capsys, content, flags, message):
    path = content if isinstance(content, Path) else tmp_path / "data.jsonl"
    if isinstance(content, str):
        path.write_text(content)
    output = tmp_path / "v.model"
    assert train_vocabulary.main([f"--input={path}", f"--output={output}", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_vocabulary: ") and error.count("\n") == 1 and message in error
    assert not output.exists()
