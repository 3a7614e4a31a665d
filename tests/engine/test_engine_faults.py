"""Training runs that are killed, preempted, starved of disk or left waiting: real processes."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from cosmo.engine.train import preemption
from tests.engine import faults

# A run whose every kind of number must come back: dropout, a learning rate that warms up, windows
# of reports across saves, evaluations, skipped steps, a limit that follows the gradient's norms.
RUN = dict(
    total_steps=34,
    save_period=6,
    stats_period=4,
    eval_period=9,
    policy="skip",
    spike_factor=3.0,
    bad=[21],
    spikes=[25, 26],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What RUN leaves when nothing disturbs it, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    faults.run_here(RUN, folder)
    return faults.results(folder)


def killed(folder, kills: int, seed: int, **options):
    """Start and kill `kills` times; every second kill falls into a save."""
    rng, done = random.Random(seed), 0
    while done < kills:
        process = faults.start(folder, **options)
        left = options["total_steps"] - faults.last_step(folder)
        target = faults.last_step(folder) + rng.randint(1, max(1, left // (kills - done + 1)))
        ready = faults.until(process, lambda target=target: faults.last_step(folder) >= target)
        if ready and done % 2 == 0:
            ready = faults.until(process, lambda: faults.saving(folder))
        time.sleep(rng.uniform(0, 0.05))
        assert ready and process.poll() is None, "the run ended before it could be killed"
        faults.kill(process)
        done += 1


def same(folder, expected) -> dict:
    """What the run in `folder` told, which has left the `expected` results."""
    arrays, told = faults.results(folder)
    expected_arrays, expected_told = expected
    assert told == expected_told
    assert arrays.keys() == expected_arrays.keys() and len(arrays) > 20
    assert [name for name in arrays if arrays[name] != expected_arrays[name]] == []
    return told


def test_a_run_that_is_killed_leaves_what_one_left_alone_does(whole, tmp_path, caplog):
    """Killed in its second save. Oracle: an uninterrupted run: parameters, optimizer state and
    metrics, bitwise."""
    folder = tmp_path / "run"
    process = faults.start(folder, **RUN, pause=0.03)
    saved = folder / "checkpoints/6"
    for condition in (saved.exists, lambda: faults.saving(folder)):
        assert faults.until(process, condition), "the run ended before it could be killed"
    faults.kill(process)
    with caplog.at_level("INFO", "cosmo"):
        faults.run_here(RUN, folder)
    assert "resuming at step" in caplog.text
    told = same(folder, whole)
    assert told["metrics"][-2]["train/bad_steps"] == 3
    assert [json.loads(x)["step"] for x in told["bad"].splitlines()] == [21, 25, 26]
    assert [m["step"] for m in told["metrics"] if "eval/task/sum" in m] == [9, 18, 27, 34]


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_leaves_what_one_left_alone_does(tmp_path):
    """Oracle: an uninterrupted run: parameters, optimizer state and metrics, bitwise."""
    options = {**RUN, "total_steps": 240, "save_period": 7, "bad": [21, 60, 100, 101, 150]}
    options |= {"rows": False, "pause": 0.03}
    alone = faults.start(tmp_path / "whole", **options)
    killed(tmp_path / "run", 20, 7, **options)
    assert "resuming at step" in faults.run(tmp_path / "run", **options)
    assert alone.wait(timeout=240) == 0, faults.said(tmp_path / "whole")
    same(tmp_path / "run", faults.results(tmp_path / "whole"))


def test_sigterm_saves_and_the_next_start_goes_on(whole, tmp_path):
    """SIGTERM at a step that is none to save or report at; then SIGTERM during an evaluation, which
    the next start makes up for. Oracle: an uninterrupted run, bitwise."""
    folder = tmp_path / "stopped"
    process = faults.start(folder, **RUN, pause=0.05)
    faults.until(process, lambda: faults.last_step(folder) == 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, faults.said(folder)
    first = int(faults.said(folder).split("done: step ")[1].split()[0])
    assert 4 <= first < 6

    process = faults.start(folder, **RUN, slow_evaluation=100.0)
    faults.until(process, lambda: faults.last_step(folder) == 9)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, faults.said(folder)
    assert faults.said(folder).rstrip().endswith("done: step 9")
    faults.run_here(RUN, folder)
    same(folder, whole)


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
    """Property: exit code 0, the reason said, no checkpoint; in C++ too, as a handler of Python's
    would not: here the data take 100 seconds to come."""
    process = faults.start(tmp_path / "run", pause=100.0)
    faults.until(process, lambda: "compiled in" in faults.said(tmp_path / "run"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert "before a step was done: no checkpoint was saved yet" in faults.said(tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def test_ctrl_c_saves_too_and_says_which_step(tmp_path):
    """Property: exit code 130, and the step that is said is the newest checkpoint."""
    folder = tmp_path / "run"
    process = faults.start(folder, pause=0.1, save_period=30)
    faults.until(process, lambda: faults.last_step(folder) >= 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    log = faults.said(folder)
    step = int(log.split("interrupted: step ")[1].split()[0])
    assert 4 <= step < 30 and "Traceback" not in log
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_a_second_ctrl_c_ends_at_once(tmp_path):
    """Oracle: the first trainer's process in one line of error; exit code 130 without a traceback;
    and an uninterrupted run, to the bit, after both."""
    whole, folder = faults.start(tmp_path / "whole", **RUN), tmp_path / "run"
    first = faults.start(folder, **RUN, pause=0.1)
    faults.until(first, lambda: faults.last_step(folder) >= 4)
    second = faults.start(folder, log=tmp_path / "second.log", **RUN)
    assert second.wait(timeout=120) == 1
    errors = [x for x in (tmp_path / "second.log").read_text().splitlines() if "error: " in x]
    assert len(errors) == 1 and f"in use by process {first.pid}" in errors[0]
    assert first.poll() is None, faults.said(folder)
    first.send_signal(signal.SIGINT)
    faults.until(first, lambda: "saving and stopping" in faults.said(folder))
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130, faults.said(folder)
    assert "Traceback" not in faults.said(folder)
    faults.run(folder, **RUN)
    assert whole.wait(timeout=240) == 0
    assert faults.results(folder) == faults.results(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_during_an_evaluation_and_a_clock_that_is_set_back(tmp_path):
    """Oracle: an uninterrupted run, to the bit. The kill lands while the evaluation of step 9 runs,
    and the continuation's clock is ten days behind."""
    whole, folder = faults.start(tmp_path / "whole", **RUN), tmp_path / "run"
    process = faults.start(folder, **RUN, slow_evaluation=100.0)
    faults.until(process, lambda: faults.last_step(folder) == 9)
    faults.kill(process)
    faults.run(folder, **RUN, clock=-10 * 24 * 3600.0)
    assert whole.wait(timeout=240) == 0
    assert faults.results(folder) == faults.results(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_leaves_earlier_checkpoints(tmp_path):
    """A limit on a file's size stands for a full disk: it needs no privileges. Oracle: one line
    that says what, where, how much; the earlier checkpoint goes on, to the bit."""
    options = dict(total_steps=12, save_period=4)
    whole = faults.start(tmp_path / "whole", **options)
    folder = tmp_path / "run"
    faults.run(folder, **{**options, "total_steps": 4})
    reading = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # but not writing half of it
    log = faults.run(folder, code=1, prefix=limited(16_000), env=reading, **options)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in log
    assert "checkpoints/8 could not be written: the disk is full" in errors[0]
    assert "takes up to 0.1 MiB" in errors[0] and "free there" in errors[0]
    assert "step 4 is kept" in errors[0] and "Free some space" in errors[0]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["4"]
    faults.run(folder, **options)
    assert whole.wait(timeout=240) == 0
    assert faults.results(folder) == faults.results(tmp_path / "whole")


def limited(count: int) -> list[str]:
    """A command that runs another with no file above `count` bytes."""
    code = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({count},) * 2);"
    return [sys.executable, "-c", code + " os.execvp(sys.argv[1], sys.argv[1:])"]


