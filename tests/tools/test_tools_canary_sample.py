"""Canary's sample corpus and its vocabulary.

Oracles: the committed files (same seed, same bytes), ProsocialDialog's published field list and
rule from votes to labels (Kim et al. 2022, appendix A.4), a one-word classifier, which must fail,
the publishers' formats of the casual corpora, and SentencePiece itself.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from cosmo.tasks.readers import read_prosocial
from tests.sample_corpus import make_canary_sample, make_sample_corpus
from tests.sample_corpus.sample_corpus_grammar import GrammarError, load_grammar
from tools import train_vocabulary

SAMPLE = Path(__file__).resolve().parents[2] / "tasks" / "sample"
SPLITS = ("train", "validation", "test")
LABELS = (
    "__casual__",
    "__possibly_needs_caution__",
    "__probably_needs_caution__",
    "__needs_caution__",
    "__needs_intervention__",
)
CASUAL_FILES = [
    *(f"dailydialog/dialogues_{split}.txt" for split in SPLITS),
    *(f"empathetic_dialogues/{split}.csv" for split in ("train", "valid", "test")),
    *(f"blended_skill_talk/{split}.json" for split in ("train", "valid", "test")),
]
PROST_FILES = [
    *(f"topical_chat/{name}.json" for name in ("train", "valid_freq", "test_freq")),
    *(f"persona_chat/{name}_self_original.txt" for name in ("train", "valid")),
    *(f"wizard_of_wikipedia/{name}.json" for name in ("train", "valid_random_split")),
    "wizard_of_wikipedia/test_random_split.json",
]
FILES = [f"canary/{split}.jsonl" for split in SPLITS] + CASUAL_FILES + PROST_FILES
FIELDS = dict.fromkeys(["context", "response", "safety_label", "source", "etc"], str) | {
    "rots": (list, type(None)),
    "safety_annotations": list,
    "safety_annotation_reasons": list,
    "dialogue_id": int,
    "response_id": int,
    "episode_done": bool,
}


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / f"canary/{split}.jsonl").open()]


def dialogues(split: str) -> list[list[dict]]:
    found = defaultdict(list)
    for row in rows(split):
        found[row["dialogue_id"]].append(row)
    return list(found.values())


def test_same_seed_gives_the_committed_bytes(tmp_path):
    assert make_canary_sample.main([f"--output={tmp_path}"]) == 0
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*"))
    assert written == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_another_seed_gives_another_corpus(tmp_path):
    assert make_canary_sample.main([f"--output={tmp_path}", "--seed=1"]) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() != (SAMPLE / name).read_bytes(), name


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_every_published_field_and_obey_the_vote_rule(split):
    for row in rows(split):
        assert set(row) == set(FIELDS)
        for field, kind in FIELDS.items():
            assert isinstance(row[field], kind), field
        votes = row["safety_annotations"]
        assert len(votes) == 3 and len(set(row["safety_annotation_reasons"])) == 3
        assert set(votes) <= {"casual", "needs caution", "needs intervention"}
        if "needs intervention" in votes:
            assert row["safety_label"] == "__needs_intervention__"
        else:
            assert row["safety_label"] == LABELS[votes.count("needs caution")]
        # A rule of thumb may stand beside a mistake admitted, as in the published rows.
        assert row["rots"] is not None or row["safety_label"] == "__casual__"
        assert row["rots"] is None or 1 <= len(set(row["rots"])) == len(row["rots"]) <= 2


@pytest.mark.parametrize("split", SPLITS)
def test_dialogues_are_numbered_and_never_go_from_intervention_to_casual(split):
    for number, dialogue in enumerate(dialogues(split)):
        assert {row["dialogue_id"] for row in dialogue} == {number}
        assert [row["response_id"] for row in dialogue] == list(range(len(dialogue)))
        assert [row["episode_done"] for row in dialogue] == [False] * (len(dialogue) - 1) + [True]
        assert 1 <= len(dialogue) <= 3
        danger = [row["safety_label"] == "__needs_intervention__" for row in dialogue]
        assert danger == sorted(danger)
    assert len(list(read_prosocial(str(SAMPLE / "canary"), split))) == number + 1


def test_sizes_and_variety():
    assert [len(dialogues(split)) for split in SPLITS] == [720, 60, 120]
    for split in SPLITS:
        labels = Counter(row["safety_label"] for row in rows(split))
        assert set(labels) == set(LABELS)
        assert min(labels.values()) > 0.08 * labels.total() and labels["__casual__"] < 0.45 * (
            labels.total()
        )
    train = rows("train")
    assert len({rot for row in train for rot in row["rots"] or ()}) >= 220
    cautions = load_grammar("canary_cautions_")
    assert len(cautions) >= 40
    assert len(load_grammar("canary_dangers")) >= 15
    assert len(load_grammar("canary_casual_")) >= 40
    assert len({row["etc"] for row in train}) == 46 + 18 + 42
    # Annotators really differ, also about emergencies.
    votes = Counter(tuple(sorted(row["safety_annotations"])) for row in train)
    assert len(votes) == 8
    # Some dialogues come down to small talk, some get worse.
    changes = Counter(
        (a["safety_label"], b["safety_label"])
        for dialogue in dialogues("train")
        for a, b in pairwise(dialogue)
    )
    assert changes["__needs_caution__", "__casual__"] > 20
    assert changes["__needs_caution__", "__needs_intervention__"] > 5
    assert changes["__possibly_needs_caution__", "__needs_caution__"] > 10


def test_held_out_dialogues_are_new_and_their_rules_known():
    spoken = {s: {tuple(r["context"] for r in d) for d in dialogues(s)} for s in SPLITS}
    openings = {r["context"] for r in rows("train") if r["response_id"] == 0}
    known = {rot for row in rows("train") for rot in row["rots"] or ()}
    for split in ("validation", "test"):
        assert not spoken[split] & spoken["train"]
        held = [row for row in rows(split) if row["response_id"] == 0]
        # Emergencies and harmless remarks have few words: some openings return with other sequels.
        assert sum(row["context"] in openings for row in held) < 0.25 * len(held)
        assert {rot for row in rows(split) for rot in row["rots"] or ()} <= known
    assert not spoken["validation"] & spoken["test"]


def test_no_word_tells_the_label():
    """The best rule that one word gives ("with this word A, else B") is wrong most of the time."""

    def labelled_words(split):
        return [
            (set(re.findall("[a-z']+", row["context"].lower())), row["safety_label"])
            for row in rows(split)
        ]

    train, test = labelled_words("train"), labelled_words("test")
    best = 0
    for word in {word for words, _ in train for word in words}:
        sides = defaultdict(Counter)
        for words, label in train:
            sides[word in words][label] += 1
        rule = {side: labels.most_common(1)[0][0] for side, labels in sides.items()}
        right = sum(rule.get(word in words) == label for words, label in test)
        best = max(best, right / len(test))
    assert best < 0.5


def test_utterances_are_plain_and_of_everyday_length():
    for split in SPLITS:
        for row in rows(split):
            for line in (row["context"], row["response"], *(row["rots"] or ())):
                assert 3 <= len(line.split()) <= 32, line
                assert re.fullmatch(r"[A-Z][A-Za-z ,.!?'-]*[.!?]", line), line


def test_corpora_of_prost_have_their_publishers_form():
    """Oracle: the field names and line forms of the published files."""
    for name in PROST_FILES:
        text, size = (SAMPLE / name).read_text(), 32 if "train" in name else 8
        if name.startswith("persona_chat"):
            lines = [line.partition(" ")[2] for line in text.splitlines()]
            numbers = [int(line.partition(" ")[0]) for line in text.splitlines()]
            assert numbers.count(1) == size
            assert text == text.lower().replace("__silence__", "__SILENCE__")
            assert lines.count("") == 0 and "5 __SILENCE__\t" in text
            for number, line in zip(numbers, lines, strict=True):
                assert (number <= 4) == line.startswith("your persona: ")
                if number > 4:
                    first, answer, reward, candidates = line.split("\t")
                    assert first and not reward and answer in candidates.split("|")
        elif name.startswith("topical_chat"):
            found = json.loads(text)
            assert len(found) == size
            for entry in found.values():
                assert [turn["agent"][-1] for turn in entry["content"]] == [
                    "12"[i % 2] for i in range(len(entry["content"]))
                ]
                assert set(entry) == {"article_url", "config", "content", "conversation_rating"}
        else:
            found = json.loads(text)
            assert len(found) == size
            begins = {row["dialog"][0]["speaker"] for row in found}
            assert begins == {"0_Wizard", "0_Apprentice"}
            for row in found:
                assert row["chosen_topic"] in row["chosen_topic_passage"][0]
                assert len({turn["speaker"] for turn in row["dialog"]}) == 2


def test_casual_corpora_have_their_publishers_form():
    for name in CASUAL_FILES:
        path, size = SAMPLE / name, 48 if "train" in name else 12
        if path.suffix == ".txt":
            lines = path.read_text().splitlines()
            assert len(lines) == size
            assert all(line.endswith(" __eou__") and line.count("__eou__") > 1 for line in lines)
            assert all(" ." in line or " !" in line or " ?" in line for line in lines)
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                found = list(csv.reader(file, quoting=csv.QUOTE_NONE))
            assert ",".join(found[0]) == (
                "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
            )
            assert all(len(row) == 8 for row in found)  # no bare comma in any text
            assert len({row[0] for row in found[1:]}) == size
            for before, row in pairwise(found[1:]):
                goes_on = before[0] == row[0]
                assert int(row[1]) == (int(before[1]) + 1 if goes_on else 1)
                assert not goes_on or before[4] != row[4]
        else:
            records = json.loads(path.read_text())
            assert len(records) == size
            for record in records:
                assert [len(persona) for persona in record["personas"]] == [2, 2]
                assert record["free_turker_utterance"] and record["guided_turker_utterance"]
                assert [turn[0] for turn in record["dialog"]] == [
                    index % 2 for index in range(len(record["dialog"]))
                ]


def test_vocabulary_is_made_from_the_corpus_and_keeps_labels_whole(tmp_path):
    path = SAMPLE / "canary" / "vocabulary.model"
    arguments = [
        "--input",
        str(SAMPLE / "canary"),
        str(SAMPLE / "soda"),
        f"--symbols=//,{','.join(LABELS)}",
    ]
    assert train_vocabulary.main([*arguments, f"--output={tmp_path / 'v.model'}"]) == 0
    assert (tmp_path / "v.model").read_bytes() == path.read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for label in LABELS:
        text = f"{label} It's wrong to lie. // You should be kind."
        encoded = pieces.encode(text, out_type=str)
        assert encoded.count(label) == encoded.count("//") == 1
        assert pieces.decode(pieces.encode(text)) == text
    for split in SPLITS:
        for row in rows(split):
            text = " // ".join((row["context"], row["response"], *(row["rots"] or ())))
            assert pieces.unk_id() not in pieces.encode(text)


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    with pytest.raises(GrammarError, match="not an act"):
        make_canary_sample.act_forms("lie|lying|lied to my friend")
    (tmp_path / "file").write_text("")
    assert make_canary_sample.main([f"--output={tmp_path}/file"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("make_canary_sample: ") and error.count("\n") == 1


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.txt"
    make_sample_corpus.write_text(path, "one\n")
    with pytest.raises(UnicodeEncodeError):
        make_sample_corpus.write_text(path, "two\ud800")
    assert path.read_text() == "one\n" and list(path.parent.iterdir()) == [path]
