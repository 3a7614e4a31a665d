"""Worker processes: what they report, and how they end when something goes wrong."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cosmo.engine.base import worker_processes
from cosmo.engine.base.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def square(job, report):
    """Write job * job into the job's file, and report the job's number in two steps."""
    folder, number = job
    report(number - 1)
    (folder / str(number)).write_text(str(number * number))
    report(1)


def fail_at_three(job, report):
    """Raise for job 3; every other job takes a minute, but for the first two."""
    _, number = job
    if number == 3:
        raise UserError("three is no number", setting="epochs")
    if number > 3:
        time.sleep(60)
    square(job, report)


def die(job, report):
    """Die as the kernel kills a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_are_done_once_and_counted(tmp_path):
    """Oracle: by hand. Seven jobs for two workers."""
    reports = []
    jobs = [(tmp_path, number) for number in range(1, 8)]
    worker_processes.run(square, jobs, 2, reports.append, kept="")
    assert {int(path.name): int(path.read_text()) for path in tmp_path.iterdir()} == {
        number: number * number for number in range(1, 8)
    }
    assert sum(reports) == sum(range(1, 8))


def test_an_error_ends_the_others_at_once(tmp_path):
    """Oracle: the error as it was raised, long before the other jobs would end."""
    began = time.monotonic()
    jobs = [(tmp_path, number) for number in range(1, 7)]
    with pytest.raises(UserError, match="three is no number") as caught:
        worker_processes.run(fail_at_three, jobs, 3, lambda number: None, kept="")
    assert caught.value.settings == ("epochs",)
    assert time.monotonic() - began < 55


def test_a_killed_worker_is_one_error():
    """Oracle: what is kept, and the setting that helps."""
    with pytest.raises(UserError, match=r"killed .*; all is kept, and the same command") as caught:
        worker_processes.run(die, [1, 2], 2, lambda number: None, kept="all is kept")
    assert caught.value.settings == ("processes",)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, how):
    """Oracle: no worker runs soon after their parent was killed or interrupted."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, pathlib, time
            from cosmo.engine.base import worker_processes
            def do(job, report):
                pathlib.Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").write_text("")
                time.sleep(100)
            if __name__ == "__main__":
                worker_processes.run(do, [1, 2], 2, lambda number: None, kept="")
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 300
    while len(pids := [int(p.name[4:]) for p in tmp_path.glob("pid-*")]) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(how)
    parent.wait(300)
    while time.monotonic() < deadline and any(map(_is_running, pids)):
        time.sleep(0.1)
    assert not any(map(_is_running, pids))


def _is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
