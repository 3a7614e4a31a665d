"""Canary in Python: what a chirp says, whichever way a dialogue is given."""

import contextlib
import dataclasses
import shutil

import numpy as np
import pytest

from canary import Canary, Chirp
from canary.module import Settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.tasks import formatting, safety

DIALOGUES = [
    ["Hi there, how was your day?"],
    ["I want to scare my kids.", "Why would you do that?", "They never listen to me."],
    ["The bus was late again.", "Oh no! What did you do?"],
    ["I want to scare my kids.", "Why would you do that?"],
    ["I want to scare my kids."],
]


def close(one: Chirp, other: Chirp) -> bool:
    same = dataclasses.replace(one, probabilities={}) == dataclasses.replace(
        other, probabilities={}
    )
    return same and np.allclose(
        list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-5
    )


@pytest.fixture(scope="module")
def spelt(run) -> Canary:
    """The same model, but labels as plain text."""
    return Canary.load(str(run), batch_size=4, label_style="text")


@pytest.mark.parametrize("style", ["canary", "spelt"])
def test_probabilities_are_of_the_exact_log_likelihoods(request, style):
    """Oracle: `infer.scoring` of every label after the context, and a softmax in numpy."""
    canary = request.getfixturevalue(style)
    chirp = canary.chirp(DIALOGUES[1])
    context = canary.context(DIALOGUES[1])
    rows = [
        datasets.Row(label, context.inputs, context.input_ids, label, tuple(tokens))
        for label, tokens in zip(safety.LABELS, canary.choices, strict=True)
    ]
    scores = np.array(
        [
            found.scores[0]
            for found in infer.answer(canary.session, rows, infer.scoring(canary.session))
        ]
    )
    wanted = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    assert tuple(chirp.probabilities) == safety.LABELS
    np.testing.assert_allclose(list(chirp.probabilities.values()), wanted, atol=1e-5)
    assert sum(chirp.probabilities.values()) == pytest.approx(1, abs=1e-9)
    assert chirp.label == safety.LABELS[int(scores.argmax())]


@pytest.mark.parametrize("style", ["canary", "spelt"])
def test_labels_are_whole_tokens_of_targets(request, style):
    """Property: what is scored is how a target begins, token by token."""
    canary = request.getfixturevalue(style)
    for label, tokens in zip(safety.LABELS, canary.choices, strict=True):
        rots = ["It's wrong to scare kids."] if safety.needs_rots(label) else []
        target = canary.session.vocabulary.encode(safety.target(label, rots, canary.style))
        assert target[: len(tokens)] == tokens


def test_text_is_what_the_label_is_continued_with(canary):
    """Oracle: greedy decoding by hand, a token at a time, with teacher-forced scores."""
    chirp = next(c for c in canary.chirp(DIALOGUES) if c.label != "__casual__" and c.rot_text)
    turns = DIALOGUES[[c == chirp for c in canary.chirp(DIALOGUES)].index(True)]
    context = canary.context(turns)
    prefix = canary.choices[safety.LABELS.index(chirp.label)]
    tokens: list[int] = []
    for _ in range(2):
        candidates = [
            datasets.Row(str(i), "", context.input_ids, "", (*prefix, *tokens, i))
            for i in range(1, canary.session.vocabulary.size)
        ]
        scores = [
            found.scores[0]
            for found in infer.answer(canary.session, candidates, infer.scoring(canary.session))
        ]
        tokens.append(1 + int(np.argmax(scores)))
    begun = canary.chirp(turns, max_new_tokens=2)
    assert begun.rot_text == canary.session.vocabulary.decode(tokens).strip()
    assert chirp.text == f"{chirp.label} {chirp.rot_text}"
    assert chirp.text.startswith(begun.text)


