"""Oracles: tables written by hand after the publishers' descriptions."""

import csv

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks.norms import NORM_BANK, mic_examples, norm_bank_examples, social_chemistry_examples
from cosmo.tasks.vocabularies import load


def write_table(path, rows, delimiter):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def chemistry_row(id, **changes):
    return {
        "area": "confessions",
        "split": "train",
        "rot-agree": "3",
        "rot-bad": "0",
        "situation": f"taking a friend's cake, {id}",
        "rot": f"It's rude to take what isn't yours, {id}.",
        "rot-id": f"rot/{id}",
        **changes,
    }


def test_social_chemistry(tmp_path):
    """Oracle: by hand: bad RoTs, other splits and a second annotator's row give nothing."""
    rows = [
        chemistry_row(0),
        chemistry_row(0, **{"rot-agree": "4"}),
        chemistry_row(1, **{"rot-bad": "1"}),
        chemistry_row(2, split="dev"),
        chemistry_row(3, split="dev-extra"),
        chemistry_row(4, situation='a "quoted"\ttext'),
    ]
    path = write_table(tmp_path / "social-chem-101.v1.0.tsv", rows, "\t")
    for where in (path, tmp_path):
        train = list(social_chemistry_examples(where))
        assert [e.id for e in train] == ["social_chemistry-train-0", "social_chemistry-train-1"]
        assert train[0].turns == ("taking a friend's cake, 0",)
        assert train[0].response == "It's rude to take what isn't yours, 0."
        assert train[1].turns == ('a "quoted"\ttext',)
    (dev,) = social_chemistry_examples(path, "validation")
    assert dev.turns == ("taking a friend's cake, 2",)
    with pytest.raises(DataError, match="no record of split 'test'"):
        list(social_chemistry_examples(path, "test"))


def test_mic(tmp_path):
    """Oracle: by hand: the question and the answer are the two turns."""
    row = {"Q": "May I lie?", "A": "Sure,\nalways.", "rot": "Lying is wrong.", "split": "train"}
    path = write_table(tmp_path / "MIC.csv", [row, {**row, "split": "test"}], ",")
    (example,) = mic_examples(path)
    assert (example.turns, example.response) == (
        ("May I lie?", "Sure,\nalways."),
        "Lying is wrong.",
    )
    assert [e.id for e in mic_examples(path, "test")] == ["mic-test-0"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"Q": "a", "A": "b", "split": "train"}, "MIC.csv:2: column 'rot' is missing"),
        ({"Q": "a", "A": " ", "rot": "r", "split": "train"}, "MIC.csv:2: column 'A' is empty"),
        ({"rot": "r", "situation": "s", "rot-agree": 1}, " looks like Social Chemistry"),
    ],
)
def test_a_bad_table_is_named(tmp_path, row, words):
    """Oracle: file, line and column by hand."""
    path = write_table(tmp_path / "MIC.csv", [row], ",")
    with pytest.raises(DataError) as error:
        list(mic_examples(path))
    assert words in str(error.value)


def test_lines_of_a_table(tmp_path):
    """Oracle: by hand: a quoted line break, then a row with a field too many on line 4."""
    path = tmp_path / "MIC.csv"
    path.write_text('Q,A,rot,split\na,"b\nc",d,train\ne,f,g,train,x\n')
    with pytest.raises(DataError, match=r"MIC\.csv:4: a row of another length .*5 fields"):
        list(mic_examples(path))


def test_norm_bank_of_both_forms(tmp_path, t5_vocabulary):
    """Oracle: Delphi's published inputs and targets; T5's vocabulary has every piece of them."""
    single = {"input_sequence": "helping a friend", "class_label": 1, "text_label": "It's good"}
    pair = {"action_1": "helping", "action_2": "hurting", "targets": 1}
    released, trained = tmp_path / "released", tmp_path / "trained"
    for task, names in NORM_BANK.items():
        row = pair if task == "relative" else single
        write_table(released / f"train.{names[0]}.tsv", [row], "\t")
    texts = {
        "inputs": "[moral_single]: helping a friend",
        "targets": "<class>1</class> <text>It's good</text>",
    }
    marked = {"inputs": "[moral_pair]: <action1>helping</action1> <action2>hurting</action2>"}
    for task, names in NORM_BANK.items():
        row = {**marked, "targets": 1} if task == "relative" else texts
        write_table(trained / names[1] / f"train.{names[1]}.tsv", [row], "\t")
    vocabulary = load(t5_vocabulary)
    for folder in (released, trained):
        for task in ("free_form", "yes_no"):
            (example,) = norm_bank_examples(folder, task)
            assert example.id == f"norm_bank-{task}-train-0"
            assert example.turns == ("[moral_single]: helping a friend",)
            assert example.response == "[class]1[/class] [text]It's good[/text]"
            assert vocabulary.unk_id not in vocabulary.encode(example.turns[0] + example.response)
        (example,) = norm_bank_examples(folder, "relative")
        (text,) = example.turns
        assert text == "[moral_pair]: [action1]helping[/action1] [action2]hurting[/action2]"
        assert example.response == "1"
        assert vocabulary.unk_id not in vocabulary.encode(text)
    mapping = {"yes_no": released / "train.moral_agreement.tsv"}
    assert len(list(norm_bank_examples(mapping, "yes_no"))) == 1
    for path in (mapping, tmp_path):
        with pytest.raises(DataError, match="NORM_BANK_PATH"):
            list(norm_bank_examples(path, "relative"))


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        (
            "yes_no",
            {"input_sequence": "a", "class_label": 2, "text_label": "b"},
            "column 'class_label' has an unknown value",
        ),
        (
            "relative",
            {"action_1": "a", "action_2": "b", "targets": 0},
            "column 'targets' has an unknown value",
        ),
        ("yes_no", {"input_sequence": "a"}, "column 'text_label' is missing"),
    ],
)
def test_a_bad_judgement_is_named(tmp_path, task, row, words):
    """Oracle: file, line and column by hand."""
    path = write_table(tmp_path / "train.tsv", [row], "\t")
    with pytest.raises(DataError) as error:
        list(norm_bank_examples({task: path}, task))
    assert f"{path}:2: {words}" in str(error.value)
