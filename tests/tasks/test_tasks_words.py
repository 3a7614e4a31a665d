"""Tasks whose target is a word: SBIC's offence and GoEmotions. Oracles: rows by hand, real SBIC."""

import csv

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import goemotions, sbic


def sbic_file(path, *rows):
    """Write an SBIC file of (post, offensiveYN, WorkerId)."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("post", "offensiveYN", "WorkerId"), *rows])
    return path


def test_sbics_posts_by_the_mean_of_annotators(tmp_path):
    """Oracle: by hand: an annotator counts once, half is offensive, no answer is no example."""
    sbic_file(
        tmp_path / "SBIC.v2.trn.csv",
        ("Men &amp;#8220;lie&amp;#8221;", "1.0", "a"),
        ("Men &amp;#8220;lie&amp;#8221;", "1.0", "a"),
        ("Men &amp;#8220;lie&amp;#8221;", "0.0", "b"),
        ("RT @ann: a nice day https://t.co/x", "0.0", "a"),
        ("RT @ann: a nice day https://t.co/x", "0.5", "b"),
        ("Is it?", "", "a"),
        ("https://t.co/y", "1.0", "a"),
    )
    found = list(sbic.offense_examples(tmp_path, "train"))
    assert [(one.id, one.turns, one.response) for one in found] == [
        ("sbic-train-0", ("Men \u201clie\u201d",), "offensive"),
        ("sbic-train-1", ("a nice day",), "safe"),
    ]


def test_sbics_splits_and_aggregated_files(tmp_path):
    """Oracle: by hand: names as published; an aggregated file has means already."""
    sbic_file(tmp_path / "SBIC.v2.agg.dev.csv", ("One.", "0.3333333333333333", ""))
    sbic_file(tmp_path / "SBIC.v2.agg.tst.csv", ("Two.", "0.6666666666666666", ""))
    words = {
        split: [one.response for one in sbic.offense_examples(tmp_path, split)]
        for split in ("validation", "valid", "test")
    }
    assert words == {"validation": ["safe"], "valid": ["safe"], "test": ["offensive"]}
    with pytest.raises(DataError, match="split 'train'"):
        list(sbic.offense_examples(tmp_path, "train"))


@pytest.mark.parametrize("value", ["yes", "2.0", "nan"])
def test_a_value_that_is_no_offence_is_named(tmp_path, value):
    """Oracle: file, line and column."""
    path = sbic_file(tmp_path / "SBIC.v2.trn.csv", ("One.", "1.0", ""), ("Two.", value, ""))
    with pytest.raises(DataError, match=r"trn\.csv:3: column 'offensiveYN'"):
        list(sbic.offense_examples(path, "train"))


def test_real_rows_of_sbic(shared):
    """Oracle: as many posts as csv finds with an answer; both words occur."""
    path = shared / "data/sbic_dev.csv"
    with path.open(newline="", encoding="utf-8") as file:
        posts = {row["post"] for row in csv.DictReader(file) if row["offensiveYN"]}
    found = list(sbic.offense_examples(path, "validation"))
    assert 0 < len(posts) - len(found) + 1 <= 3  # a post of only a URL is left out
    assert {one.response for one in found} == {"safe", "offensive"}


def test_goemotions_order_of_labels():
    """Oracle: places in the publishers' emotions.txt."""
    places = {"admiration": 0, "curiosity": 7, "joy": 17, "surprise": 26, "neutral": 27}
    assert {name: goemotions.LABELS.index(name) for name in places} == places
    assert len(goemotions.LABELS) == 28


def test_goemotions_comments(tmp_path):
    """Oracle: by hand: quotes are text, two emotions are two examples, dev is validation."""
    lines = 'She said "hi\t17\teew5j0j\nWow, why?\t7,26\teemcysk\nOk.\t27\ted2mah1\n'
    (tmp_path / "dev.tsv").write_text(lines)
    found = list(goemotions.goemotions_examples(tmp_path, "validation"))
    assert [(one.id, one.turns[0], one.response) for one in found] == [
        ("goemotions-validation-0-joy", 'She said "hi', "joy"),
        ("goemotions-validation-1-curiosity", "Wow, why?", "curiosity"),
        ("goemotions-validation-1-surprise", "Wow, why?", "surprise"),
        ("goemotions-validation-2-neutral", "Ok.", "neutral"),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Ok.\t28\tx", "column 2"),
        ("Ok.\t1,1\tx", "column 2"),
        ("Ok.\tjoy\tx", "column 2"),
        (" \t1\tx", "column 1"),
        ("Ok.\t1", "2 columns"),
        ("text,labels,id", "1 columns"),
    ],
)
def test_rows_that_are_not_goemotions(tmp_path, line, says):
    """Oracle: file, line and column."""
    path = tmp_path / "train.tsv"
    path.write_text(f"Fine.\t27\tid\n{line}\n")
    with pytest.raises(DataError, match=rf"train\.tsv:2: {says}"):
        list(goemotions.goemotions_examples(path, "train"))
