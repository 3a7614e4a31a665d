"""Runs over a real socket with the real client and the scripted teacher."""

import contextlib
import http.server
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zlib

import pytest

from data_pipeline import __main__ as command
from data_pipeline.calls.journal import read_entries
from data_pipeline.calls.outputs import Outputs, Result
from data_pipeline.co3 import prompts
from data_pipeline.co3 import triples as triples_module
from tests.data_pipeline.loopback import (
    co3,
    flags,
    lines,
    outputs,
    stats,
    teacher,
    teacher_process,
    write_triples,
)

COUNT = 35


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    write_triples(path, COUNT)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, triples):
    """The outputs of a run with one call at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with teacher() as (url, _):
        assert co3(triples, folder, url, "--concurrency=1") == 0
    return folder


def test_every_triple_is_a_record_or_a_rejection(undisturbed, triples):
    """Oracle: the triples of the input, in its order."""
    from data_pipeline.co3.schema import SODA_FIELDS

    records, rejected = lines(undisturbed / "soda.jsonl"), lines(undisturbed / "rejected.jsonl")
    assert len(records) + len(rejected) == COUNT and len(records) > 10
    assert all(tuple(row) == SODA_FIELDS for row in records)
    assert all(row["reason"] and row["stage"] for row in rejected)
    assert sorted(row["original_index"] for row in records) == [
        row["original_index"] for row in records
    ]
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["triples"] == COUNT and report["records"] == len(records)
    named = sum(n for reasons in report["rejected"].values() for n in reasons.values())
    assert named == len(rejected)
    assert report["this_start"]["most_at_once"] == 1


@pytest.mark.parametrize("more", [["--concurrency=16"], ["--concurrency=40"]])
def test_order_and_concurrency_change_nothing(tmp_path, undisturbed, triples, more):
    """Oracle: the bytes of the run with one call at a time; slow answers mix the order."""
    with teacher(latency=0.002, misbehave=0.2, kinds=("slow",), slow_seconds=0.05) as (url, taught):
        assert co3(triples, tmp_path, url, *more) == 0
        assert taught.most > 8
    assert outputs(tmp_path) == outputs(undisturbed)


def test_the_same_command_asks_nothing_twice(tmp_path, undisturbed, triples):
    """Oracle: the teacher's count of questions, and the undisturbed bytes."""
    with teacher() as (url, taught):
        assert co3(triples, tmp_path, url, "--limit=5") == 0
        few = taught.counts["completions"]
        assert co3(triples, tmp_path, url) == 0
        asked = taught.counts["completions"]
        assert few < asked == len(taught.seen) + 1  # the probe is asked at each start
        assert co3(triples, tmp_path, url) == 0
        assert taught.counts["completions"] == asked + 1
    assert outputs(tmp_path) == outputs(undisturbed)


def test_misbehaviour_ends_in_records_and_counted_rejections(tmp_path, triples):
    """30% bad answers of all kinds. Oracle: nothing is missing, every reason is counted."""
    manners = dict(misbehave=0.3, retry_after="0.01", slow_seconds=0.05)
    with teacher(**manners) as (url, taught):
        assert co3(triples, tmp_path, url, "--concurrency=16") == 0
        kinds = {name for name, n in taught.counts.items() if name.startswith("misbehaved") and n}
    assert len(kinds) == 8
    records, rejected = lines(tmp_path / "soda.jsonl"), lines(tmp_path / "rejected.jsonl")
    assert len(records) + len(rejected) == COUNT and records
    report = json.loads((tmp_path / "report.json").read_text())
    retries = report["this_start"]["retries"]
    assert retries["retried: too many requests"] and retries["retried: broken answer"]
    assert "error" not in report["rejected"] and report["this_start"]["errors"] == 0


