# ruff: noqa: E501 -- one case, one line
"""Triples as sentences: table 8, English tenses, names."""

import collections

import pytest

from cosmo.tasks import namebook
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import inflection, prompts, sentences, triples
from data_pipeline.co3.triples import Triple

BOOK = namebook.load()
PROMPTS = prompts.load()


def named(relation, tail, head="PersonX sees PersonY", names=("Ann", "Bob", "Cid")):
    triple = Triple("1", head, relation, tail, 0, names=names)
    return sentences.sentence(triple, PROMPTS, BOOK, 0)


@pytest.mark.parametrize(
    "relation, head, tail, literal",
    [
        # The paper's table 1, and the real rows of SODA.
        (
            "xNeed",
            "PersonX moves a step closer to the goal",
            "to take the first step",
            "Ann took the first step. Ann moves a step closer to the goal.",
        ),
        (
            "xNeed",
            "PersonX thought about going to church",
            "to be interested in going to church",
            "Ann was interested in going to church. Ann thought about going to church.",
        ),
        (
            "xAttr",
            "PersonX listens to PersonY's thoughts",
            "a good friend",
            "Ann is a good friend. Ann listens to Bob's thoughts.",
        ),
        (
            "xIntent",
            "PersonX provides another service",
            "to be a helpful person",
            "Ann provides another service because Ann wants to be a helpful person.",
        ),
        ("xAttr", "PersonX reads PersonY's mind", "intuitive", "Ann is intuitive. Ann reads Bob's mind."),
        # By hand.
        ("xReact", "PersonX sees PersonY", "happy.", "Ann sees Bob. Now Ann feels happy."),
        ("xReact", "PersonX sees PersonY", "feels Happy", "Ann sees Bob. Now Ann feels Happy."),
        ("xAttr", "PersonX sees PersonY", "to be nice", "Ann is nice. Ann sees Bob."),
        ("xWant", "PersonX sees PersonY", "To thank person y", "Ann sees Bob. Now Ann wants to thank Bob."),
        ("xWant", "PersonX sees PersonY", "get a hug", "Ann sees Bob. Now Ann wants to get a hug."),
        ("xEffect", "PersonX sees PersonY", "becomes rich", "Ann sees Bob. Now Ann becomes rich."),
        ("xEffect", "PersonX sees PersonY", "PersonX rolls eyes", "Ann sees Bob. Now Ann rolls eyes."),
        ("xEffect", "PersonX sees PersonY", "They become rich", "Ann sees Bob. Now Ann becomes rich."),
        ("xEffect", "PersonX does n't see PersonY 's car", "cries", "Ann doesn't see Bob's car. Now Ann cries."),
        ("xNeed", "PersonX ca n't pay", "calls PersonY", "Ann called Bob. Ann can't pay."),
        ("xWant", "PersonX sees PersonY", "to take Y's son", "Ann sees Bob. Now Ann wants to take Bob's son."),
        ("xWant", "PersonX sees PersonZ", "an x-ray", "Ann sees Cid. Now Ann wants an x-ray."),
    ],
)  # fmt: skip
def test_sentences(relation, head, tail, literal):
    """Oracle: the paper's and SODA's own sentences with other names; the rest by hand."""
    assert named(relation, tail, head).literal == literal


@pytest.mark.parametrize(
    "relation, tail",
    [
        ("xNeed", "a copy machine"),
        ("xNeed", "shoes"),
        ("xWant", "He shows her more dance moves."),
        ("xEffect", "PersonX's hand gets dirty"),
        ("xEffect", "PersonY cries"),
        ("xReact", "they are happy"),
    ],
)
def test_tails_that_fit_no_template_are_counted(relation, tail):
    """Oracle: by hand: none of these makes a sentence of table 8."""
    found = named(relation, tail)
    assert isinstance(found, Rejected) and found.reason == "tail of another form"


