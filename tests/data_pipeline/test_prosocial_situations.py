"""Situations from the publishers' files. Oracles: files written by hand, the paper's examples."""

import csv
import json

import pytest

from cosmo.engine.base.errors import DataError
from data_pipeline import __main__ as command
from data_pipeline.prosocial import situations, stereotypes
from data_pipeline.prosocial.situations import Count

SAMPLE = situations.resolve("data_pipeline/prosocial/sample")
SOCIAL = SAMPLE / "social-chem-101.v1.0.tsv"
PATHS = {"socialchemistry": SOCIAL, "ethics": SAMPLE / "ethics", "sbic": SAMPLE / "sbic"}


def social(path, rows, header=None, **changes):
    """Write a Social Chemistry file of the sample's first rows, changed by column."""
    lines = SOCIAL.read_text().splitlines()
    names = lines[0].split("\t")
    out = [header or lines[0]]
    for line in lines[1 : rows + 1]:
        row = dict(zip(names, line.split("\t"), strict=True)) | changes
        out.append("\t".join(row.values()))
    path.write_text("\n".join(out) + "\n")
    return path


def sbic(path, *rows):
    """Write an SBIC file of (post, group, stereotype)."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["post", "targetMinority", "targetStereotype"])
        writer.writerows(rows)
    return path


def test_the_sample_has_60_situations_and_every_filter_drops_some():
    """Oracle: the rows that the sample was written with."""
    found = situations.find(PATHS)
    assert len(found.situations) == 60
    left = {name: [step["situations"] for step in steps] for name, steps in found.counts.items()}
    assert left == {
        "socialchemistry": [45, 43, 42, 40, 37],
        "ethics_amt": [13, 11, 10],
        "sbic": [15, 14, 13],
    }
    assert {one.split for one in found.situations} == {"train", "validation", "test"}
    first = found.situations[0]
    assert first.etc == "reddit/amitheasshole/s000" and len(first.rots) == 2
    assert not any(one.rots for one in found.situations if one.source == "ethics_amt")
    assert len({one.reason for one in found.bad}) == 1


@pytest.mark.parametrize(
    ("column", "value", "kept"),
    [
        ("action-pressure", "-2", True), ("action-pressure", "-1.0", True),
        ("action-pressure", "2.0", True), ("action-pressure", "1.0", False),
        ("action-pressure", "0.0", False), ("action-pressure", "", False),
        ("rot-char-targeting", "char-0", True), ("rot-char-targeting", "char-1", False),
        ("rot-char-targeting", "char-none", False), ("rot-bad", "1", False),
        ("split", "dev-extra", False), ("split", "analysis", False), ("split", "dev", True),
    ],
)  # fmt: skip
def test_filters_of_social_chemistry(tmp_path, column, value, kept):
    """Oracle: appendix A.1 (targets the writer, pressure below 0 or 2), and the three splits."""
    path = social(tmp_path / "s.tsv", 1, **{column: value})
    bad = []
    assert bool(situations.social_chemistry(path, Count(), bad)) is kept and not bad


def test_etc_is_area_and_id():
    """Oracle: the published row `reddit/amitheasshole/b26onw`."""
    assert situations._etc("amitheasshole", "b26onw") == "reddit/amitheasshole/b26onw"
    assert situations._etc("x", "reddit/confessions/bsajnv") == "reddit/confessions/bsajnv"
    assert situations._etc("dearabby", "12") == "dearabby/12"


@pytest.mark.parametrize(
    ("stereotype", "group", "rule"),
    [
        (
            "Asians are not suitable for Hollywood movies", "asian folks",
            "Asians are not suitable for Hollywood movies",
        ),
        ("are lazy.", "farmers", "farmers are lazy"),
        ("steal cars", "farmers", "farmers steal cars"),
        ("they are lazy", "farmers", "farmers are lazy"),
        ("woman should cook", "women", "woman should cook"),
        ("All farmers lie", "farmers", "all farmers lie"),
        ("farmer's are loud", "farmers", "farmer's are loud"),
        ("old people cannot drive", "seniors", "old people cannot drive"),
        ("being poor is a choice", "poor people", "poor people being poor is a choice"),
    ],
)  # fmt: skip
def test_stereotypes_become_rules(stereotype, group, rule):
    """Oracle: the first is the paper's (footnote 2), the others are by hand."""
    assert stereotypes.rule(stereotype, group) == f"It's wrong to think {rule}"