def test_fewer_calls_go_to_a_server_that_refuses_many(tmp_path, undisturbed, triples):
    """It takes four at once. Oracle: the undisturbed bytes; the report, and what was refused."""
    with teacher(latency=0.1, most_at_once=4) as (url, taught):
        assert co3(triples, tmp_path, url, "--concurrency=32") == 0
        refused, answered = taught.counts["too many at once"], taught.counts["completions"]
    assert outputs(tmp_path) == outputs(undisturbed)
    report = json.loads((tmp_path / "report.json").read_text())["this_start"]
    assert report["concurrency"]["decreases"] >= 2 and report["concurrency"]["at_the_end"] <= 12
    assert 8 <= refused < answered  # a slow machine sends the first 32 one after the other
    assert "concurrency lowered" in (tmp_path / "report.txt").read_text()


def test_failures_are_recorded_and_asked_again(tmp_path, undisturbed, triples):
    """A server that fails half of the time, and few tries. Oracle: a run on a good server."""
    with teacher(misbehave=0.5, kinds=("500",)) as (url, _):
        assert co3(triples, tmp_path, url, "--tries=2", "--concurrency=8") == 0
    failed = [row for row in lines(tmp_path / "rejected.jsonl") if "failed" in row["reason"]]
    assert failed and all("500" in row["detail"] for row in failed)
    assert sum(e.kind == "failure" for e in read_entries(tmp_path / "journal")) == len(failed)
    with teacher() as (url, taught):
        assert co3(triples, tmp_path, url) == 0
        assert 0 < taught.counts["completions"] < 9 * len(failed) + 2
    assert outputs(tmp_path) == outputs(undisturbed)


def test_caps_stop_and_a_higher_one_goes_on(tmp_path, undisturbed, triples, caplog):
    """Oracle: tokens in the journal stay under the cap; the end is the undisturbed one."""
    with teacher() as (url, _):
        assert co3(triples, tmp_path, url, "--token_cap=6000") == 3
        kept = read_entries(tmp_path / "journal")
        used = sum(entry.prompt_tokens + entry.completion_tokens for entry in kept)
        assert 4000 < used <= 6000 and "--token_cap=6000" in caplog.text
        assert not (tmp_path / "soda.jsonl").exists()
        assert co3(triples, tmp_path, url) == 0
    assert outputs(tmp_path) == outputs(undisturbed)


def test_fewer_triples_than_were_begun(tmp_path, triples):
    """A stopped run, started with a smaller --limit. Oracle: a run with that limit."""
    with teacher() as (url, _):
        assert co3(triples, tmp_path / "a", url, "--token_cap=9000") == 3
        assert co3(triples, tmp_path / "a", url, "--limit=3") == 0
        assert co3(triples, tmp_path / "b", url, "--limit=3") == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_credentials_are_written_nowhere(tmp_path, triples, capsys, caplog):
    """Oracle: a search through all that a run leaves and says; other fields are shown."""
    deep = [{"access_token": "abracadabra", "tokens": ["abracadabra"]}]
    hidden = {"api_key": "abracadabra", "more": deep}
    more = {**hidden, "max_tokens": 300, "stop_token_ids": [7], "top_k": 5}
    with teacher() as (url, _):
        url = url.replace("//", "//ann:abracadabra@")
        flags = [f"--body={json.dumps(more)}"]
        assert co3(triples, tmp_path, url, "--limit=2", *flags) == 0
        assert co3(triples, tmp_path, url, "--limit=2", "--model=other", *flags) == 1
    assert co3(triples, tmp_path, url, "--limit=2", *flags) == 1
    assert co3(triples, tmp_path, url, '--body={"api_key": "abracadabra"') == 1
    said = "".join(capsys.readouterr()) + caplog.text
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b"abracadabra" not in b"".join(left) and "abracadabra" not in said
    assert "ann" not in said and "//***@127.0.0.1" in said
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["base_url"].startswith("http://***@127.0.0.1")
    masked = {"api_key": "***", "more": [{"access_token": "***", "tokens": "***"}]}
    assert json.loads(about["body"]) == {**more, **masked}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_calls_under_way(tmp_path, undisturbed, triples, number):
    """Oracle: what the teacher was asked is what the journal has, all of it."""
    with teacher(latency=0.05) as (url, taught):
        timer = threading.Thread(target=_after, args=(taught, 40, number))
        timer.start()
        code = co3(triples, tmp_path, url, "--concurrency=4")
        timer.join()
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        kept = sum(e.kind == "answer" for e in read_entries(tmp_path / "journal"))
        assert kept == taught.counts["completions"] - 1  # but for the probe
        assert co3(triples, tmp_path, url) == 0
        assert taught.counts["completions"] == len(taught.seen) + 1
    assert outputs(tmp_path) == outputs(undisturbed)


