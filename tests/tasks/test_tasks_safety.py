"""Oracles: the paper's rule and examples, the published labels of real rows, T5's vocabulary."""

import itertools
import json

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import safety
from cosmo.tasks.dialogues import ProsocialDialogue, ProsocialTurn
from cosmo.tasks.formatting import drop_oldest_turns
from cosmo.tasks.readers import read_prosocial
from cosmo.tasks.vocabularies import load

CASUAL, CAUTION, INTERVENTION = safety.VOTES


def test_the_rule_for_every_combination_of_votes():
    """Oracle: Kim et al. 2022, appendix A.4, its sentences written as a table."""
    table = {
        (CASUAL, CASUAL, CASUAL): "__casual__",
        (CASUAL, CASUAL, CAUTION): "__possibly_needs_caution__",
        (CASUAL, CAUTION, CAUTION): "__probably_needs_caution__",
        (CAUTION, CAUTION, CAUTION): "__needs_caution__",
    }
    for votes in itertools.product(safety.VOTES, repeat=3):
        expected = table.get(tuple(sorted(votes)), "__needs_intervention__")
        assert safety.aggregate(votes) == expected
        assert (INTERVENTION in votes) == (expected == "__needs_intervention__")


def test_votes_of_all_real_rows_give_the_published_label(shared):
    """Oracle: `safety_label` as ProsocialDialog published it, in both of its formats."""
    text = (shared / "data/prosocial_rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    nested = json.loads((shared / "data/prosocial_direct_download.json").read_text())
    rows += [row for dialogue in nested for row in dialogue]
    assert len(rows) == 18
    assert [safety.aggregate(r["safety_annotations"]) for r in rows] == [
        r["safety_label"] for r in rows
    ]


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        (["casual"] * 2, "2 votes"),
        (["casual"] * 4, "4 votes"),
        ([], "0 votes"),
        (["casual", "casual", "Casual"], "unknown vote 'Casual'"),
        (["casual", None, "casual"], "unknown vote None"),
        ("casual", "1 votes"),
    ],
)
def test_other_votes_are_refused(votes, words):
    """Oracle: the wording; a number or a word that the annotators could not give."""
    with pytest.raises(DataError, match=words):
        safety.aggregate(votes)


def test_labels_and_their_three_classes():
    """Oracle: Kim et al. 2022, section 3.3: five labels, three grades of caution."""
    assert safety.LABELS == (
        "__casual__",
        "__possibly_needs_caution__",
        "__probably_needs_caution__",
        "__needs_caution__",
        "__needs_intervention__",
    )
    classes = [safety.three_class(label) for label in safety.LABELS]
    assert classes == ["casual", *["needs caution"] * 3, "needs intervention"]
    assert set(classes) == set(safety.CLASSES)
    with pytest.raises(DataError, match="unknown safety label '__fine__'"):
        safety.three_class("__fine__")


def test_targets_of_the_paper():
    """Oracle: Kim et al. 2022, section 4.1."""
    rot = "It is wrong to call 911 just for fun."
    assert safety.target("__needs_caution__", [rot]) == f"__needs_caution__ {rot}"
    assert safety.target("__needs_caution__", ["A", "", "B"]) == "__needs_caution__ A, B"
    assert safety.target("__casual__", [rot]) == "__casual__"
    assert safety.target("__casual__", []) == "__casual__"
    assert safety.target("__needs_caution__", ["A"], "sentinel") == "<extra_id_98> A"
    for rots in ([], None, [" "]):
        with pytest.raises(DataError, match="no rules of thumb for __needs_caution__"):
            safety.target("__needs_caution__", rots)
    with pytest.raises(DataError, match="LABEL_STYLE"):
        safety.target("__casual__", [], "emoji")


@pytest.mark.parametrize("style", safety.STYLES)
def test_parse_takes_a_target_apart(style):
    """Property: the inverse of `target`; oracle: by hand where there is no label."""
    for label in safety.LABELS:
        text = safety.target(label, ["It's rude.", "B"], style)
        rots = "" if label == "__casual__" else "It's rude., B"
        assert safety.parse_answer(f" {text} ", style) == (label, rots)
        assert safety.parse_answer(safety.label_text(label, style), style) == (label, "")
    assert safety.parse_answer("It's rude.", style) == (None, "It's rude.")
    assert safety.parse_answer("", style) == (None, "")
    glued = safety.label_text("__casual__", style) + "x"
    assert safety.parse_answer(glued, style) == (None, glued)


@pytest.mark.parametrize("style", safety.STYLES)
def test_labels_survive_t5s_vocabulary(t5_vocabulary, style):
    """Oracle: T5's published vocabulary: no unknown piece, the same text back; sentinels: 1 piece.

    RoTs after the label are tokenized as they are alone, so a label's pieces are the same
    whatever follows.
    """
    vocabulary = load(t5_vocabulary)
    alone = vocabulary.encode("It's wrong.")
    for label in safety.LABELS:
        ids = vocabulary.encode(safety.label_text(label, style))
        assert vocabulary.unk_id not in ids
        assert (len(ids) == 1) == (style == "sentinel")
        text = safety.target(label, ["It's wrong."], style)
        assert vocabulary.decode(vocabulary.encode(text)) == text
        if label != "__casual__":
            assert vocabulary.encode(text) == [*ids, *alone]


