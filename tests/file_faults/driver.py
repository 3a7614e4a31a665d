"""Run a command once for each change that it makes to files, with a fault at that change.

    python -m tests.file_faults.driver WORK FOLDER OPTIONS

`shim.c` has to be loaded (see `tests/file_faults/test_file_faults.py`). Each run is a fork of this
process, which has imported everything: a start costs milliseconds. After each fault the same
command runs undisturbed. Prints a JSON object of counts, and of all outcomes that are wrong.
OPTIONS is JSON: {"points": 40} takes a sample, {"only": [["EIO", 7]]} runs these, {"faults":
["power"]} those of these kinds.

A fault is "kill", "ENOSPC" or "EIO" at a change, or "named" or "unnamed": the two variants of a
power loss before it (see `power.py`). States after a power loss that are equal are tried once.
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

from tests.file_faults import power

FAULTS = ("kill", "ENOSPC", "EIO")
SECONDS = 120  # for one run


class CO3:
    """Triples to dialogues, against a teacher in a process of its own."""

    def __init__(self, folder: pathlib.Path):
        from data_pipeline.calls import gateway
        from tests.data_pipeline import loopback

        self.loopback = loopback
        self.triples = folder / "triples.jsonl"
        loopback.write_triples(self.triples, 3)
        self.teacher = loopback.teacher_process()
        self.base_url = self.teacher.__enter__()
        self.asked = 0
        answer = gateway.Gateway.answer

        async def marked(one, request):
            response = await answer(one, request)
            ctypes.CDLL(None).file_faults_mark()  # its stage counts it as kept from now on
            return response

        gateway.Gateway.answer = marked
        # Here, so that no fork has to load dictionaries: two thirds of a run's time.
        self.run(folder / "first")

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
    """Bulk inference with answers made up in Python: three shards of five parts, and rejects."""

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
        source = job_settings.records(30, bad=(0, 7))

        def run(output: pathlib.Path) -> int:
            def work():
                files = answer_files.output_files(str(output), 3)
                sharding = bulk.Sharding(3, part_size=2)
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
        # A folder that is there, so that the output's own name is a change too.
        self.place, self.trace = folder / "place", folder / "trace"
        self.output, self.log = self.place / "output", folder / "log"
        self.modules = folder / "modules"
        self.place.mkdir()
        self.trace.mkdir()

    def run(self, fault: str = "count", at: int = 0) -> tuple[int, int, str]:
        """Return (exit code, or minus a signal; changes to files; what was printed)."""
        self.counter.write_bytes(struct.pack("q", 0))
        environment = {
            "FILE_FAULTS_ROOT": str(self.place),
            "FILE_FAULTS_TRACE": str(self.trace),
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
        self.place.mkdir(exist_ok=True)


def one_line_error(text: str) -> bool:
    """Whether the last thing that was printed is one error, without a traceback."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return len(errors) == 1 and "Traceback" not in text


