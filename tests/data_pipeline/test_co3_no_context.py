"""`co3 --no_context`: the baseline of Kim et al. 2023, section 3.3."""

import json

import pytest

from cosmo.tasks.paper_tables import SODA
from data_pipeline import __main__ as command
from data_pipeline.annotation.task_files import read_task
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import distil, prompts
from data_pipeline.co3.postprocess import Settings
from data_pipeline.co3.triples import NoTriples, Triple
from tests.data_pipeline.co3_script import conversation, drive
from tests.data_pipeline.scripted_model import scripted

SETTINGS = Settings(
    prompts=prompts.load(prompts.NO_CONTEXT), no_context=True, ask_commonsense=False
)
EMPTY = Triple("none-0", "", "", "", 0)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_papers_prompt_and_basic_filters():
    """Oracle: section 3.3's prompt, one request; the filters of turns and speakers."""
    record, requests = drive(
        distil.without_context(EMPTY, SETTINGS), [conversation(8, "Person 1", "Person 2")]
    )
    assert [one.prompt for one in requests] == [
        "The following is a long in-depth conversation between two people. \nPerson 1:"
    ]
    assert record.speakers == ("Person 1", "Person 2") * 4
    assert (record.narrative, record.head, record.renamed) == ("", "", True)
    short = conversation(2, "Person 1", "Person 2")
    found, _ = drive(distil.without_context(EMPTY, SETTINGS), lambda request: short)
    assert isinstance(found, Rejected) and found.reason == "fewer than 4 turns"
    three = conversation(6, "Person 1", "Person 2") + "\nCarol: Hello, you two."
    found, _ = drive(distil.without_context(EMPTY, SETTINGS), lambda request: three)
    assert isinstance(found, Rejected) and found.reason == "more than two speakers"


def test_shards_are_the_whole():
    """Oracle: the run of one shard."""
    whole = list(NoTriples(20).read())
    parts = [one for index in (0, 1, 2) for one in NoTriples(20, (index, 3)).read()]
    assert sorted(parts, key=lambda one: one[0]) == whole
    assert sum(NoTriples(20, (index, 3)).count()[0] for index in (0, 1, 2)) == 20


def test_a_run_and_its_pairs(tmp_path, capsys):
    """Oracle: six dialogues asked for, one of them refused; a second start asks nothing."""

    def reply(body):
        number = len(asked_before)
        asked_before.append(body)
        topic = ("", "cats", "trains", "soup", "rain", "chess")[number]
        if not topic:
            return "I'm sorry, I cannot help with that."
        names = ("Person 1", "Person 2")
        return "\n".join(
            f"{names[turn % 2]}: In our talk of {topic} this is turn {turn} of ours."
            for turn in range(8)
        )

    asked_before = []
    out = tmp_path / "out"
    with scripted(reply) as (url, _):
        flags = ["co3", "--no_context", "--limit=6", f"--output={out}", f"--base_url={url}"]
        flags += ["--model=m", "--concurrency=1", "--retries=0", "--no_plots", "--no_parquet"]
        assert command.main(flags) == 0
        count = len(asked_before)
        assert command.main(flags) == 0
        assert len(asked_before) == count
        rows = lines_of(out / "soda.jsonl")
        assert len(rows) == 5 and {row["narrative"] for row in rows} == {""}
        assert [row["reason"] for row in lines_of(out / "rejected.jsonl")] == ["refusal"]
        assert json.loads((out / "report.json").read_text())["corpus"]["lexical_diversity"] > 0
        assert SODA["no_context"]["MTLD without context"] == 63.1
        capsys.readouterr()
        # A folder of the baseline takes no triples.
        triples = tmp_path / "t.jsonl"
        triples.write_text('{"head": "PersonX eats", "relation": "xWant", "tail": "to rest"}\n')
        flags.remove("--no_context")
        assert command.main([*flags, f"--triples={triples}"]) == 1
    assert len(asked_before) == count
    pairs = ["annotate", "pairs", "--preset=SC-nocontext", "--a=tasks/sample/soda", "--quiet"]
    pairs += [f"--b={out}/soda.jsonl", "--items=4", f"--output={tmp_path}/task.jsonl"]
    pairs.append("--systems=SODA,without context")
    assert command.main(pairs) == 0
    assert len(read_task(tmp_path / "task.jsonl").items) == 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --triples, or --no_context"),
        (["--no_context"], "needs --limit"),
        (["--no_context", "--limit=5", "--triples=x"], "goes without --triples"),
        (["--no_context", "--limit=5", "--as_published"], "goes without --as_published"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, says):
    """Oracle: exit code 1 and the flag, before any call."""
    base = ["co3", f"--output={tmp_path}/out", "--base_url=http://127.0.0.1:9/v1", "--model=m"]
    assert command.main([*base, *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and not (tmp_path / "out").exists()
