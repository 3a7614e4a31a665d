"""Run a command once for each change that it makes to files, with a fault at that change.

    python -m tests.file_faults.driver WORK FOLDER OPTIONS

`shim.c` has to be loaded (see `tests/file_faults/test_file_faults.py`). Each run is a fork of this
process, which has imported everything: a start costs milliseconds. After each fault the same
command runs undisturbed. Prints a JSON object of counts, and of all outcomes that are wrong.
OPTIONS is JSON: {"points": 40} takes a sample, {"only": [["EIO", 7]]} runs these.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter

FAULTS = ("kill", "ENOSPC", "EIO")
SECONDS = 120  # for one run


class CO3:
    """Triples to dialogues, against a teacher in a process of its own."""

    def __init__(self, folder: pathlib.Path):
        from tests.data_pipeline import loopback

        self.loopback = loopback
        self.triples = folder / "triples.jsonl"
        loopback.write_triples(self.triples, 3)
        self.teacher = loopback.teacher_process()
        self.base_url = self.teacher.__enter__()
        self.asked = 0

    def run(self, output: pathlib.Path) -> int:
        return self.loopback.co3(self.triples, output, self.base_url, "--concurrency=1")

    def result(self, output: pathlib.Path) -> dict:
        return self.loopback.outputs(output)

    def calls(self) -> int:
        """Return the calls since the last time."""
        asked = self.loopback.stats(self.base_url).get("completions", 0)
        calls, self.asked = asked - self.asked, asked
        return calls

    def close(self) -> None:
        self.teacher.__exit__(None, None, None)


class Infer:
    """Bulk inference with answers made up in Python: two shards of a few parts, and rejects."""

    def __init__(self, folder: pathlib.Path):
        from cosmo.engine.base import command_line
        from cosmo.engine.checkpoints import any_format
        from cosmo.engine.infer import answer_files, bulk, infer
        from cosmo.engine.model import models
        from tests.engine import job_settings, tiny_network

        def answer(session, rows, work, on_batch):
            on_batch(Counter(records=len(rows), new_tokens=1, cells=2, tokens=1))
            return [infer.Answer(row, (row.inputs[::-1],), (0.5,), 1) for row in rows]

        any_format.locate = lambda path: any_format.Located(path, 7, "cosmo")
        infer.generation, infer.answer = (lambda *rest: None), answer
        model = models.EncoderDecoderModel(tiny_network.config())
        lengths = {"inputs": 48, "targets": 16}
        session = infer.SessionConfig(model, job_settings.Words(), "/run", lengths, 4)
        config = bulk.InferConfig(session)
        source = job_settings.records(9, bad=(0, 7))

        def run(output: pathlib.Path) -> int:
            def work():
                files = answer_files.output_files(str(output), 2)
                sharding = bulk.Sharding(2, part_size=2)
                bulk.answer_source(config, source, files, sharding, lambda: (object(), 7))

            return command_line.guarded(work)

        self.run = run

    def result(self, output: pathlib.Path) -> dict:
        files = {p.name: p.read_bytes() for p in output.iterdir() if not p.name.startswith(".")}
        left = [p.name for p in (output / ".predictions.work").iterdir()]
        return files | {"parts left": sum(name.startswith("part-") for name in left)}

    def calls(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Cache:
    """Packed rows of two small tasks, written by one process."""

    def __init__(self, folder: pathlib.Path):
        from cosmo.engine.base import command_line
        from cosmo.engine.data import cache_writing
        from tests.engine import test_engine_cache as cases

        def run(output: pathlib.Path) -> int:
            def work():
                cases.register("short", 12)
                cases.register("long", 30, first=100)
                cases.mix("both", [("short", 1.0), ("long", 2.0)])
                settings = cases.settings("both")
                cache_writing.write_cache(settings, str(output), epochs=1, shards_per_epoch=2)

            return command_line.guarded(work)

        self.run = run

    def result(self, output: pathlib.Path) -> dict:
        files = {p.name: p.read_bytes() for p in output.iterdir() if not p.name.startswith(".")}
        manifest = json.loads(files.pop("manifest.json"))
        return files | {"manifest": {k: v for k, v in manifest.items() if "seconds" not in k}}

    def calls(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Train:
    """A small training run: checkpoints, metrics, an evaluation, a skipped step."""

    def __init__(self, folder: pathlib.Path):
        from tests.engine import faults

        self.faults = faults

    def command(self, output: pathlib.Path) -> list[str]:
        """Return the command: TensorStore, once imported, allows no fork."""
        options = {"total_steps": 6, "save_period": 2, "stats_period": 2, "eval_period": 4}
        return self.faults.command(output, **options, policy="skip", bad=[3])

    def result(self, output: pathlib.Path) -> dict:
        arrays, told = self.faults.results(output)
        return {**arrays, "told": told}

    def calls(self) -> int:
        return 0

    def close(self) -> None:
        pass


WORK = {"co3": CO3, "infer": Infer, "cache": Cache, "train": Train}


class Runner:
    """Runs one piece of work, in a fork, with or without a fault."""

    def __init__(self, work, folder: pathlib.Path):
        self.work, self.folder, self.counter = work, folder, folder / "counter"
        self.output, self.log = folder / "output", folder / "log"
        self.modules = folder / "modules"

    def run(self, fault: str = "count", at: int = 0) -> tuple[int, int, str]:
        """Return (exit code, or minus a signal; changes to files; what was printed)."""
        self.counter.write_bytes(struct.pack("q", 0))
        environment = {
            "FILE_FAULTS_ROOT": str(self.output),
            "FILE_FAULTS_COUNTER": str(self.counter),
            "FILE_FAULTS_MODE": fault,
            "FILE_FAULTS_AT": str(at),
        }
        if hasattr(self.work, "command"):
            child = self._start(environment)
        else:
            child = os.fork()
            if child == 0:
                self._child(environment)
        deadline = time.monotonic() + SECONDS
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 124, 0, self.log.read_text()
            time.sleep(0.002)
        (changes,) = struct.unpack("q", self.counter.read_bytes())
        return os.waitstatus_to_exitcode(status), changes, self.log.read_text()

    def _start(self, environment: dict[str, str]) -> int:
        """Start the work's command in a process group of its own; return its id."""
        with open(self.log, "w") as log:
            return subprocess.Popen(
                self.work.command(self.output),
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            ).pid

    def _child(self, environment: dict[str, str]) -> None:
        code = 99
        try:
            os.setsid()  # a kill takes the whole group
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= environment
            ctypes.CDLL(None).file_faults_arm()
            code = self.work.run(self.output)
            self.modules.write_text("\n".join(sys.modules))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def import_modules(self) -> None:
        """Import what the last run has imported, so that its successors need not."""
        if not self.modules.exists():
            return
        for name in self.modules.read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)


