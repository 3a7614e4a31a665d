"""Canary's SeqIO tasks. Oracles: the pure functions of tasks.safety, real rows, SeqIO itself."""

import csv
import itertools
import json
import logging

import numpy as np
import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import families, metrics, mixtures, safety
from cosmo.tasks.conversations import read_dailydialog
from cosmo.tasks.families import canary_file_examples, casual_file_examples
from cosmo.tasks.formatting import drop_oldest_turns
from cosmo.tasks.vocabularies import load
from tests import lazily
from tests.tasks.tasks_samples import prosocial_row, write_lines

seqio = lazily.importorskip("seqio")

SAMPLE = "tasks/sample/vocabulary.model"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Small corpora in the publishers' formats, and the arguments of `use` that name them."""
    folder = tmp_path_factory.mktemp("canary")
    header = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
    openers = {"free_turker_utterance": "hi", "guided_turker_utterance": "hello"}
    chemistry, mic = [], []
    for split in SPLITS:
        rows = [prosocial_row(i, j) for i in range(4) for j in range(3)]
        write_lines(folder / f"prosocial/{split}.jsonl", rows)
        (folder / f"dialogues_{split}.txt").write_text("hello __eou__ my friend __eou__\n" * 3)
        lines = "".join(f"c{i},1,proud,p,1,hello my friend,5|5|5_5|5|5,\n" for i in range(3))
        (folder / "ed").mkdir(exist_ok=True)
        (folder / f"ed/{split}.csv").write_text(header + lines)
        (folder / "bst").mkdir(exist_ok=True)
        (folder / f"bst/{split}.json").write_text(json.dumps([{**openers, "dialog": []}] * 3))
        write_lines(folder / f"toxichat/{split}.jsonl", [_toxichat_row()] * 3)
        _table(folder / f"sbic/{split}.csv", [{"post": "hello", "offensiveYN": 1}], ",")
        (folder / "goemotions").mkdir(exist_ok=True)
        (folder / f"goemotions/{split}.tsv").write_text("hello\t17\tid\nwhy\t7,26\tid\n")
        chemistry.append({"split": split, "rot-bad": 0, "situation": "s", "rot": "r"})
        mic.append({"Q": "q", "A": "a", "rot": "r", "split": split})
        for names in families.NORM_BANK.values():
            row = {"inputs": "[moral_single]: x", "targets": "[class]1[/class] [text]y[/text]"}
            _table(folder / f"bank/{split}.{names[0]}.tsv", [row], "\t")
    _table(folder / "social.tsv", [{**r, "rot-id": i} for i, r in enumerate(chemistry)], "\t")
    _table(folder / "MIC.csv", mic, ",")
    data = families.CanaryData(
        dailydialog_path=folder,
        empathetic_path=folder / "ed",
        blended_path=folder / "bst",
        social_chemistry_path=folder / "social.tsv",
        mic_path=folder / "MIC.csv",
        norm_bank_path=folder / "bank",
        toxichat_path=folder / "toxichat",
        sbic_path=folder / "sbic",
        goemotions_path=folder / "goemotions",
    )
    return {"prosocial_path": folder / "prosocial", "canary": data}


def _toxichat_row():
    first = {"turn_id": 1, "text": "hello", "offense_label": "Safe"}
    second = {**first, "turn_id": 2, "stance_label_towards_turn_1": "Agree"}
    return {"reddit_thread": [first, second]}


def _table(path, rows, delimiter):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _rows(name, lengths, split="validation"):
    task = seqio.get_mixture_or_task(name)
    return list(task.get_dataset(lengths, split, shuffle=False, seed=0).as_numpy_iterator())


