"""Time CO3: its post-processing on one core, and its calls to a language model.

Post-processing is all from a line of SODA's schema to the line that is written: reading, filters,
names, the key for duplicates, writing. The calls go to the scripted teacher, which takes 1 s for an
answer, with 256 calls in flight.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import postprocess, schema

SAMPLE = "tasks/sample/soda/train.jsonl"


def clean_line(line: str, number: int, settings: postprocess.Settings) -> tuple[str, str] | None:
    """Return the line that is written, and its key; None if it is filtered out."""
    # Another id each time, so that names differ too.
    record = dataclasses.replace(schema.from_row(json.loads(line)), id=str(number))
    found = postprocess.postprocess(record, settings)
    if isinstance(found, Rejected):
        return None
    row = json.dumps(schema.soda_row(found), ensure_ascii=False)
    return row, postprocess.duplicate_key(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pipeline`."""
    parser.description = __doc__
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement (15)")
    parser.add_argument("--triples", help="a file of your own; made up without it")
    parser.add_argument("--limit", type=int, default=1200, help="triples to ask about (1200)")


def run(args: argparse.Namespace) -> None:
    """Measure both and print the figures."""
    time_postprocessing(args.seconds)
    time_calls(args)


def time_postprocessing(seconds: float) -> None:
    """Print the median of three measurements of `seconds` each."""
    lines = pathlib.Path(SAMPLE).read_text(encoding="utf-8").splitlines()
    settings = postprocess.Settings()
    clean_line(lines[0], 0, settings)  # the list of names is read once
    rates, number, kept = [], 0, 0
    for _ in range(3):
        # CPU seconds, because neighbours on the machine change them less than the clock.
        began, first = time.process_time(), number
        while time.process_time() - began < seconds:
            for line in lines:
                kept += clean_line(line, number, settings) is not None
                number += 1
        rates.append((number - first) / (time.process_time() - began))
    turns = statistics.mean(len(json.loads(line)["dialogue"]) for line in lines)
    print(
        f"post-processing of {len(lines)} dialogues of {turns:.1f} turns, over and over, one core"
    )
    spread = f"of 3: {min(rates):.0f} to {max(rates):.0f}"
    print(f"  {statistics.median(rates):8.0f} dialogues/s ({spread}), {kept / number:.1%} kept")


LATENCY_SECONDS, CONCURRENCY = 1.0, 256
HEADS = ("helps", "calls", "visits", "thanks", "meets", "teaches", "follows", "trusts", "pays")
PLACES = ("home", "school", "work", "the park", "the market", "the station", "a party", "church")
TAILS = {
    "xReact": ("happy", "proud", "tired", "relieved", "nervous", "calm"),
    "xAttr": ("kind", "patient", "honest", "curious", "brave", "careful"),
    "xWant": ("to go home", "to say thanks", "to take a rest", "to tell a friend"),
    "xNeed": ("to take the bus", "to find the way", "to ask a friend", "to get up early"),
}


def write_triples(path: pathlib.Path) -> None:
    """Write some 1,400 triples, all different and all usable."""
    ends = [(relation, tail) for relation, tails in TAILS.items() for tail in tails]
    with open(path, "w") as file:
        for head, place, (relation, tail) in itertools.product(HEADS, PLACES, ends):
            row = {"head": f"PersonX {head} PersonY at {place}", "relation": relation}
            file.write(json.dumps({**row, "tail": tail}) + "\n")


def time_run(triples: str, url: str, output: str, limit: int) -> tuple[float, int, float]:
    """Make a corpus; return (calls a second in its midst, calls, CPU seconds)."""
    command = [sys.executable, "-m", "data_pipeline", "co3", f"--triples={triples}", "--quiet"]
    command += [f"--base_url={url}", "--model=teacher", f"--output={output}", "--no_plots"]
    # Parquet and plots are left out: they follow after the calls.
    command += [f"--concurrency={CONCURRENCY}", f"--limit={limit}", "--no_parquet"]
    points: list[tuple[float, int]] = []  # (seconds, calls so far)
    # Counts children that have ended: the teacher still runs, so its work is left out.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as answer:
                points.append((time.monotonic(), json.load(answer).get("completions", 0)))
            time.sleep(0.25)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    first, calls = points[0][1], points[-1][1] - points[0][1]
    # Not the last calls, because fewer triples than places are left then.
    midst = [(t, n) for t, n in points if 0.1 * calls <= n - first <= 0.8 * calls]
    if len(midst) < 2:  # a run of few calls has no midst
        return 0.0, calls, cpu
    # Calls that began together end together, so two points alone would hit or miss a whole burst.
    return statistics.linear_regression(*zip(*midst, strict=True)).slope, calls, cpu


def time_calls(args: argparse.Namespace) -> None:
    """Print the calls a second of a run, and the CPU time of a call."""
    with tempfile.TemporaryDirectory() as folder:
        triples = args.triples or f"{folder}/triples.jsonl"
        if not args.triples:
            write_triples(pathlib.Path(triples))
        teacher = [sys.executable, "-m", "data_pipeline", "teacher", "--port=0"]
        teacher += [f"--latency={LATENCY_SECONDS}"]
        with subprocess.Popen(teacher, stdout=subprocess.PIPE, text=True) as process:
            try:
                url = process.stdout.readline().split()[2].rstrip(",")
                # A run of one triple is start-up alone, whose CPU time is subtracted.
                _, few, start = time_run(triples, url, f"{folder}/few", 1)
                rate, many, cpu = time_run(triples, url, f"{folder}/many", args.limit)
            finally:
                process.terminate()
                process.communicate()  # it prints at its end, so its pipe must be read
    ideal = CONCURRENCY / LATENCY_SECONDS
    print(f"{many} calls to a teacher that takes {LATENCY_SECONDS:g} s for each")
    print(f"  {ideal:8.1f} calls/s are the ideal of {CONCURRENCY} in flight")
    print(f"  {rate:8.1f} calls/s, {rate / ideal:.1%} of it")
    each = 1000 * (cpu - start) / (many - few)
    print(f"  {each:8.2f} ms of CPU a call, beyond the {start:.1f} s of a run of one triple")
