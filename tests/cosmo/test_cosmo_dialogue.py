"""`cosmo.load`: the same answers as the command line, in Python."""

import json

import pytest

import cosmo
from cosmo.__main__ import main
from cosmo.engine.base.errors import UserError

RECORDS = [
    {"id": "a", "narrative": "Ann lost her key.", "turns": ["Hi Ann!", "I lost my key."]},
    {"id": "b", "turns": ["What is for dinner?"], "response": "Soup, I think."},
    {"id": "c", "turns": ["You look happy.", "I am!", "Why is that?"], "response": "I won."},
]


@pytest.fixture(scope="module")
def model(trained):
    """The run that the tests of the verbs share, loaded."""
    return cosmo.load(str(trained), batch_size=2)


def on_command_line(trained, tmp_path, *flags):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    output = tmp_path / "answers.jsonl"
    code = main(
        ["infer", f"--gin.MODEL_DIR={trained}", f"--input={tmp_path}/records.jsonl",
         f"--output={output}", "--batch_size=2", "--quiet", *flags]
    )  # fmt: skip
    assert code == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "num_samples": 2, "seed": 3},
        {"beam_size": 2, "length_penalty": 1.0},
    ],
    ids=["greedy", "sampling", "beam"],
)
def test_generates_what_infer_does(model, trained, tmp_path, sampling):
    """Oracle: `python -m cosmo infer` with the same settings."""
    flags = [f"--{name}={value}" for name, value in sampling.items()]
    lines = on_command_line(trained, tmp_path, *flags)
    replies = model.generate(RECORDS, max_new_tokens=8, **sampling)
    assert [r.text for r in replies] == [line["prediction"] for line in lines]
    assert [r.score for r in replies] == pytest.approx([line["score"] for line in lines])
    for reply, line in zip(replies, lines, strict=True):
        assert list(reply.texts) == line.get("predictions", [line["prediction"]])
        assert reply.text == reply.texts[0]


def test_scores_what_infer_does(model, trained, tmp_path):
    """Oracle: `infer --mode=score`; the perplexity by hand."""
    lines = on_command_line(trained, tmp_path, "--mode=score")
    scores = model.score(RECORDS[1:])
    assert [s.log_likelihood for s in scores] == pytest.approx([line["score"] for line in lines])
    assert [s.num_tokens for s in scores] == [line["num_tokens"] for line in lines]
    assert scores[0].perplexity == pytest.approx(
        2.718281828 ** (-lines[0]["score"] / lines[0]["num_tokens"])
    )


def test_short_forms_of_a_record(model):
    """Oracle: the record that they are short for."""
    long, turns, text = model.generate(
        [{"turns": ["What is for dinner?"]}, ["What is for dinner?"], "What is for dinner?"],
        max_new_tokens=4,
    )
    assert long.text == turns.text == text.text


def test_settings_of_the_run(model, trained):
    """Oracle: the lengths that the run was trained with; the vocabulary kept in its folder."""
    assert model.session.lengths == {"inputs": 64, "targets": 32}
    assert model.session.vocabulary.path == str(trained / "vocabulary.model")
    assert model.step == 8
    assert model.separators.turn == " <turn> "


@pytest.mark.parametrize(
    ("records", "sampling", "words"),
    [
        ([{"turns": []}], {}, "record 0: field 'turns'"),
        (["fine", 3], {}, "record 1: got int"),
        ("text", {}, "a list of records"),
        (["fine"], {"beams": 3}, "unknown setting 'beams'"),
        (["fine"], {"temperature": -1.0}, "temperature"),
    ],
)
def test_wrong_use_is_one_clear_error(model, records, sampling, words):
    """Oracle: the words of the error."""
    with pytest.raises(UserError, match=words):
        model.generate(records, **sampling)


def test_score_wants_a_response(model):
    """Oracle: the id of the record without one."""
    with pytest.raises(UserError, match="'a'"):
        model.score(RECORDS)


def test_load_says_what_is_missing(tmp_path):
    """Oracle: the words of the error."""
    with pytest.raises(UserError, match="does not exist"):
        cosmo.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="looked for"):
        cosmo.load(str(tmp_path))


def test_import_is_light():
    """`import cosmo` loads no JAX: help pages do without. Oracle: sys.modules."""
    import subprocess
    import sys

    code = "import cosmo, sys; sys.exit('jax' in sys.modules or 'load' not in dir(cosmo))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
