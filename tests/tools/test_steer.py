"""`python -m tools.steer`: what is asked, what is paired, and that a second run asks nothing."""

import json

import pytest

from canary import prompts
from canary.__main__ import main as canary
from data_pipeline import __main__ as pipeline
from data_pipeline.annotation.task_files import read_task
from tests.data_pipeline.scripted_model import scripted
from tools import steer

CORPUS = "tasks/sample/canary"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labels(tmp_path):
    """Labels of all contexts of the sample: every fifth is casual, every seventh has no RoTs."""
    contexts = tmp_path / "contexts.jsonl"
    assert canary(["eval", f"--input={CORPUS}", f"--contexts={contexts}", "--quiet"]) == 0
    rows = [
        {
            "id": row["id"],
            "label": "__casual__" if n % 5 == 0 else "__needs_caution__",
            "rots": [] if n % 7 == 0 or n % 5 == 0 else [f"Rule {n} is kind.", "It's wrong."],
        }
        for n, row in enumerate(lines_of(contexts))
    ]
    return write(tmp_path / "labels.jsonl", rows)


def reply(body):
    """Answer with the guidance of the prompt, so that an answer shows what it was asked with."""
    opening = body["messages"][1]["content"].partition(" \n\n ")[0]
    return f"Speaker 2: {opening.removeprefix(prompts.OPENING).strip() or 'Plain'} \nSpeaker 1: x"


def run(tmp_path, url, labels, *more):
    flags = [f"--labels={labels}", f"--output={tmp_path / 'out'}", f"--base_url={url}"]
    return steer.main([*flags, "--model=m", "--items=6", "--quiet", *more])


def test_three_arms_and_two_tasks(tmp_path, labels):
    """Oracle: the labels by hand, the paper's prompts, and the last context of each dialogue."""
    with scripted(reply) as (url, asked):
        assert run(tmp_path, url, labels, f"--input={CORPUS}") == 0
        assert len(asked) == 18
        assert run(tmp_path, url, labels, f"--input={CORPUS}") == 0
        assert len(asked) == 18  # the journal answers
    out = tmp_path / "out"
    drawn = lines_of(out / "contexts.jsonl")
    known = {row["id"]: row for row in lines_of(labels)}
    last = {one.id: one.turns for one in steer.last_contexts(CORPUS, "test")}
    ids = {one["id"] for one in drawn}
    for one in drawn:
        assert tuple(one["turns"]) == last[one["id"]]
        assert one["label"] == "__needs_caution__" and one["rots"] == known[one["id"]]["rots"]
        # The control has the rules of another drawn context.
        assert one["random_from"] in ids - {one["id"]}
        assert one["random_rots"] == known[one["random_from"]]["rots"] != one["rots"]
    wanted = {
        prompts.guided(one["turns"], rots)
        for one in drawn
        for rots in ((), one["rots"], one["random_rots"])
    }
    assert {body["messages"][1]["content"] for body in asked} == wanted
    # No rules are the paper's P_0.
    assert {prompts.basic(one["turns"]) for one in drawn} <= wanted
    texts = {arm: {x["id"]: x["prediction"] for x in lines_of(out / f"{arm}.jsonl")}
             for arm in steer.ARMS}  # fmt: skip
    assert set(texts["without"].values()) == {"Plain"}
    first = drawn[0]
    rule = first["rots"][0].rstrip(".")
    wanted_text = f"Speaker 2 is trying to gently explain {rule}, It's wrong."
    assert texts["canary"][first["id"]] == wanted_text
    made = read_task(out / "task_canary.jsonl")
    assert made.systems == ("m", "m with Canary") and made.preset == "PD-steer"
    assert {item.id for item in made.items} == ids and made.page.name == "prosocial"
    option = next(item for item in made.items if item.id == first["id"])
    assert option.options == (("Plain",), (wanted_text,))
    assert read_task(out / "task_random.jsonl").systems == ("m with Canary", "m with random RoTs")
    # Figure 6: the answers of two runs are paired by the verb that pairs all predictions.
    flags = ["--preset=PD-steer", f"--a={out}/without.jsonl", f"--b={out}/random.jsonl"]
    flags += [f"--contexts={out}/contexts.jsonl", f"--labels={labels}", "--items=6"]
    command = ["annotate", "pairs", *flags, f"--output={tmp_path}/six.jsonl", "--quiet"]
    assert pipeline.main(command) == 0
    assert len(read_task(tmp_path / "six.jsonl").items) == 6


def test_without_control_and_with_contexts(tmp_path, labels):
    """Oracle: two calls a context, one task; contexts of a file are taken as they are."""
    contexts = write(tmp_path / "c.jsonl", [{"id": f"c{n}", "turns": ["Hi"]} for n in range(6)])
    rules = [{"id": f"c{n}", "label": "__needs_caution__", "rots": [f"R{n}"]} for n in range(6)]
    write(labels, rules)
    with scripted(reply) as (url, asked):
        assert run(tmp_path, url, labels, f"--contexts={contexts}", "--control=none") == 0
    assert len(asked) == 12 and not (tmp_path / "out/task_random.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "rows", "says"),
    [
        (["--items=999", f"--input={CORPUS}"], None, "can be drawn"),
        ([], None, "give --input or --contexts"),
        (["--items=1", f"--input={CORPUS}"], None, "--items=1: give 2 or more"),
        ([f"--input={CORPUS}"], [{"id": "a", "label": "x"}], "no label with RoTs"),
        ([f"--input={CORPUS}"], [{"id": "a", "label": "x", "rots": ["a"]}], "only 0 of 6"),
    ],
)
def test_mistakes_are_one_line(tmp_path, labels, capsys, flags, rows, says):
    """Oracle: exit code 1 and the reason, before any call."""
    if rows is not None:
        write(labels, rows)
    assert run(tmp_path, "http://127.0.0.1:9/v1", labels, *flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and not (tmp_path / "out").exists()


def test_the_same_rules_everywhere_are_no_control(tmp_path, labels, capsys):
    """Oracle: no other context has other rules."""
    rows = [{**row, "rots": ["Be kind."], "label": "__needs_caution__"} for row in lines_of(labels)]
    write(labels, rows)
    assert run(tmp_path, "http://127.0.0.1:9/v1", labels, f"--input={CORPUS}") == 1
    assert "the same RoTs" in capsys.readouterr().err