def test_stereotypes_without_words_make_no_rule():
    """Property: different rules only, in order, and none without letters."""
    assert stereotypes.rules([(" ", "x"), ("...", "x"), ("are A", "b"), ("b are a", "b")]) == [
        "It's wrong to think b are A"
    ]


WORDS = "one two three four five six seven eight nine"


def test_posts_are_cleaned_and_counted(tmp_path):
    """Oracle: by hand. 9 words are too few, 10 and 40 are enough, 41 too many."""
    path = sbic(
        tmp_path / "SBIC.v2.dev.csv",
        (WORDS, "women", "are loud"),
        (f"RT @you: {WORDS} &amp;#8220;ten&amp;#8221; https://t.co/x", "women", "are loud"),
        (f"RT @you: {WORDS} &amp;#8220;ten&amp;#8221; https://t.co/x", "women", "women lie"),
        (" ".join(["w"] * 40), "women", "are loud"),
        (" ".join(["w"] * 41), "women", "are loud"),
        (f"{WORDS} ten", "", ""),
    )
    bad, count = [], Count()
    found = situations.sbic(path, count, bad)
    assert [one.text for one in found] == [f"{WORDS} “ten”", " ".join(["w"] * 40)]
    assert found[0].rots == ("It's wrong to think women are loud", "It's wrong to think women lie")
    assert found[0].split == "validation" and not bad
    assert [step["situations"] for step in count.result()] == [5, 4, 2]


def test_aggregated_posts_hold_lists(tmp_path):
    """Oracle: by hand, after the form of SBIC.v2.agg."""
    path = sbic(tmp_path / "SBIC.v2.agg.trn.csv", (f"{WORDS} ten", '["women"]', '["lie", "cheat"]'))
    found = situations.sbic(path, Count(), [])
    assert found[0].rots == ("It's wrong to think women lie", "It's wrong to think women cheat")


def test_a_post_of_only_a_url_is_quarantined(tmp_path):
    """Oracle: file, line and reason are in the quarantined row."""
    rows = [("https://example.org/a/b @you", "women", "are loud"), (f"{WORDS} ten", "men", "lie")]
    path = sbic(tmp_path / "SBIC.v2.tst.csv", *rows)
    bad = []
    assert len(situations.sbic(path, Count(), bad)) == 1
    assert [(one.id, one.reason) for one in bad] == [
        ("SBIC.v2.tst.csv:2", "the post has no words beside URLs and @names")
    ]


def test_real_posts(shared):
    """Oracle: 1,500 real rows of 478 posts; every kept one has 10 to 40 words and a rule."""
    bad = []
    count = Count()
    found = situations.sbic(shared / "data/sbic_dev.csv", count, bad)
    assert count.rows["all rows"] == 1500 and not bad
    assert len(found) == 139
    assert all(10 <= len(one.text.split()) <= 40 and one.rots for one in found)
    assert not any("http" in one.text or "@" in one.text for one in found)


@pytest.mark.parametrize("shift", ["header", "rows", "left"])
def test_shifted_columns_are_refused(tmp_path, shift):
    """A header, or rows, of another order. Oracle: the error names a column and its remedy."""
    lines = SOCIAL.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    if shift == "header":
        cells[0] = cells[0][1:] + cells[0][:1]
    elif shift == "rows":
        cells[1:] = [[row[-1], *row[:-1]] for row in cells[1:]]
    else:  # a first column is missing
        cells[1:] = [row[1:] for row in cells[1:]]
    path = tmp_path / "s.tsv"
    path.write_text("\n".join("\t".join(row) for row in cells) + "\n")
    with pytest.raises(DataError, match=r"do not fit their columns.*Columns may be shifted"):
        situations.find({"socialchemistry": path})


def test_one_broken_row_is_quarantined(tmp_path):
    """Oracle: the row's place and fault; the others stay."""
    path = social(tmp_path / "s.tsv", 12)
    lines = path.read_text().splitlines()
    lines[2] += "\tone more"
    lines[3] = lines[3].replace("char-0", "7", 1)
    path.write_text("\n".join(lines) + "\n")
    found = situations.find({"socialchemistry": path})
    assert [(one.id, one.reason.split(":")[0]) for one in found.bad] == [
        ("s.tsv:3", "26 fields, where the header has 25"),
        ("s.tsv:4", "column 'rot-char-targeting'"),
    ]