@pytest.mark.parametrize(("inputs", "style"), [(24, "sentinel"), (64, "text"), (400, "text")])
def test_ids_equal_the_pure_text_of_real_rows(shared, tmp_path, t5_vocabulary, style, inputs):
    """Oracle: T5's vocabulary on `safety.context` with a budget, and on `safety.target`.

    24 tokens are fewer than the latest utterance has: its front is cut.
    """
    prosocial = shared / "data/prosocial_rows.jsonl"
    daily = tmp_path / "validation.txt"
    with (shared / "data/dailydialog_validation.txt").open(encoding="utf-8") as file:
        daily.write_text("".join(itertools.islice(file, 40)), encoding="utf-8")
    daily = {"validation": daily}
    vocabulary, lengths = load(t5_vocabulary), {"inputs": inputs, "targets": 40}

    def count(text):
        return len(vocabulary.encode(text))

    mixtures.use(
        "canary",
        vocabulary_path=t5_vocabulary,
        separators=safety.SEPARATORS,
        prosocial_path=prosocial,
        canary=families.CanaryData(dailydialog_path=daily, label_style=style),
    )
    expected = {
        f"canary_{kind}": canary_file_examples(prosocial, "validation", kind, style)
        for kind in safety.KINDS
    }
    expected["canary_dailydialog"] = casual_file_examples(
        read_dailydialog, daily, "validation", style
    )
    for name, examples in expected.items():
        rows, examples = _rows(name, lengths), list(examples)
        assert [row["id"].decode() for row in rows] == [example.id for example in examples]
        for row, example in zip(rows, examples, strict=True):
            kept = drop_oldest_turns("", "", example.turns, inputs, count, safety.SEPARATORS)
            text = safety.context(kept)
            assert row["inputs_pretokenized"].decode() == text
            ids = vocabulary.encode(text)[-(inputs - 1) :]
            assert row["inputs"].tolist() == [*ids, vocabulary.eos_id]
            assert row["targets_pretokenized"].decode() == example.response
            ids = vocabulary.encode(example.response)[:39]
            assert row["targets"].tolist() == [*ids, vocabulary.eos_id]


def _renamed(corpora):
    return {"prosocial_path": corpora["prosocial_path"], "data": corpora["canary"]}


def test_every_task_reads_every_split(corpora):
    """Oracle: the fixture's records by hand."""
    mixtures.use("canary", vocabulary_path=SAMPLE, **corpora)
    counts = {
        "canary_prosocial": 12,
        "canary_safety": 12,
        "canary_rot": 12,
        "canary_dailydialog": 6,
        "canary_empathetic": 3,
        "canary_blended": 6,
        "social_chemistry": 1,
        "mic": 1,
        "norm_bank_free_form": 1,
        "norm_bank_yes_no": 1,
        "norm_bank_relative": 1,
        "toxichat_stance": 3,
        "toxichat_offense": 6,
        "sbic_offense": 1,
        "goemotions": 3,
    }
    assert set(counts) == set(families.CANARY)
    read = families.canary_corpora(**_renamed(corpora))
    for name, count in counts.items():
        assert seqio.get_mixture_or_task(name).splits == SPLITS, name
        for split in SPLITS:
            assert len(list(read[name].examples(split))) == count, (name, split)
    for name in ("canary_empathetic", "social_chemistry", "norm_bank_relative"):
        assert len(_rows(name, None)) == counts[name]
    assert _rows("canary_empathetic", None)[0]["targets_pretokenized"] == b"__casual__"
    assert _rows("toxichat_stance", None)[0]["targets_pretokenized"] == b"agree"
    assert _rows("sbic_offense", None)[0]["targets_pretokenized"] == b"offensive"
    assert _rows("goemotions", None)[0]["targets_pretokenized"] == b"joy"
    assert _rows("canary_rot", None)[0]["targets_pretokenized"] == b"It's wrong to be rude."
    assert _rows("canary_safety", None)[0]["targets_pretokenized"] == b"__needs_caution__"


def test_the_mixture_is_four_to_one(corpora):
    """Oracle: 4:1:1:1, counted in 700 examples, within four standard errors."""
    mixtures.use("canary", vocabulary_path=SAMPLE, **corpora)
    mixture = seqio.get_mixture_or_task("canary")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == families.MIXTURES["canary"]
    dataset = mixture.get_dataset(None, "train", shuffle=False, seed=1, num_epochs=None)
    rows = [row["targets"].tolist() for row in dataset.take(700).as_numpy_iterator()]
    casual = [*load(SAMPLE).encode("__casual__"), 1]
    share = np.mean([targets != casual for targets in rows])  # no exchange of these is casual
    assert abs(share - 4 / 7) < 4 * np.sqrt(4 / 7 * 3 / 7 / 700)
    # Rates may leave a corpus out: its path is then not looked at.
    given = {"canary_blended": 0.0}
    mixtures.use("canary", vocabulary_path=SAMPLE, rates=given, **corpora)
    assert {t.name for t in seqio.get_mixture_or_task("canary").tasks} == set(rates) - set(given)
    mixtures.use("norm_bank", vocabulary_path=SAMPLE, **corpora)
    assert len(seqio.get_mixture_or_task("norm_bank").tasks) == 3


