"""The clients of the server's benchmark, against a server with a script."""

import asyncio

import pytest

from cosmo.engine.web import run
from cosmo.serve import api
from tests.cosmo.serve_parts import ScriptedScheduler, scripted_model
from tools import bench_serve


def test_tokens_and_times_are_counted():
    """Oracle: the script: 6 tokens an answer, the first after 20 ms."""
    scheduler = ScriptedScheduler(seconds=0.02)
    service = api.Service(scripted_model(), scheduler)
    with run.background(api.application(service)) as url:
        found = asyncio.run(bench_serve.measure(url, clients=3, requests=2))
    # A warm-up of one request a client is not counted, and all prompts differ.
    assert len(scheduler.seen) == len({ids for ids, _ in scheduler.seen}) == 9
    tokens = len(scheduler.vocabulary.encode(scheduler.text))
    assert found["first token p50"] >= 0.02
    assert found["answer p50"] >= 0.02 * tokens
    # Three clients one after another, each with two answers.
    assert found["tokens/s"] <= 3 * tokens / (0.02 * tokens)


def test_percentiles():
    """Oracle: by hand."""
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [bench_serve.percentile(values, p) for p in (1, 50, 95)] == [1.0, 3.0, 5.0]


def test_the_table_has_a_row_for_each_side():
    """Oracle: by hand: the ratio to one client."""
    times = {f"{what} p{p}": 0.1 for what in ("first token", "answer") for p in (50, 95)}
    found = {
        ("ours", 1): [{"tokens/s": 50.0, **times}],
        ("ours", 32): [{"tokens/s": 400.0, **times}],
    }
    text = bench_serve.table(found)
    assert "400" in text and "8.00" in text and "100 ms" in text


@pytest.mark.parametrize("count", [1, 4])
def test_prompts_have_64_tokens(count):
    """Oracle: the benchmark's description."""
    made = bench_serve.prompts(count)
    assert len(made) == count and {len(one) for one in made} == {bench_serve.INPUT_TOKENS}
    assert all(one[-1] == 1 for one in made)