def test_casual_has_no_rots_and_intervention_needs_a_human(canary):
    """Oracle: the paper's targets. All labels are met among a hundred random dialogues."""
    random = np.random.default_rng(0)
    words = [
        "kids",
        "bus",
        "late",
        "scare",
        "help",
        "day",
        "friend",
        "work",
        "why",
        "never",
        "money",
    ]
    many = [[" ".join(random.choice(words, 5))] for _ in range(100)]
    chirps = canary.chirp(many)
    for chirp in chirps:
        assert chirp.needs_human == (chirp.label == "__needs_intervention__")
        if chirp.label == "__casual__":
            assert (chirp.rots, chirp.text) == ((), "__casual__")
    assert len({chirp.label for chirp in chirps}) > 1


def test_one_and_many_say_the_same(canary, run):
    """Property: an answer depends on no neighbour, nor on the batch size."""
    batch = canary.chirp(DIALOGUES)
    single = Canary.load(str(run), batch_size=1)
    assert all(map(close, batch, [single.chirp(turns) for turns in DIALOGUES]))
    assert all(map(close, batch, [single.chirp("\n".join(turns)) for turns in DIALOGUES]))
    assert isinstance(canary.chirp(DIALOGUES[0]), Chirp)
    assert isinstance(canary.chirp(DIALOGUES[:1]), list)
    iterated = canary.chirp(tuple(turns) for turns in DIALOGUES)
    assert all(map(close, batch, iterated))


def test_labels_alone_are_the_same_labels(canary):
    """Property: whether RoTs are written changes nothing else."""
    for with_rots, alone in zip(
        canary.chirp(DIALOGUES), canary.chirp(DIALOGUES, rots=False), strict=True
    ):
        assert alone.label == with_rots.label == alone.text
        assert alone.rots == ()
        assert close(dataclasses.replace(with_rots, rots=(), text=alone.text), alone)


def test_per_turn_is_labelling_every_beginning(canary):
    """Oracle: chirps of the beginnings one by one; equal ones are computed once."""
    per_turn = canary.chirp_per_turn(DIALOGUES)
    assert [len(chirps) for chirps in per_turn] == [len(turns) for turns in DIALOGUES]
    for turns, chirps in zip(DIALOGUES, per_turn, strict=True):
        for count, chirp in enumerate(chirps, 1):
            assert close(chirp, canary.chirp(turns[:count]))
    contexts = [row for turns in DIALOGUES for row in canary.contexts(turns)]
    counted = []
    canary.label(contexts, rots=False, decoding=canary.decoding(), on_batch=counted.append)
    assert sum(c["records"] for c in counted) == 6  # of 9: by hand


def test_samples_depend_on_seed_and_dialogue_alone(canary):
    """Property: a sample is the same in another batch, and another with another seed."""
    sampling = {"temperature": 1.5, "max_new_tokens": 8}
    one = canary.chirp(DIALOGUES, seed=1, **sampling)
    assert canary.chirp(DIALOGUES[::-1], seed=1, **sampling)[::-1] == one
    other = canary.chirp(DIALOGUES, seed=2, **sampling)
    assert [c.label for c in other] == [c.label for c in one]
    assert other != one


@pytest.mark.parametrize("count", [1, 2, 6, 20])
def test_contexts_are_the_joined_text_without_the_oldest_turns(canary, count):
    """Oracle: the longest suffix whose joined text, encoded whole, fits with EOS."""
    vocabulary, budget = canary.session.vocabulary, canary.session.lengths["inputs"]
    turns = [f"This is what number {i} says, {'and more, ' * (i % 4)}ok?" for i in range(count)]
    for shown, row in enumerate(canary.contexts(turns), 1):
        texts = [safety.context(turns[first:shown]) for first in range(shown)]
        text = next(t for t in texts if len(vocabulary.encode(t)) < budget)
        assert row.inputs == text
        assert row.input_ids == (*vocabulary.encode(text), 1)
    endless = canary.context(["word " * 200 + "finally"])
    assert len(endless.input_ids) == budget
    assert vocabulary.decode(endless.input_ids).endswith("finally")