def test_missing_rots_are_counted_or_an_error(tmp_path, caplog):
    """Oracle: two rows by hand, the first on line 2; the label alone needs no RoT."""
    rows = [prosocial_row(i, 0, rots=rots, done=True) for i, rots in enumerate((["A"], None, []))]
    path = write_lines(tmp_path / "train.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert len(list(canary_file_examples(path, "train"))) == 1
    assert "2 exchanges are not used" in caplog.text
    assert f"the first: {path}:2;" in caplog.text
    assert len(list(canary_file_examples(path, "train", "safety", missing_rots="error"))) == 3
    with pytest.raises(DataError, match=r"train\.jsonl:2: field 'rots' is null or empty"):
        list(canary_file_examples(path, "train", missing_rots="error"))


def test_a_dialogue_without_its_beginning_is_not_used(tmp_path, caplog):
    """Oracle: by hand: dialogue 0 lacks its first response."""
    rows = [prosocial_row(0, 1), prosocial_row(0, 2, done=True), prosocial_row(1, 0, done=True)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        examples = list(canary_file_examples(path, "train"))
    assert [e.id for e in examples] == ["prosocial-train-1-0"]
    assert "1 incomplete dialogues are not used" in caplog.text


def test_evaluator_of_seqio_runs_the_metrics(corpora):
    """Oracle: a model that answers the targets has accuracy, BLEU and F1 of 1."""
    mixtures.use("canary", vocabulary_path=SAMPLE, token_metrics=False, **corpora)
    evaluator = seqio.Evaluator(
        "canary_prosocial",
        seqio.EncDecFeatureConverter(pack=False),
        "validation",
        sequence_length={"inputs": 128, "targets": 64},
    )

    def predict(dataset, *_):
        rows = dataset.as_numpy_iterator()
        return [(int(i), row["decoder_target_tokens"].tolist()) for i, row in rows]

    future, _ = evaluator.evaluate(
        compute_metrics=True, predict_fn=predict, score_fn=lambda *_: [], step=0
    )
    assert future.result()["canary_prosocial"] == {
        "label_accuracy": 1.0,
        "class_accuracy": 1.0,
        "label_written": 1.0,
        "rot_bleu4": pytest.approx(1.0),
        "rot_f1": 1.0,
        "rot_examples": 12.0,
    }


def test_label_metrics_by_hand():
    """Oracle: four answers by hand, in both label styles."""
    golds = ["__casual__", "__needs_caution__ be kind", "<extra_id_96> be good", "__casual__"]
    texts = ["__casual__ be kind", "__probably_needs_caution__ be kind", "<extra_id_96> be", "hi"]
    assert metrics.label_accuracy(golds, texts) == {
        "label_accuracy": 0.5,
        "class_accuracy": 0.75,
        "label_written": 0.75,
    }
    overlap = metrics.rot_overlap(golds, texts)
    assert overlap["rot_examples"] == 2.0
    assert overlap["rot_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.rot_overlap(["__casual__"], ["x"]) == {"rot_examples": 0.0}
    with pytest.raises(ValueError, match="without a safety label"):
        metrics.label_accuracy(["be kind"], ["__casual__"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"canary": {"label_style": "emoji"}}, "LABEL_STYLE"),
        ({"canary": {"missing_rots": "guess"}}, "MISSING_ROTS"),
        ({"canary": {"label_style": "sentinel"}}, "does not hold the label '<extra_id_95>'"),
        ({"rates": {"soda": 1.0}}, "MIXTURE_RATES"),
        ({"rates": dict.fromkeys(families.MIXTURES["canary"], 0.0)}, "MIXTURE_RATES"),
        ({"source": "tfds", "tfds_data_dir": "x"}, "use.source"),
    ],
)
def test_impossible_settings(settings, words):
    """Oracle: the gin name, or the label, in the error (the vocabulary has no sentinels)."""
    with pytest.raises(DataError, match=words):
        mixtures.use(
            "canary",
            vocabulary_path=SAMPLE,
            **{
                key: families.CanaryData(**value) if key == "canary" else value
                for key, value in settings.items()
            },
        )
