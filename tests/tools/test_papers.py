"""`python -m tools.papers`: no result of the papers is without a row, and each command exists."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from cosmo.engine.base import command_line
from tools import papers, show_dialogues

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "canary": "canary.cli.program",
    "canary.prost": "canary.prost.cli.program",
    "cosmo": "cosmo.cli.program",
    "data_pipeline": "data_pipeline.verbs",
}


def commands():
    """Return (result's name, its command) of every result that has one."""
    return [(one.name, one.command) for one in papers.results() if one.command]


def test_every_table_and_figure_has_a_row():
    """Oracle: the numbers of tables and figures in the two papers."""
    found = {one.name for one in papers.results()}
    for paper, tables, figures in (("prosocial", 9, 10), ("soda", 12, 5)):
        for kind, last in (("table", tables), ("figure", figures)):
            wanted = {f"{paper}.{kind}.{number}" for number in range(1, last + 1)}
            assert wanted == {n for n in found if n.startswith(f"{paper}.{kind}.")}


def test_the_captions_of_the_papers(shared):
    """Oracle: the captions in the papers' own text."""
    found = {one.name for one in papers.results()}
    for paper, file in (("prosocial", "prosocialdialog.txt"), ("soda", "soda_cosmo.txt")):
        text = (shared / "papers" / file).read_text()
        for kind, number in re.findall(r"^(Table|Figure) (\d+):", text, re.M):
            assert f"{paper}.{kind.lower()}.{number}" in found


def test_states_are_honest():
    """Oracle: the rules of the file: only pictures and what is not done have no command."""
    for one in papers.results():
        assert one.state in papers.STATES, one.name
        assert bool(one.command) == (one.state not in ("not done", "drawing")), one.name
        if one.state == "computed":
            # Nothing beside what comes with the repository.
            assert not re.search(r"PATH|CKPT|FOLDER|PREDICTIONS|URL", one.command), one.name


def test_the_page_is_up_to_date():
    """Oracle: `python -m tools.papers --markdown`."""
    assert (ROOT / "docs" / "papers.md").read_text() == papers.markdown()


@pytest.mark.parametrize(("name", "command"), commands())
def test_commands_exist(name, command, capsys):
    """Oracle: the program's own parser; for a tool, the flags of its help page."""
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash) == ("python", "-m")
    if module in PROGRAMS:
        program = importlib.import_module(PROGRAMS[module]).PROGRAM
        joined = command_line._joined(program, arguments)
        assert command_line.parse(program, joined)
        return
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {one.split("=")[0] for one in arguments if one.startswith("--")} <= known


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (one.name, one.command)
        for one in papers.results()
        if one.state == "computed" and "dataset_stats" not in one.command  # which has its own tests
    ],
)
def test_computed_ones_run(name, command, tmp_path, monkeypatch, capsys):
    """Oracle: exit code 0 and something printed or written, from the repository alone."""
    monkeypatch.chdir(ROOT)
    _, _, module, *arguments = shlex.split(command)
    arguments = [one.replace("FILE", str(tmp_path / "made")) for one in arguments]
    main = importlib.import_module(
        f"{module}.__main__" if module in PROGRAMS else module
    ).main  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out or list(tmp_path.iterdir())


def test_the_papers_numbers(capsys):
    """Oracle: the papers' own rows."""
    rows = {row[0]: row[1:] for row in papers.numbers(papers.find("soda.table.2"))}
    assert rows["SODA"][:5] == ["1.5M", "11M", "7.6", "16.1", "68.0"]
    rows = papers.numbers(papers.find("prosocial.table.8"))
    assert rows[0][1:3] == ["ProsocialDialog PPL", "ProsocialDialog F1"] and len(rows[0]) == 15
    assert rows[1][:3] == ["GPT-2", "8.30", "29.38"]
    # Each of the twelve comparisons without ties is of one table.
    bounds = [papers.find(f"soda.table.{number}").rows for number in (5, 6, 7, 11)]
    assert [*range(12)] == [row for low, high in bounds for row in range(low, high)]
    assert papers.numbers(papers.find("soda.table.7"))[3] == [
        *("SODA: ChatGPT", "39", "49", "70", "50")
    ]
    rows = {row[0]: row[1:] for row in papers.numbers(papers.find("soda.table.10"))}
    assert rows["Head: Overall"] == ["96.1", "93.0", "94.2"]
    assert papers.main(["--figure=prosocial.5"]) == 0
    assert "57.8" in capsys.readouterr().out


def test_json_and_errors(capsys):
    """Oracle: the number of results; the message lists the names there are."""
    assert papers.main(["--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(papers.results())
    for wrong in ("soda.99", "soda", "else.1", ""):
        code = papers.main([f"--table={wrong}"])
        printed = capsys.readouterr()
        assert (code == 1 and "give one of" in printed.err) or not wrong


def test_show_dialogues(tmp_path, capsys):
    """Oracle: the sample's own row: narrative, speakers; labels and rules of thumb."""
    assert show_dialogues.main(["tasks/sample/soda", "--items=500", "--width=1000"]) == 0
    printed = capsys.readouterr().out
    first = json.loads(Path("tasks/sample/soda/test.jsonl").read_text().splitlines()[0])
    assert f"soda-test-0: {first['narrative']}\n" in printed
    assert f"  {first['speakers'][0]}: {first['dialogue'][0]}\n" in printed
    assert show_dialogues.main(["tasks/sample/prosocial", "--items=500", "--width=1000"]) == 0
    printed = capsys.readouterr().out
    first = json.loads(Path("tasks/sample/prosocial/test.jsonl").read_text().splitlines()[0])
    assert f"  A: {first['context']}\n     {first['safety_label']}\n" in printed
    assert all(f"     RoT: {rot}\n" in printed for rot in first["rots"] or ())
    assert show_dialogues.main(["tasks/sample/dailydialog"]) == 1
    assert show_dialogues.main(["tasks/sample/dailydialog/dialogues_test.txt"]) == 1
    assert "DailyDialog" in capsys.readouterr().err
    assert show_dialogues.main(["tasks/sample/soda", "--items=0"]) == 1