@pytest.mark.parametrize("style", safety.STYLES)
def test_seqios_tokenizer_agrees(t5_vocabulary, style):
    """Oracle: SeqIO's SentencePieceVocabulary and its TensorFlow form on all five targets."""
    pytest.importorskip("seqio")
    from cosmo.tasks.vocabularies import seqio_vocabulary

    ours, theirs = load(t5_vocabulary), seqio_vocabulary(t5_vocabulary)
    for label in safety.LABELS:
        text = safety.target(label, ["It's wrong."], style)
        ids = ours.encode(text)
        assert theirs.encode(text) == ids == theirs.encode_tf(text).numpy().tolist()
        assert (
            theirs.decode(ids) == text == theirs.decode_tf(theirs.encode_tf(text)).numpy().decode()
        )


def test_the_separator_is_one_piece_that_decodes_back(t5_vocabulary):
    """Oracle: T5's published vocabulary; a newline would be unknown there."""
    vocabulary = load(t5_vocabulary)
    ids = vocabulary.encode(safety.TURN_SEPARATOR)
    assert len(ids) == 1 and vocabulary.unk_id not in ids
    text = safety.context(["I was rude.", "Why?", "For fun."])
    assert text == "I was rude. // Why? // For fun."
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.unk_id in vocabulary.encode("a\nb".replace("\n", " <sep> "))


def test_a_long_context_loses_its_oldest_turns():
    """Oracle: words counted by hand: "c // d" is 3 and EOS."""
    turns = ["a", "b", "c", "d"]
    kept = [
        safety.context(
            drop_oldest_turns("", "", turns, n, lambda t: len(t.split()), safety.SEPARATORS)
        )
        for n in (1, 4, 8)
    ]
    assert kept == ["d", "c // d", "a // b // c // d"]


def dialogue(*labels_and_rots, votes=None):
    turns = [
        ProsocialTurn(f"c{i}", f"r{i}", tuple(rots), label, votes)
        for i, (label, rots) in enumerate(labels_and_rots)
    ]
    return ProsocialDialogue("prosocial-train-7", tuple(turns))


def test_examples_of_a_dialogue():
    """Oracle: two exchanges by hand: the row's own context is the last turn."""
    talk = dialogue(("__needs_caution__", ["A", "B"]), ("__casual__", []), ("__casual__", ["C"]))
    told = list(safety.canary_examples(talk))
    assert [e.turns for e in told] == [
        ("c0",),
        ("c0", "r0", "c1"),
        ("c0", "r0", "c1", "r1", "c2"),
    ]
    assert [e.response for e in told] == ["__needs_caution__ A, B", "__casual__", "__casual__"]
    assert [e.id for e in told] == [f"prosocial-train-7-{i}" for i in range(3)]
    assert {e.narrative + e.instruction for e in told} == {""}
    labels = [e.response for e in safety.canary_examples(talk, "safety", "sentinel")]
    assert labels == ["<extra_id_98>", "<extra_id_95>", "<extra_id_95>"]
    rots = list(safety.canary_examples(talk, "rot"))
    assert [(e.id, e.response) for e in rots] == [
        ("prosocial-train-7-0", "A, B"),
        ("prosocial-train-7-2", "C"),
    ]
    with pytest.raises(DataError, match="kind 'labels'"):
        next(safety.canary_examples(talk, "labels"))


def test_missing_rots_are_an_error_or_left_out():
    """Oracle: the field's name; the other examples; a label alone needs no RoT."""
    talk = dialogue(("__needs_caution__", []), ("__needs_caution__", ["A"]))
    with pytest.raises(DataError, match=r"'rots' is null or empty.*__needs_caution__.*'c0'"):
        list(safety.canary_examples(talk))
    kept = list(safety.canary_examples(talk, strict=False))
    assert [e.id for e in kept] == ["prosocial-train-7-1"]
    assert len(list(safety.canary_examples(talk, "safety"))) == 2
    assert len(list(safety.canary_examples(talk, "rot"))) == 1


def row(**changes):
    return {
        "context": "I was rude.",
        "response": "Why?",
        "rots": ["It's rude."],
        "safety_label": "__needs_caution__",
        "safety_annotations": [CAUTION] * 3,
        "dialogue_id": 0,
        "response_id": 0,
        "episode_done": True,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rots": None}, "field 'rots' is null or empty"),
        ({"rots": []}, "field 'rots' is null or empty"),
        ({"rots": [" "]}, "field 'rots' is null or empty"),
        ({"safety_annotations": [CASUAL] * 3}, "'safety_label' is __needs_caution__, which contra"),
        ({"safety_annotations": [CAUTION] * 2}, "field 'safety_annotations': 2 votes"),
        ({"safety_annotations": ["maybe"] * 3}, "field 'safety_annotations': an unknown vote"),
        ({"safety_annotations": "casual"}, "field 'safety_annotations' has a wrong type"),
        ({"safety_label": "__fine__"}, "field 'safety_label' has an unknown value"),
        ({"context": " "}, "field 'context' is empty"),
        ({"response": ""}, "field 'response' is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, words):
    """Oracle: file, line and field of the second row."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(**changes)) + "\n")
    with pytest.raises(DataError) as error:
        [list(safety.canary_examples(talk)) for talk in read_prosocial(path)]
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)


def test_votes_of_the_direct_download_are_read(shared):
    """Oracle: the file's first row."""
    first = next(iter(read_prosocial(shared / "data/prosocial_direct_download.json")))
    assert first.turns[0].votes == (CAUTION,) * 3
    assert len(list(safety.canary_examples(first))) == 2