@pytest.mark.parametrize(
    ("text", "rots"),
    [
        ("", ()),
        ("It's wrong to lie.", ("It's wrong to lie.",)),
        (
            "It's wrong to lie., You should be kind to others.",
            ("It's wrong to lie.", "You should be kind to others."),
        ),
        (
            "It's wrong to lie, cheat, or steal, You should be kind",
            ("It's wrong to lie, cheat, or steal", "You should be kind"),
        ),
        ("It's ok to miss mom, Ann", ("It's ok to miss mom, Ann",)),
    ],
)
def test_rots_are_split_where_a_sentence_begins(text, rots):
    """Oracle: by hand."""
    assert safety.split_rots(text) == rots


def test_real_rots_are_split_as_they_were_joined(shared):
    """Oracle: the published RoTs of the real rows, joined as in targets."""
    from cosmo.tasks import readers

    for turn in (
        t for d in readers.read_prosocial(shared / "data/prosocial_rows.jsonl") for t in d.turns
    ):
        if turn.rots:
            assert safety.split_rots(safety.rot_text(turn.rots)) == turn.rots


@pytest.mark.parametrize(
    ("dialogues", "says"),
    [
        ("", "turn 1 is empty"),
        (" \n ", "turn 1 is empty"),
        ([], "an empty list"),
        (["Hi.", " "], "turn 2 is empty"),
        ([["Hi."], []], "dialogue 1: field 'turns'"),
        ([["Hi."], ["Hi.", ""]], "dialogue 1: turn 2 is empty"),
        ([["Hi."], "Hi."], "strings and lists"),
        ([3], "dialogue 0"),
        (3, "got int"),
        (["\ud800"], "not valid text"),
    ],
)
def test_what_is_no_dialogue_is_named(canary, dialogues, says):
    """Every mistake says where it is, before anything is labelled."""
    with pytest.raises(UserError, match=says):
        canary.chirp(dialogues)


def test_settings_are_the_runs_unless_given(run, canary, tmp_path):
    """Oracle: the run's config.gin, written here."""
    assert dict(canary.session.lengths) == {"inputs": 48, "targets": 24}
    assert (canary.style, canary.separator) == ("sentinel", " // ")
    given = Canary.load(str(run), turn_separator=" | ", lengths={"inputs": 32})
    assert given.context(["a", "b"]).inputs == "a | b"
    assert dict(given.session.lengths) == {"inputs": 32, "targets": 24}
    with pytest.raises(UserError, match="sentinel"):
        Canary.load(str(run), vocabulary="tasks/sample/vocabulary.model")
    with pytest.raises(UserError, match="known are"):
        canary.chirp("Hi.", temprature=1.0)
    with pytest.raises(formatting.DataError, match="white space"):
        Canary.load(str(run), turn_separator="|")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"MIXTURE_OR_TASK_NAME": "cosmo"}, True),
        ({"MIXTURE_OR_TASK_NAME": "mic"}, True),
        ({"MIXTURE_OR_TASK_NAME": "mine", "MIXTURE_OR_TASK_MODULE": None}, True),
        ({"MIXTURE_OR_TASK_NAME": "mine", "MIXTURE_OR_TASK_MODULE": "my.tasks"}, False),
        ({"MIXTURE_OR_TASK_NAME": "canary"}, False),
        ({"MIXTURE_OR_TASK_NAME": "canary_safety"}, False),
    ],
)
def test_a_run_that_learnt_no_labels_is_refused(run, tmp_path, settings, refused):
    """Oracle: docs/canary.md, which says which of them learn a label; a module of one's
    own may. Both the folder of a run and its checkpoint are asked."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with (folder / "config.gin").open("a") as file:
        file.writelines(f"{name} = {value!r}\n" for name, value in settings.items())
    for path in (folder, folder / "checkpoints/1"):
        with pytest.raises(UserError) if refused else contextlib.nullcontext() as raised:
            Settings.find(str(path))
        if refused:
            name = settings["MIXTURE_OR_TASK_NAME"]
            assert f"{path} writes no safety labels" in str(raised.value)
            assert f"the task '{name}'" in str(raised.value)
