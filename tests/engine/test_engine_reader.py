"""The reader process: the same data as in this process, its errors, its end.

SeqIO is imported by the reader process once for all tests here, and by this process never but in
the test that compares the two.
"""

import collections
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import reader
from cosmo.engine.data.datasets import DatasetConfig

TOYS = DatasetConfig(
    "toys",
    {"inputs": 32, "targets": 16},
    batch_size=4,
    seed=3,
    module="tests.engine.reader_toys",
)
VALIDATION = dataclasses.replace(TOYS, split="validation", shuffle=False)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0), (5, 1)],
        pytest.param([(0, 1), (5, 0)], marks=pytest.mark.slow),  # each place builds two pipelines
    ],
)
def test_batches_are_those_of_seqio_in_this_process(places):
    """Oracle: `seqio_reader.train_batches` called here, for two shards and two starting steps."""
    from cosmo.engine.data import seqio_reader

    for start_step, shard in places:
        settings = {"start_step": start_step, "shard": shard, "num_shards": 2}
        there = reader.train_batches(TOYS, **settings)
        here = seqio_reader.train_batches(TOYS, **settings)
        for _ in range(reader.BATCHES_AHEAD + 3):
            ours, expected = next(there).arrays, next(here)
            assert ours.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(ours[name], array)
        there.close()


def test_evaluation_is_answered_while_a_stream_is_open():
    """Property: replies of two kinds do not mix. Oracle of the metrics: by hand."""
    stream = reader.train_batches(TOYS)
    first = next(stream).arrays["encoder_input_tokens"]
    (task,) = reader.eval_tasks(VALIDATION)
    assert (task.name, task.has_predict_metrics, task.has_score_metrics) == ("toys", True, True)
    assert [row.inputs for row in task.rows] == [f"number {i} of the toy corpus" for i in range(5)]
    answers = ["ANSWER 0", "answer 1", "", "answer 3", "other"]
    found = reader.measure(task, answers, [1.0] * 5, {"num_tokens": [2] * 5, "num_correct": [1]})
    assert found == {"total": 5.0, "tokens": 10.0, "exact": 0.6}
    assert reader.measure(task, None, [1.0] * 5, {"num_tokens": [1] * 5})["tokens"] == 5.0
    batches = reader.eval_batches(VALIDATION)["toys"]
    assert sum(int((b["encoder_segment_ids"].max(axis=1) > 0).sum()) for b in batches) >= 1
    assert next(stream).arrays["encoder_input_tokens"].shape == first.shape
    stream.close()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"mixture_or_task_name": "toyz"}, r"no SeqIO task or mixture 'toyz'; did you mean 'toys'"),
        ({"module": "no.such.module"}, "cannot import no.such.module"),
        ({"mixture_or_task_name": "broken_toys"}, r"toys.jsonl:4: the field 'targets' is missing"),
        ({"split": "test"}, "has a split 'test'"),
    ],
)
def test_an_error_of_the_reader_is_one_line_here(changes, text):
    """Oracle: the error's own text; the reader serves the next request."""
    config = dataclasses.replace(TOYS, **changes)

    def ask():
        if "split" in changes:
            reader.check_split(config)
        next(reader.train_batches(config))

    with pytest.raises(UserError, match=text) as caught:
        ask()
    assert "\n" not in str(caught.value)
    assert len(next(reader.train_batches(TOYS)).arrays["decoder_target_tokens"]) == 4


def test_a_reader_that_was_killed_is_one_error_and_starts_again():
    """Oracle: the signal's number in the text. A second reader serves the next call."""
    stream = reader.train_batches(TOYS)
    next(stream)
    os.kill(reader._process()._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"was killed by signal 9 \(out of memory\?\)"):
        collections.deque(itertools.islice(stream, 100), maxlen=0)
    assert next(reader.train_batches(TOYS)).arrays


def test_a_reader_ends_with_the_process_that_started_it(tmp_path):
    """Oracle: its process is gone soon after SIGKILL of its parent, which can close nothing."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from cosmo.engine.data import reader
            if __name__ == "__main__":
                print(reader._process()._process.pid, flush=True)
                time.sleep(100)
            """
        )
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _is_running(child):
        time.sleep(0.1)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