@pytest.mark.slow
def test_a_full_file_system(tmp_path):
    """The same on a file system of half a megabyte, where root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        folder = disk / "run"
        log = faults.run(folder, code=1, total_steps=12, save_period=2, keep=None)
        assert log.count("error: ") == 1 and "the disk is full" in log, log
        assert "Traceback" not in log
        kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
        assert kept and max(kept) < 12
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        faults.run(folder, total_steps=12, save_period=2, keep=None)
        assert faults.results(folder)[1]["step"] == 12
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("step", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_a_write_that_fails_in_the_background_is_not_lost(tmp_path, step):
    """Property: raised by the next save, or at the end after the last; nothing of it stays."""
    log = faults.run(tmp_path / "run", code=1, total_steps=12, save_period=4, fail_write=step)
    assert log.count("error: ") == 1 and "Traceback" not in log, log
    assert f"checkpoints/{step} could not be written: [Errno 5] Input/output error" in log
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ([] if step == 4 else ["4", "8"])


def two_processes(model_dir, **options):
    """Both processes of a run; the log of process I is MODEL_DIR.I.log."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes = []
    for i in range(2):
        env = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        processes.append(faults.start(model_dir, env=env, log=f"{model_dir}.{i}.log", **options))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save", "write"])
def test_a_process_that_does_not_save_is_named(tmp_path, where):
    """Two processes, the second of which sleeps instead of saving, or of writing in the background:
    the first ends within the timeout, and names it."""
    folder = tmp_path / "run"
    first, second = two_processes(
        folder, sleeps=[1, where], total_steps=8, save_period=2, save_timeout=4
    )
    try:
        assert first.wait(timeout=90) == 1
        log = pathlib.Path(f"{folder}.0.log").read_text()
        assert "error: saving step 2" in log and "process 1 lags" in log, log
        assert "Traceback" not in log
    finally:
        first.kill()
        second.kill()
        second.wait()