def test_a_second_run_of_one_output_is_refused(tmp_path, undisturbed, triples, capsys):
    """Oracle: one line that names the first run's process, which goes on undisturbed."""
    with teacher(latency=0.02) as (url, taught):
        command = [sys.executable, "-m", "data_pipeline", *flags(triples, tmp_path, url)]
        with subprocess.Popen(command) as first:
            while taught.counts["completions"] < 10:
                assert first.poll() is None
                time.sleep(0.01)
            assert co3(triples, tmp_path, url) == 1
            assert first.wait(timeout=60) == 0
        said = capsys.readouterr().err
        assert f"is in use by process {first.pid}" in said and said.count("error: ") == 1
        assert max(taught.seen.values()) == 1  # none was asked twice
    assert outputs(tmp_path) == outputs(undisturbed)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, undisturbed, triples, monkeypatch):
    """Oracle: an undisturbed run, and no answer asked for twice, ten days before the first half."""
    with teacher() as (url, taught):
        assert co3(triples, tmp_path, url, "--token_cap=4000") == 3
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 10 * 24 * 3600)
        assert co3(triples, tmp_path, url) == 0
        assert sum(count > 1 for count in taught.seen.values()) <= 1  # but for the probe
    assert outputs(tmp_path) == outputs(undisturbed)


def _after(taught, calls: int, number: int) -> None:
    while taught.counts["completions"] < calls:
        time.sleep(0.005)
    os.kill(os.getpid(), number)


def test_a_server_that_dies_stops_the_run(tmp_path, triples, capsys):
    """Oracle: an error that names the server, not thirty rejections."""
    with teacher() as (url, _):
        assert co3(triples, tmp_path, url, "--token_cap=4000") == 3
    assert co3(triples, tmp_path, url) == 1
    with teacher(misbehave=1.0, kinds=("500",)) as (url, _):
        assert co3(triples, tmp_path, url, "--tries=2", "--concurrency=4", "--form=completion") == 1
    said = capsys.readouterr().err
    assert "does not answer" in said and "answers no call" in said
    assert not (tmp_path / "soda.jsonl").exists()


def test_chat_without_log_probabilities(tmp_path, triples):
    """Oracle: records come of it, their pmi answers empty; the form is remembered."""
    with teacher(forms=("chat",), logprobs=False) as (url, _):
        assert co3(triples, tmp_path, url, "--limit=8") == 0
    records = lines(tmp_path / "soda.jsonl")
    assert records and all(row["pmi_head_answer"] == "" for row in records)
    assert json.loads((tmp_path / "run.json").read_text())["form"] == "chat"


def test_as_published_is_a_run_of_its_own(tmp_path, triples, capsys):
    """Oracle: the prompts that the teacher knows; the other value of the flag is refused."""
    taught_prompts = prompts.load(prompts.PUBLISHED)
    with teacher(texts=taught_prompts) as (url, taught):
        assert co3(triples, tmp_path, url, "--as_published", "--limit=6") == 0
        assert len(lines(tmp_path / "soda.jsonl")) > 0
        asked = taught.counts["completions"]
        assert co3(triples, tmp_path, url, "--limit=6") == 1
        assert taught.counts["completions"] == asked
    assert "has a run with --as_published" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["about"]["as_published"] and report["about"]["retries"] == 1


