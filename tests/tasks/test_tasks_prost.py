"""Prost's tasks and mixture by their settings.

Oracles: Kim et al. 2022, appendix B.3, for the rates; corpora by hand.
"""

import functools

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import families, mixtures, prost_corpora
from cosmo.tasks.prost_text import VARIANTS, target_text

PATHS = {
    "dailydialog_path": "tasks/sample/dailydialog",
    "topical_chat_path": "tasks/sample/topical_chat",
    "persona_chat_path": "tasks/sample/persona_chat",
    "wizard_path": "tasks/sample/wizard_of_wikipedia",
    "empathetic_path": "tasks/sample/empathetic_dialogues",
    "blended_path": "tasks/sample/blended_skill_talk",
}
VOCABULARY = "tasks/sample/prost/vocabulary.json"
SPLITS = ("train", "validation", "test")
ORDER = ("prosocial", "dailydialog", "topical_chat", "persona_chat", "wizard", "empathetic")
TASKS = tuple(f"prost_{name}" for name in (*ORDER, "blended"))
check = functools.partial(
    mixtures.check, prosocial_path="tasks/sample/prosocial", vocabulary_path=VOCABULARY
)


def test_the_papers_rates():
    """Oracle: appendix B.3's weights in its order of corpora."""
    assert families.MIXTURES["prost"] == dict(zip(TASKS, (9, 3, 3, 3, 3, 3, 1), strict=True))
    assert tuple(families.PROST) == tuple(prost_corpora.SOURCES) == TASKS


def test_the_samples_pass():
    """Property: all seven samples have all splits; any task of the family may be named."""
    data = families.ProstData(**PATHS)
    for name in ("prost", *TASKS):
        check(SPLITS, name, prost=data)
    read = families.prost_corpora("tasks/sample/prosocial", data)
    assert tuple(read) == TASKS
    for corpus in read.values():
        assert list(corpus.splits()) == list(SPLITS)
        assert all(next(corpus.examples(split)).turns for split in SPLITS)


MISSING = [
    ("prosocial_path", "ProsocialDialog", "huggingface.co/datasets/allenai", "PROSOCIAL_PATH"),
    ("dailydialog_path", "DailyDialog", "yanran.li/dailydialog", "DAILYDIALOG_PATH"),
    ("topical_chat_path", "Topical-Chat", "github.com/alexa/Topical-Chat", "TOPICAL_CHAT_PATH"),
    ("persona_chat_path", "PersonaChat", "parl.ai/downloads/convai2", "PERSONA_CHAT_PATH"),
    ("wizard_path", "Wizard of Wikipedia", "parl.ai/projects/wizard", "WIZARD_PATH"),
    ("empathetic_path", "EmpatheticDialogues", "facebookresearch/Emp", "EMPATHETIC_PATH"),
    ("blended_path", "BlendedSkillTalk", "parl.ai/projects/bst", "BLENDED_PATH"),
]


@pytest.mark.parametrize("given, corpus, home, setting", MISSING)
def test_a_missing_corpus_is_named(given, corpus, home, setting):
    """Oracle: by hand: the corpus, its publisher's page, the path and the setting, no other's."""
    paths = {**PATHS, "prosocial_path": "tasks/sample/prosocial", given: "/nowhere"}
    prosocial = paths.pop("prosocial_path")
    data = families.ProstData(**paths)
    with pytest.raises(DataError) as error:
        check(["train"], "prost", prosocial_path=prosocial, prost=data)
    text = str(error.value)
    assert text.startswith(f"{corpus}") and home in text and "/nowhere: no data for split" in text
    assert error.value.settings == (setting,)
    # A rate of 0 leaves the corpus out.
    task = TASKS[[row[0] for row in MISSING].index(given)]
    check(["train"], "prost", prosocial_path=prosocial, prost=data, rates={task: 0})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rates": {"prost_wizzard": 1}}, "expected numbers from 0"),
        ({"source": "tfds", "tfds_data_dir": "x"}, "not 'prost'"),
        ({"vocabulary_path": "tasks/sample/vocabulary.model"}, "no rows for Prost's marks"),
    ],
)
def test_bad_settings(settings, words):
    """Oracle: by hand."""
    with pytest.raises(DataError, match=words):
        check(["train"], "prost", prost=families.ProstData(**PATHS), **settings)


def test_an_unknown_variant():
    """Oracle: by hand: the words that are known, and the setting."""
    with pytest.raises(DataError, match="'response_only'") as error:
        families.ProstData(variant="rots")
    assert error.value.settings == ("PROST_VARIANT",)


def test_the_mixture_has_the_papers_rates():
    """Oracle: appendix B.3's weights; a rate of 0 leaves a task out. Inputs end in the end id."""
    seqio = pytest.importorskip("seqio")
    data = families.ProstData(**PATHS)
    paths = {"prosocial_path": "tasks/sample/prosocial", "vocabulary_path": VOCABULARY}
    rates = {"prost_wizard": 0}
    mixtures.use(
        "prost", prost=data, rates=rates, token_metrics=False, shuffle_buffer_size=50, **paths
    )
    mixture = seqio.get_mixture_or_task("prost")
    expected = {**families.MIXTURES["prost"]}
    del expected["prost_wizard"]
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == expected
    lengths = {"inputs": 128, "targets": 128}
    dataset = mixture.get_dataset(lengths, "train", shuffle=True, seed=1, num_epochs=None)
    for row in dataset.take(50).as_numpy_iterator():
        assert len(row["inputs"]) <= 128 and row["inputs"][-1] == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_has_the_texts_of_its_examples(variant):
    """Oracle: the examples, and the pure functions that make their texts; both variants."""
    seqio = pytest.importorskip("seqio")
    data = families.ProstData(**PATHS, variant=variant)
    paths = {"prosocial_path": "tasks/sample/prosocial", "vocabulary_path": VOCABULARY}
    mixtures.use("prost", prost=data, token_metrics=False, **paths)
    corpora = families.prost_corpora("tasks/sample/prosocial", data)
    for name in ("prost_prosocial", "prost_wizard"):
        rows = seqio.get_mixture_or_task(name).get_dataset(None, "test", shuffle=False)
        examples = list(corpora[name].examples("test"))
        for row, example in zip(rows.as_numpy_iterator(), examples, strict=True):
            assert row["id"].decode() == example.id
            assert row["inputs_pretokenized"].decode() == "  ".join(example.turns)
            assert row["targets_pretokenized"].decode() == target_text(example, variant)