@pytest.mark.parametrize(
    ("name", "key", "text", "problem"),
    [
        ("s.tsv", "socialchemistry", "", "no rows"),
        ("s.tsv", "socialchemistry", "area\tm\n", "column 'split' is missing"),
        ("cm_train.csv", "ethics", "label,input,is_short,edited\n", "no rows"),
        ("cm.csv", "ethics", "label,input,is_short\n1,I lied.,True\n", "gives no split"),
        ("cm_train.csv", "ethics", "label,input,is_short\n0,I sang.,True\n", "no situation is"),
        ("cm_train.csv", "ethics", "label,input,is_short\nyes,I sang.,True\n", "column 'label'"),
        ("SBIC.v2.trn.csv", "sbic", "post\nx\n", "column 'targetMinority' is missing"),
        ("SBIC.v2.trn.csv", "sbic", "\n\n", "no rows"),
    ],
)
def test_empty_and_wrong_files(tmp_path, name, key, text, problem):
    """Oracle: one line that names the file and the fault."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=problem) as caught:
        situations.find({key: path})
    assert str(path) in str(caught.value)


def test_the_verb_writes_counts_and_quarantine(tmp_path, capsys):
    """Oracle: the files that it wrote, read back; a sample by seed is a subset."""
    flags = [
        f"--social_chemistry={SOCIAL}",
        f"--ethics={PATHS['ethics']}",
        f"--sbic={PATHS['sbic']}",
    ]
    assert command.main(["prosocial", "situations", *flags, f"--output={tmp_path}/a"]) == 0
    assert "36k" in capsys.readouterr().out
    whole = situations.read(tmp_path / "a/situations.jsonl")
    assert len(whole) == 60 and len(json.loads((tmp_path / "a/filters.json").read_text())) == 3
    assert len((tmp_path / "a/quarantined.jsonl").read_text().splitlines()) == 2
    for name in "bc":
        more = ["--sample=7", f"--output={tmp_path}/{name}", "--quiet"]
        assert command.main(["prosocial", "situations", *flags, *more]) == 0
    some = situations.read(tmp_path / "b/situations.jsonl")
    assert len(some) == 7 and set(some) < set(whole)
    assert some == situations.read(tmp_path / "c/situations.jsonl")
    assert command.main(["prosocial", "situations", f"--output={tmp_path}/d"]) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no situations"),
        ('{"id": "a"}\n', "field 'source' is missing"),
        ('{"id": "a", "source": "b", "split": "train", "text": "c"}\n', "expected one of"),
        ('{"id": "a", "source": "sbic", "split": "x", "text": "c"}\n', "train, validation or test"),
        ('{"id": "a", "source": "sbic", "split": "test", "text": " "}\n', "empty"),
        ('{"id": "a", "source": "sbic", "split": "test", "text": "c"}\n' * 2, "an id twice"),
    ],
)
def test_broken_situations_are_refused(tmp_path, text, problem):
    """Oracle: the fault in words."""
    path = tmp_path / "situations.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        situations.read(path)


def test_rules_of_a_file_go_to_situations_without_any(tmp_path):
    """Oracle: by hand; lines of predictions and of lists, and two that are neither."""
    one, two = (
        situations.Situation(name, "ethics_amt", "train", "I lied.", rots)
        for name, rots in (("a", ()), ("b", ("Own.",)))
    )
    path = tmp_path / "rules.jsonl"
    path.write_text(
        '{"id": "a", "prediction": "Be kind."}\n{"id": "b", "rots": ["No."]}\n'
        '{"id": "a", "rots": ["Be kind.", "Ask."]}\n'
        '{"id": "a", "prediction": "__needs_caution__ It is rude., You should not lie."}\n'
    )
    made = situations.with_rules([one, two], path)
    assert [found.rots for found in made] == [
        ("Be kind.", "Ask.", "It is rude.", "You should not lie."),
        ("Own.",),
    ]
    for text in ('{"id": "a"}', '["a"]', '{"id": "a", "rots": [" "]}'):
        path.write_text(text)
        with pytest.raises(DataError, match="rule"):
            situations.with_rules([one], path)