def test_moderation_is_asked_where_there_is_a_service(tmp_path, triples):
    """Oracle: every record has the service's scores."""
    with teacher() as (url, taught):
        assert co3(triples, tmp_path, url, "--limit=8", f"--moderation_url={url}") == 0
        assert taught.counts["moderations"] >= len(lines(tmp_path / "provenance.jsonl")) > 0
    assert all("violence" in row["scores"] for row in lines(tmp_path / "provenance.jsonl"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard=2/2"], "--shard"),
        (["--body=["], "--body"),
        (["--cost_cap=1"], "--price_in"),
        (["--limit=0"], "--limit"),
        (["--critic=rec_0.8"], "no true or false in field rec_0.8"),
        (["--retries=-1"], "--retries"),
        (["--requests_per_minute=0"], "--requests_per_minute"),
        (["--timeout=nan"], "--timeout"),
        (
            ["--base_url=127.0.0.1:9/v1"],
            "--base_url=127.0.0.1:9/v1: http:// or https:// is missing",
        ),
        (["--base_url=ann:pw@x/v1"], "--base_url=***@x/v1: http:// or https:// is missing"),
        (["--moderation_url=x/v1"], "--moderation_url=x/v1: http:// or https:// is missing"),
        (["--output=/dev/null/x"], "/dev/null/x"),
        (["--model=other"], "--model"),
        (["--triples=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--prompts=/nowhere.toml"], "/nowhere.toml"),
        (["--as_published", "--retries=3"], "--as_published sets --retries"),
    ],
)
def test_mistakes_are_one_line(tmp_path, triples, capsys, more, said):
    """Oracle: exit code 1 and the flag in the one line."""
    with teacher() as (url, _):
        assert co3(triples, tmp_path, url, *more) == 1
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and error.startswith("error: ")


def kills(tmp_path, triples, url: str, count: int, concurrency: int, seconds: float) -> dict:
    """Kill a run `count` times at random moments, then let it end.

    Repeated calls, and how many were with the teacher or on their way back at the kills, of which
    each may have as many as there are calls at once.
    """
    chance = random.Random(1)
    output = tmp_path / "killed"
    lost = killed = 0
    command = [sys.executable, "-m", "data_pipeline"]
    command += flags(triples, output, url, f"--concurrency={concurrency}")
    while True:
        asked = stats(url).get("completions", 0)
        process = subprocess.Popen(command)
        while killed < count and stats(url).get("completions", 0) == asked:
            time.sleep(0.01)  # until it has begun to ask
        try:
            code = process.wait(chance.random() * seconds if killed < count else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += 1
        time.sleep(0.05)
        kept = sum(e.kind == "answer" for e in read_entries(output / "journal"))
        # Each start has asked one probe; what else was asked is in the journal or was lost.
        lost_now = stats(url)["completions"] - killed - kept - lost
        lost += lost_now
        assert 0 <= lost_now <= concurrency
    told = stats(url)
    repeated = told["completions"] - told["distinct"] - killed
    return dict(code=code, killed=killed, repeated=repeated, in_flight=lost, kept=kept)


def test_kills_lose_no_answer(tmp_path, undisturbed, triples):
    """Two kills. Oracle: the undisturbed bytes; no more is asked again than was in flight."""
    with teacher_process("--latency=0.05") as url:
        told = kills(tmp_path, triples, url, 2, 4, 0.6)
    assert told["code"] == 0 and told["killed"] >= 1
    assert 0 <= told["repeated"] <= told["in_flight"]
    assert outputs(tmp_path / "killed") == outputs(undisturbed)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, shared):
    """Oracle: an uninterrupted run's bytes; calls repeated are at most those in flight."""
    real = shared / "data/atomic_triples.jsonl"
    with teacher_process() as url:
        assert co3(real, tmp_path / "whole", url, "--concurrency=16") == 0
    with teacher_process("--latency=0.1") as url:
        told = kills(tmp_path, real, url, 100, 16, 1.5)
    print(told)
    assert told["code"] == 0 and told["killed"] == 100
    assert 0 < told["repeated"] <= told["in_flight"]
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