class Faults:
    """Tries faults of one piece of work, and compares what they leave with an undisturbed run."""

    def __init__(self, name: str, folder: pathlib.Path):
        self.name, self.work = name, WORK[name](folder)
        self.runner = Runner(self.work, folder)
        self.outcomes: dict[str, Counter] = {}
        self.seconds: Counter = Counter()  # by kind of fault
        self.states = 0  # of power losses, that differ
        self.wrong: list[dict] = []

    def undisturbed(self) -> None:
        """Record a run to its end: its changes, its result, its calls."""
        self.work.calls()
        code, self.changes, text = self.runner.run("record")
        self.calls = self.work.calls()
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}: {text}")
        self.expected = self.work.result(self.runner.output)
        self.runner.import_modules()
        self.calls_of_a_start = 0
        if self.calls:
            # A start tries the server before any work, whatever the journal holds.
            self.runner.clear()
            self.runner.run("kill", self.changes)
            self.work.calls()
            self.runner.run()
            self.calls_of_a_start = self.work.calls()

    def points(self, kinds: list[str], options: dict) -> list[tuple[str, int]]:
        """Return all pairs (fault, change), or the sample or the pairs that the options want."""
        if options.get("only"):
            return [tuple(point) for point in options["only"]]
        found = []
        for kind in kinds:
            # A power loss also may come after the last change.
            last = self.changes + (kind in power.VARIANTS)
            points = [(kind, at) for at in range(1, last + 1)]
            if count := options.get("points"):
                chosen = random.Random(options.get("seed", 0)).sample(points, min(count, last))
                points = sorted({*chosen, points[-1]} if kind in power.VARIANTS else chosen)
            found += points
        return found

    def disturb(self, fault: str, at: int) -> None:
        """Run with a fault at a change, then again without."""
        self.runner.clear()
        code, _, text = self.runner.run(fault, at)
        problems = []
        if code == -signal.SIGKILL and fault == "kill":
            outcome = "killed"
        elif code == 0:
            outcome = "done all the same"
            if self.work.result(self.runner.output) != self.expected:
                problems.append("exit code 0, and another result")
        elif code == 1 and one_line_error(text):
            outcome = "one error"
        else:
            outcome = f"exit code {code}"
            problems.append("no clear error")
        # The answer in flight at a fault may be lost, and no other: each is paid for.
        calls = self.calls + self.calls_of_a_start + (self.calls > 0)
        self._go_on(fault, at, outcome, problems, calls, text)

    def lose_power(self, variant: str, numbers: list[int]) -> None:
        """Make each state that a power loss before these changes leaves, and go on from it."""
        disk = power.Disk(self.runner.place, self.runner.trace)
        tried: dict[tuple, str] = {}
        marks = sum(kind == "mark" for _, kind, _ in disk.events)
        for at in sorted(numbers):
            disk.forward(at)
            state = disk.state(variant)
            done = at > self.changes
            same = (hash(tuple(sorted(state.items()))), disk.marks, done)
            if same in tried:
                self.outcomes.setdefault(variant, Counter())[tried[same]] += 1
                continue
            self.runner.clear()
            power.write(state, self.runner.place)
            problems = []
            if done:  # the command had reported its end
                try:
                    if self.work.result(self.runner.output) != self.expected:
                        problems.append("another result after the end")
                except Exception as error:
                    problems.append(f"no result after the end: {error!r}")
            start = max(self.calls - marks, self.calls_of_a_start)
            calls = start + marks - disk.marks
            tried[same] = self._go_on(variant, at, "lost", problems, calls, "")
            self.states += 1

    def _go_on(
        self, fault: str, at: int, outcome: str, problems: list, calls: int, faulted: str
    ) -> str:
        """Run undisturbed after a fault; note the outcome and all that is wrong."""
        code, _, text = self.runner.run()
        if code == 1 and one_line_error(text):
            outcome += ", then one error"
            problems.append("does not go on")
        elif code != 0:
            problems.append(f"then exit code {code}")
        elif self.work.result(self.runner.output) != self.expected:
            problems.append("then another result")
        made = self.work.calls()
        if made > calls:
            problems.append(f"{made} calls, expected {calls}")
        self.outcomes.setdefault(fault, Counter())[outcome] += 1
        print(self.name, fault, at, outcome, *problems, file=sys.stderr, flush=True)
        if problems:
            found = {"fault": fault, "at": at, "problems": problems}
            self.wrong.append({**found, "first": faulted[-1500:], "then": text[-1500:]})
        return outcome


def main() -> int:
    name, folder, options = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    kinds = [
        kind
        for group in options.get("faults", [*FAULTS, "power"])
        for kind in (power.VARIANTS if group == "power" else (group,))
    ]
    faults = Faults(name, folder)
    try:
        faults.undisturbed()
        points = faults.points(kinds, options)
        for variant in power.VARIANTS:
            began = time.monotonic()
            faults.lose_power(variant, [at for kind, at in points if kind == variant])
            faults.seconds[variant] = round(time.monotonic() - began, 1)
        for kind in FAULTS:
            began = time.monotonic()
            for at in [at for other, at in points if other == kind]:
                faults.disturb(kind, at)
            faults.seconds[kind] = round(time.monotonic() - began, 1)
    finally:
        faults.work.close()
    result = {
        "changes": faults.changes,
        "points": len(points),
        "states": faults.states,
        "outcomes": faults.outcomes,
        "seconds": faults.seconds,
        "wrong": faults.wrong,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
