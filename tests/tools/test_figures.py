"""`python -m tools.figures`. Oracles: published numbers by hand; which file is drawn as what."""

import json

import pytest

from tools import emotions, figures

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


def test_published_shares_are_those_of_the_paper():
    """Oracle: figure 5's first pair by hand; each question's three shares add up to 1."""
    found = figures.published_questions("Instruct GPT-3 : Instruct GPT-3 with Canary")
    wanted = {"first": 0.249, "tie": 0.155, "second": 0.596}
    assert found["Overall"]["shares"] == pytest.approx(wanted)
    assert next(iter(found)) == "Prosocial" and len(found) == 5
    for one in found.values():
        assert sum(one["shares"].values()) == pytest.approx(1, abs=0.002)


def test_a_published_figure_has_a_picture_for_each_pair(tmp_path, capsys):
    """Oracle: figure 6 compares two pairs, each in light and dark."""
    assert figures.main(["--paper=6", f"--output={tmp_path}"]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 4
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_stored_json_is_recognised(tmp_path, capsys):
    """Oracle: by hand: a report without ties, emotions, and neither."""
    question = {
        "kind": "comparison", "votes": 4, "counts": {"first": 3, "tie": 0, "second": 1},
        "shares": {"first": 0.75, "tie": 0.0, "second": 0.25},
        "wilson": {"first": [0.3, 0.95], "second": [0.05, 0.7]},
    }  # fmt: skip
    report = {
        "people": {"questions": {"overall": question}}, "models": {}, "systems": ["one", "two"],
    }  # fmt: skip
    counts = emotions.Counter(["joy", "anger", "neutral"])
    files = {"report": report, "mood": emotions.report({"mine": counts}), "other": {"a": 1}}
    for name, made in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    out = tmp_path / "out"
    command = [str(tmp_path / "report.json"), str(tmp_path / "mood.json"), f"--output={out}"]
    assert figures.main(command) == 0
    assert {path.name for path in out.iterdir()} == {"people.png", "people_dark.png", "mood.png"}
    assert all(path.read_bytes().startswith(PNG) for path in out.iterdir())
    capsys.readouterr()
    for name, says in (("other", "nothing to draw"), ("missing", "no JSON")):
        assert figures.main([str(tmp_path / f"{name}.json"), f"--output={out}"]) == 1
        assert says in capsys.readouterr().err
    assert figures.main([f"--output={out}"]) == 1
    assert "give a FILE or --paper" in capsys.readouterr().err