@pytest.mark.slow
def test_misbehaviour_over_all_real_triples(tmp_path, shared):
    """30% bad answers. Oracle: 6,000 lines in all, each a record or a counted reason."""
    real = shared / "data/atomic_triples.jsonl"
    with teacher_process("--misbehave=0.3", "--retry_after=0.05", "--slow_seconds=0.3") as url:
        assert co3(real, tmp_path, url, "--concurrency=64") == 0
    records, rejected = lines(tmp_path / "soda.jsonl"), lines(tmp_path / "rejected.jsonl")
    assert len(records) + len(rejected) == 6000
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(n for r in report["rejected"].values() for n in r.values()) == len(rejected)
    assert "error" not in report["rejected"]
    print((tmp_path / "report.txt").read_text())


def test_shards_merge_into_the_whole(tmp_path, undisturbed, triples, capsys):
    """Oracle: the bytes of the run over all; missing, double and overlapping shards are refused."""
    with teacher() as (url, _):
        parts = [tmp_path / f"part{i}" for i in range(3)]
        for index, part in enumerate(parts):
            assert co3(triples, part, url, f"--shard={index}/3") == 0
        whole = tmp_path / "whole"
        assert co3(triples, whole, url) == 0
        few, begun = tmp_path / "few", tmp_path / "begun"
        assert co3(triples, few, url, "--shard=2/3", "--limit=2") == 0
        assert co3(triples, begun, url, "--shard=2/3") == 0
        # Another seed's run begins in a folder of finished files, and is stopped.
        assert co3(triples, begun, url, "--shard=2/3", "--seed=5", "--token_cap=1") == 3
    merged = ["merge", f"--output={tmp_path / 'all'}", "--quiet", "--inputs"]
    assert command.main([*merged, *map(str, parts)]) == 0
    assert outputs(tmp_path / "all") == outputs(undisturbed)
    here, there = (json.loads((f / "report.json").read_text()) for f in (tmp_path / "all", whole))
    assert all(here[name] == there[name] for name in ("corpus", "rejected", "calls", "tokens"))
    assert (tmp_path / "all/soda.parquet").exists()
    for wrong, said in (
        (parts[:2], "missing of the shards: 2/3"),
        ([*parts, parts[0]], "both shard 0/3"),
        ([parts[0], whole], "several divisions"),
        ([*parts[:2], few], "limit=2"),
        ([*parts[:2], begun], "has not ended"),
    ):
        assert command.main([*merged, *map(str, wrong)]) == 1
        assert said in capsys.readouterr().err
    row = (parts[0] / "rejected.jsonl").read_text().splitlines()[0]
    with open(parts[1] / "rejected.jsonl", "a") as file:
        file.write(row + "\n")
    assert command.main([*merged, *map(str, parts)]) == 1
    assert "overlap" in capsys.readouterr().err