@pytest.mark.slow
def test_processes_stop_at_the_same_step(tmp_path):
    """SIGTERM to one of two: both save the same step and exit 0; the next start goes on from it.
    Oracle: a run of two processes that was left alone."""
    folder = tmp_path / "run"
    options = dict(total_steps=40, save_period=30, stats_period=2)
    both = two_processes(folder, **options, pause=0.05)
    faults.until(both[0], lambda: faults.last_step(folder) >= 4)
    both[1].send_signal(signal.SIGTERM)
    assert [p.wait(timeout=60) for p in both] == [0, 0], faults.said(f"{folder}.0")
    steps = [faults.said(f"{folder}.{i}").split("done: step ")[1].split()[0] for i in range(2)]
    assert steps[0] == steps[1] and 4 <= int(steps[0]) < 30
    assert [p.wait(timeout=90) for p in two_processes(folder, **options)] == [0, 0]
    assert f"resuming at step {steps[0]}" in faults.said(f"{folder}.0")
    alone = two_processes(tmp_path / "whole", **options)
    assert [p.wait(timeout=90) for p in alone] == [0, 0]
    assert faults.results(folder) == faults.results(tmp_path / "whole")
    manifests = (folder / "checkpoints/40").glob("checksums.*")
    assert sorted(p.name for p in manifests) == ["checksums.0.json", "checksums.1.json"]


def test_other_signals_do_not_stop_a_run():
    """A library may handle one in Python, and the pipe tells of it too. Oracle: SIGTERM itself."""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("SIGUSR1"))
    try:
        with preemption.listen() as notice:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)
            assert heard == ["SIGUSR1"] and not notice.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.reached(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