def one_line_error(text: str) -> bool:
    """Whether the last thing that was printed is one error, without a traceback."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return len(errors) == 1 and "Traceback" not in text


def main() -> int:
    name, folder, options = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    work = WORK[name](folder)
    runner = Runner(work, folder)
    wrong: list[dict] = []
    outcomes: dict[str, Counter] = {fault: Counter() for fault in FAULTS}
    try:
        work.calls()
        code, changes, text = runner.run()
        calls = work.calls()
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}: {text}")
        expected = work.result(runner.output)
        runner.import_modules()
        calls_of_a_start = 0
        if calls:
            # A start tries the server before any work, whatever the journal holds.
            runner.clear()
            runner.run("kill", changes)
            work.calls()
            runner.run()
            calls_of_a_start = work.calls()
        points = [(fault, at) for fault in FAULTS for at in range(1, changes + 1)]
        if options.get("only"):
            points = [tuple(point) for point in options["only"]]
        elif options.get("points"):
            points = sorted(random.Random(options.get("seed", 0)).sample(points, options["points"]))
        for fault, at in points:
            runner.clear()
            code, _, text = runner.run(fault, at)
            problems = []
            if code == -signal.SIGKILL and fault == "kill":
                outcome = "killed"
            elif code == 0:
                outcome = "done all the same"
                if work.result(runner.output) != expected:
                    problems.append("exit code 0, and another result")
            elif code == 1 and one_line_error(text):
                outcome = "one error"
            else:
                outcome = f"exit code {code}"
                problems.append("no clear error")
            faulted = text
            code, _, text = runner.run()
            if code == 1 and one_line_error(text):
                outcome += ", then one error"
                problems.append("does not go on")
            elif code != 0:
                problems.append(f"then exit code {code}")
            elif work.result(runner.output) != expected:
                problems.append("then another result")
            # The answer in flight at a fault may be lost, and no other: each is paid for.
            made = work.calls()
            if made > calls + calls_of_a_start + (calls > 0):
                problems.append(f"{made} calls, expected {calls} + {calls_of_a_start} + 1")
            outcomes[fault][outcome] += 1
            print(name, fault, at, outcome, *problems, file=sys.stderr, flush=True)
            if problems:
                found = {"fault": fault, "at": at, "problems": problems}
                wrong.append({**found, "first": faulted[-1500:], "then": text[-1500:]})
    finally:
        work.close()
    result = {"changes": changes, "points": len(points), "outcomes": outcomes, "wrong": wrong}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