@pytest.mark.parametrize(
    "tail, past",
    [
        ("to get a job", "got a job"),
        ("to be there", "was there"),
        ("to have been there", "had been there"),
        ("to be able to run", "was able to run"),
        ("to go out and buy a car", "went out and bought a car"),
        ("to eat, drink and sleep", "ate, drank and slept"),
        ("to eat and to drink.", "ate and drank."),
        ("to have time and money", "had time and money"),
        ("to want to read and write", "wanted to read and write"),
        ("to first get up", "first got up"),
        ("to quickly run", "quickly ran"),
        ("to not be late", "was not late"),
        ("to not go", "did not go"),
        ("to put on a hat", "put on a hat"),
        ("to lie down", "lay down"),
        ("to stop", "stopped"),
        ("to babysit", "babysat"),
        ("to panic", "panicked"),
        ("to facetime him", "facetimed him"),
        ("know how", "knew how"),
        ("calls someone", "called someone"),
        ("to go to work and earn money", "went to work and earned money"),
        ("a machine", None),
        ("", None),
        ("to", None),
        ("to to", None),
    ],
)
def test_past_tense(tail, past):
    """Oracle: English."""
    assert inflection.past(tail) == past


def test_real_triples_give_a_sentence_or_a_counted_drop(shared):
    """Oracle: properties of each sentence: no variable is open, and both halves are there."""
    counts = collections.Counter()
    for triple in triples.read(shared / "data/atomic_triples.jsonl"):
        found = triple
        if isinstance(triple, Triple):
            found = sentences.sentence(triple, PROMPTS, BOOK, 0)
        if isinstance(found, Rejected):
            counts[found.reason] += 1
            continue
        counts["sentence"] += 1
        assert "Person" not in found.literal.replace("Personal", ""), found
        assert found.x and found.head in found.literal and found.literal.endswith((".", "!"))
        assert ".." not in found.literal and "  " not in found.literal, found
        assert (triple.relation == "xNeed") == bool(found.tail_past)
    print(dict(counts))
    assert sum(counts.values()) == 6000 and counts["sentence"] > 1800


def test_names_depend_on_id_and_seed_alone():
    """Oracle: determinism; different persons have different names."""
    people = [BOOK.people(str(i), 0) for i in range(300)]
    assert people == [BOOK.people(str(i), 0) for i in range(300)]
    assert people != [BOOK.people(str(i), 1) for i in range(300)]
    assert all(len(set(names)) == 3 for names in people)


def test_a_person_that_the_source_did_not_name():
    """Oracle: no open place in the sentence, and two different persons."""
    found = named("xWant", "to go", names=("Ann", "", ""))
    assert found.x == "Ann" and found.y in BOOK.names and found.y != "Ann" and not found.z
    assert found.literal == f"Ann sees {found.y}. Now Ann wants to go."


def test_common_names_are_common():
    """Oracle: Michael has 1.1 percent of the thousand's counts; five standard deviations."""
    drawn = collections.Counter(BOOK.people(str(i), 0, 1)[0] for i in range(10_000))
    common = [(n, c) for n, c in zip(BOOK.names, BOOK.counts, strict=True) if n not in BOOK.words]
    share = common[0][1] / sum(c for _, c in common[:1000])
    assert common[0][0] == "Michael"
    assert abs(drawn["Michael"] - 10_000 * share) < 5 * (10_000 * share) ** 0.5
    assert set(drawn) <= {n for n, _ in common[:1000]}


def test_nobody_is_called_by_a_word():
    """Oracle: words that every dictionary has."""
    assert len(BOOK.names) == 10_000
    assert {"Will", "Grace", "May", "Mark", "Hope", "Paris", "June"} <= BOOK.words
    assert not {"Michael", "Emily", "Tom", "Anna"} & BOOK.words


@pytest.mark.parametrize("line", ["Ann", "Ann\tmany", "Ann\t3\tnoun", "\t3"])
def test_a_names_file_of_another_form(line, tmp_path):
    """Oracle: the line's number."""
    path = tmp_path / "names.tsv"
    path.write_text(f"# Names.\nBob\t3\n{line}\n")
    with pytest.raises(ValueError, match=r"names\.tsv:3"):
        namebook.load(path)
