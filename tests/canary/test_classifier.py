"""Classifiers of one word. Oracles: transformers' own logits, a stub by hand, `words_of`."""

import json
import shutil
import sys
import types

import pytest

from canary import classifier
from cosmo.engine.base.errors import UserError
from cosmo.tasks import goemotions, toxichat
from tools import emotions


def folder_of(path, labels):
    """A folder whose config.json describes a sequence classifier."""
    path.mkdir()
    found = {"architectures": ["BertForSequenceClassification"], "id2label": labels}
    (path / "config.json").write_text(json.dumps(found))
    return str(path)


def test_a_pipeline_joins_turns_and_names_words(tmp_path, monkeypatch):
    """Oracle: by hand: turns between the tokenizer's separator, labels whatever their case."""
    asked = []

    def run(texts):
        asked.extend(texts)
        return [{"label": "Agree", "score": 0.9} for _ in texts]

    tokenizer = types.SimpleNamespace(sep_token=None, eos_token="<end>")
    stub = types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda path, **_: tokenizer),
        pipeline=lambda kind, **_: run,
    )
    monkeypatch.setitem(sys.modules, "transformers", stub)
    path = folder_of(tmp_path / "hf", {"0": "Agree", "1": "DISAGREE", "2": "neutral"})
    model = classifier.load(path, toxichat.STANCE, batch_size=4)
    assert model.words_of([("I lie.", "You lie."), ("Hi.",)]) == ["agree", "agree"]
    assert asked == ["I lie.<end>You lie.", "Hi."]
    assert model.words_of([]) == []


def test_a_classifier_with_other_labels_is_refused(tmp_path):
    """Oracle: the label and the words that are wanted, in one error."""
    path = folder_of(tmp_path / "hf", {"0": "safe", "1": "LABEL_1"})
    with pytest.raises(UserError, match=r"label 'LABEL_1', expected the words safe, offensive"):
        classifier.load(path, toxichat.OFFENSE)


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    """Oracle: the command that installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = folder_of(tmp_path / "hf", {"0": "safe", "1": "offensive"})
    with pytest.raises(UserError, match=r"pip install 'cosmo-dialogue\[hf\]'"):
        classifier.load(path, toxichat.OFFENSE)


def test_a_real_classifier_of_transformers(tmp_path):
    """Oracle: the largest logit of the model itself; a long dialogue loses its oldest turns."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "why", "never"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    # By keyword for each version: transformers 5 takes the vocabulary itself.
    tokenizer = transformers.BertTokenizerFast(
        vocab={piece: number for number, piece in enumerate(pieces)},
        vocab_file=str(tmp_path / "vocab.txt"),
        model_max_length=16,
    )
    torch.manual_seed(0)
    words = classifier.WORDS[toxichat.STANCE]
    settings = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, initializer_range=2.0,
        id2label=dict(enumerate(words)), label2id={word: n for n, word in enumerate(words)},
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(settings).eval()
    folder = tmp_path / "hf"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dialogues = [("yes", "no"), ("why", "never"), ("never",), ("no",) * 30 + ("yes", "why")]
    model = classifier.load(str(folder), toxichat.STANCE)
    found = model.words_of(dialogues)
    numbers = {piece: number for number, piece in enumerate(pieces)}
    for turns, word in zip(dialogues, found, strict=True):
        ids = [n for turn in turns for n in (numbers[turn], numbers["[SEP]"])][:-1]
        ids = [numbers["[CLS]"], *ids[-14:], numbers["[SEP]"]]
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0]
        assert word == words[int(logits.argmax())], turns


def test_emotions_of_a_corpus_by_a_checkpoint(run, tmp_path, capsys):
    """Oracle: the same words as `words_of`; the tables read the file as it is."""
    folder = shutil.copytree(run, tmp_path / "emotions")
    (folder / "config.gin").write_text(
        "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 8}\n"
        f"MIXTURE_OR_TASK_NAME = '{goemotions.TASK}'\n"
    )
    corpus, out = tmp_path / "turns.jsonl", tmp_path / "out.jsonl"
    corpus.write_text(json.dumps({"turns": ["Hello.", "Why not?", "I am glad."]}) + "\n")
    command = [f"--corpus={corpus}", f"--utterances={out}", f"--classifier={folder}"]
    assert emotions.main(command) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    model = classifier.load(str(folder), goemotions.TASK)
    wanted = model.words_of([(line["text"],) for line in lines])
    assert [line["label"] for line in lines] == wanted and len(lines) == 3
    assert emotions.main(["--labels", str(out)]) == 0
    assert "figure 3" in capsys.readouterr().out
    assert emotions.main(["--labels", str(out), f"--classifier={folder}"]) == 1
    assert "--classifier labels the utterances of --corpus" in capsys.readouterr().err