def test_a_sample_counts_what_the_reader_drops(tmp_path):
    """Oracle: the useless lines of the file, by hand; each shard and the merged say the same."""
    path = tmp_path / "triples.jsonl"
    usable = write_triples(path, 70)
    row = {"head": "PersonX waits", "relation": "xWant", "tail": "none"}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n{broken\n")
        for number in range(9):  # a sample needs all six relations
            row = {"head": f"PersonX falls {number} times", "relation": "xEffect"}
            file.write(json.dumps({**row, "tail": "gets hurt"}) + "\n")
    dropped = {"blank": 10, "relation not used": 10, "none": 1, "broken line": 1}
    with teacher() as (url, _):
        parts = [tmp_path / f"part{i}" for i in range(2)]
        for index, part in enumerate(parts):
            assert co3(path, part, url, "--sample=12", f"--shard={index}/2") == 0
    assert command.main(["merge", f"--output={tmp_path / 'all'}", "--quiet", "--no_parquet",
                         "--inputs", *map(str, parts)]) == 0  # fmt: skip
    for folder in (*parts, tmp_path / "all"):
        report = json.loads((folder / "report.json").read_text())
        assert report["about"]["dropped"] == dropped and report["triples"] < usable
        text = (folder / "report.txt").read_text()
        assert all(f"triples: {reason}" in text for reason in dropped)
        assert "| before the sample | none | 1 |" in (folder / "README.md").read_text()


def test_other_lists_of_words_or_names_are_another_run(tmp_path, monkeypatch):
    """Outputs of two versions never mix. Oracle: a file changed by one byte; records made anew."""
    now = triples_module.lists_version()
    copies = tuple(shutil.copy(path, tmp_path) for path in triples_module.LISTS)
    monkeypatch.setattr(triples_module, "LISTS", tuple(map(pathlib.Path, copies)))
    assert now == triples_module.lists_version()
    for path in triples_module.LISTS:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert triples_module.lists_version() != now
        path.write_bytes(text)
    path = tmp_path / "triples.jsonl"
    write_triples(path, 2)

    def begun_at():
        made = Outputs(tmp_path, triples_module.Source(path).identity(), 2)
        first = made.next
        if not first:
            made.add(0, Result({"soda": "{}"}))
            made.save()
        made.close()
        return first

    assert (begun_at(), begun_at()) == (0, 1)
    monkeypatch.setattr(triples_module, "lists_version", lambda: "another")
    assert begun_at() == 0


def test_limited_shards_merge_into_the_limited_whole(tmp_path, triples, capsys):
    """Oracle: the bytes of one run with that limit; a merge into a shard leaves the shard."""
    with teacher() as (url, _):
        parts = [tmp_path / "0", tmp_path / "1"]
        for index, part in enumerate(parts):
            assert co3(triples, part, url, f"--shard={index}/2", "--limit=9") == 0
        assert co3(triples, tmp_path / "whole", url, "--limit=9") == 0
    merged = ["merge", "--quiet", "--inputs", *map(str, parts)]
    before = outputs(parts[1])
    assert command.main([*merged, f"--output={parts[1]}/../1"]) == 1
    assert "is an input" in capsys.readouterr().err and outputs(parts[1]) == before
    assert command.main([*merged, f"--output={tmp_path / 'all'}"]) == 0
    assert outputs(tmp_path / "all") == outputs(tmp_path / "whole")


def test_what_holds_no_triples_replaces_no_corpus(tmp_path, triples, capsys):
    """A .csv. Oracle: an error that says what is wanted, the finished bytes; then the same triples
    as .tsv give the same records; parquet and plot of before do not outlive --no_parquet."""
    table, tabs = tmp_path / "some.csv", tmp_path / "some.tsv"
    rows = lines(triples)
    cells = ([row["head"], row["relation"], row["tail"]] for row in rows)
    tabs.write_text("".join("\t".join(row) + "\n" for row in cells))
    table.write_text(tabs.read_text().replace("\t", ","))
    folder = tmp_path / "soda"
    with teacher() as (url, _):
        assert co3(triples, folder, url, "--limit=5") == 0
        before = outputs(folder)
        assert co3(table, folder, url) == 1
        assert "'broken line'" in capsys.readouterr().err and outputs(folder) == before
        assert command.main(["postprocess", f"--input={table}", f"--output={folder}"]) == 1
        assert "SODA's rows" in capsys.readouterr().err and outputs(folder) == before
        for stale in ("soda.parquet", "report.png"):
            (folder / stale).write_text("old")
        assert co3(tabs, folder, url, "--limit=5") == 0
    assert outputs(folder) == before
    assert not (folder / "soda.parquet").exists() and not (folder / "report.png").exists()


def test_half_a_surrogate_pair_is_a_counted_rejection(tmp_path):
    """In a triple, and in rows of a corpus. Oracle: no line is missing; JSON reads them."""
    path = tmp_path / "triples.jsonl"
    usable = write_triples(path, 3)
    triple = '{"head": "PersonX eats \\ud800", "relation": "%s", "tail": "to rest"}\n'
    with open(path, "a") as file:
        file.writelines(triple % relation for relation in ("xWant", "oWant"))
    with teacher() as (url, _):
        assert co3(path, tmp_path / "soda", url) == 0
    rejected = lines(tmp_path / "soda/rejected.jsonl")
    broken = [row for row in rejected if row["reason"].startswith("broken line")]
    assert len(broken) == 2 and broken[0]["head"] == "PersonX eats \ud800"
    rows = lines(tmp_path / "soda/soda.jsonl")
    assert len(rows) + len(rejected) == 5 and usable == 3
    rows[0]["dialogue"][0] += "\udfff"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean = ["postprocess", f"--input={corpus}", f"--output={tmp_path / 'clean'}", "--quiet"]
    assert command.main([*clean, "--processes=1"]) == 0
    (gone,) = lines(tmp_path / "clean/rejected.jsonl")
    assert gone["reason"] == "broken row" and "surrogate" in gone["detail"]


@contextlib.contextmanager
def proxy(base_url: str, bend):
    """A server before the teacher that passes each answer (an object) through `bend`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            path = self.path.removeprefix("/v1")
            with urllib.request.urlopen(base_url + path, body) as got:
                data = json.dumps(bend(json.load(got), json.loads(body))).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_address[1]}/v1"
        finally:
            serving.shutdown()
            thread.join()


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_marks_around_answers_change_no_record(tmp_path, triples, form):
    """Each answer in another of a dozen spellings. Oracle: the run without any of them.

    Reasoning has a line that looks like a turn.
    """
    reasoning = "Okay.\nMia: I am no turn.\n"
    shapes = (
        "<think>{r}</think>\n\n{a}", "{r}</think>\n\n{a}", "[THINK]{r}[/THINK]{a}", "{a}<|im_end|>",
        "<|channel|>analysis<|message|>{r}<|end|><|channel|>final<|message|>{a}",
        "{a}</s>", "<|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>", "\x00{a}",
        "```\n{a}\n```", "<reasoning>{r}</reasoning><answer>{a}</answer>", "{a}<|im_end|>\nMia: No.",  # noqa: E501
    )  # fmt: skip

    def bend(answer, asked):
        choice = answer["choices"][0]
        said = choice["message"]["content"] if form == "chat" else choice["text"]
        number = zlib.crc32(json.dumps(asked, sort_keys=True).encode())
        said = shapes[number % len(shapes)].replace("{a}", said).replace("{r}", reasoning)
        if form == "chat":
            choice["message"]["content"] = [{"type": "text", "text": said}]
        else:
            choice["text"] = said
        choice["logprobs"] = None
        return answer

    with teacher(logprobs=False) as (url, _):
        flags = (f"--form={form}", "--limit=12", "--concurrency=8")
        assert co3(triples, tmp_path / "plain", url, *flags) == 0
        with proxy(url, bend) as bent:
            assert co3(triples, tmp_path / "bent", bent, *flags) == 0
    assert outputs(tmp_path / "bent") == outputs(tmp_path / "plain")
    assert len(lines(tmp_path / "bent/soda.jsonl")) > 5


def test_a_model_that_only_reasons_stops_the_run(tmp_path, triples, capsys):
    """Oracle: exit code 1, one line with fault and remedy, and few calls a start."""

    def bend(answer, asked):
        choice = answer["choices"][0]
        choice["message"] = {"content": None, "reasoning_content": "Hm."}
        choice["finish_reason"] = "length"
        return answer

    with teacher() as (url, taught), proxy(url, bend) as bent:
        for start in (1, 2):
            assert co3(triples, tmp_path, bent, "--form=chat", "--concurrency=4") == 1
            said = capsys.readouterr().err.strip()
            assert "reasoning used up max_tokens" in said and "4096" in said and "\n" not in said
            assert taught.counts["completions"] <= 30 * start
