"""The clients of the guard's benchmark, with a Canary that takes a known time."""

import argparse

import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.web import run
from cosmo.tasks import safety
from tests.canary.guard_doubles import Labels
from tests.canary.test_guard_sockets import guarding
from tools import bench_guard


def test_the_added_time_is_that_of_two_labels():
    """Oracle: the script: a label of 20 ms for the turn, and one for each of two sentences."""
    args = argparse.Namespace(requests=64, rounds=1, turns=3, words=5, sentences=2, seed=0)
    labels = Labels(seconds=0.02)
    with (
        run.background(bench_guard.scripted_server(2)) as upstream,
        guarding(upstream, labels) as (
            url,
            log,
        ),
    ):
        guarded = url.removesuffix("/v1")
        found = bench_guard.added(upstream, guarded, 64, safety.LABELS[0], args)
        assert found["requests"] == 64
        # A warm-up of one request a client is not counted.
        assert len(labels.asked) == 2 * 64 * 3 and len(log.of("turn")) == 2 * 64
        args.requests = 1
        assert bench_guard.added(upstream, guarded, 1, safety.LABELS[0], args)["added_p50_ms"] > 20
        with pytest.raises(UserError, match="was not labelled __needs_caution__"):
            bench_guard.added(upstream, guarded, 1, "__needs_caution__", args)
