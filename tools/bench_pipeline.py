"""How fast CO3 is: `python -m tools.bench pipeline`.

First its post-processing on one core: from a line of SODA's schema to the line that is written
(reading, filters, names replaced, the key for duplicates, writing), counted in CPU seconds of the
process, so that neighbours matter less. The dialogues are the sample corpus over and over, each
time with another id, and so other names.

Then its calls: a run against the scripted teacher in a process of its own, 50 ms an answer, 64 at
once, beside the ideal (64 / 50 ms) and beside one call at a time, as the published code asks.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from data_pipeline import postprocess, schema
from data_pipeline.requests import Rejected

SAMPLE = "tasks/sample/soda/train.jsonl"


def one(line: str, number: int, settings: postprocess.Settings) -> tuple[str, str] | None:
    """What is written of a line, and its key; None if it is filtered out."""
    record = dataclasses.replace(schema.from_row(json.loads(line)), id=str(number))
    found = postprocess.postprocess(record, settings)
    if isinstance(found, Rejected):
        return None
    row = json.dumps(schema.soda_row(found), ensure_ascii=False)
    return row, postprocess.duplicate_key(found)


def postprocessing(args: argparse.Namespace) -> None:
    """Three measurements of `args.seconds` each, and their median."""
    lines = pathlib.Path(SAMPLE).read_text(encoding="utf-8").splitlines()
    settings = postprocess.Settings()
    one(lines[0], 0, settings)  # the list of names is read once
    rates, number, kept = [], 0, 0
    for _ in range(3):
        began, first = time.process_time(), number
        while time.process_time() - began < args.seconds:
            for line in lines:
                kept += one(line, number, settings) is not None
                number += 1
        rates.append((number - first) / (time.process_time() - began))
    turns = statistics.mean(len(json.loads(line)["dialogue"]) for line in lines)
    print(
        f"post-processing of {len(lines)} dialogues of {turns:.1f} turns, over and over, one core"
    )
    spread = f"of 3: {min(rates):.0f} to {max(rates):.0f}"
    print(f"  {statistics.median(rates):8.0f} dialogues/s ({spread}), {kept / number:.1%} kept")


LATENCY, CONCURRENCY = 0.05, 64
HEADS = ("helps", "calls", "visits", "thanks", "meets", "teaches", "follows", "trusts", "pays")
PLACES = ("home", "school", "work", "the park", "the market", "the station", "a party", "church")
TAILS = {
    "xReact": ("happy", "proud", "tired", "relieved", "nervous", "calm"),
    "xAttr": ("kind", "patient", "honest", "curious", "brave", "careful"),
    "xWant": ("to go home", "to say thanks", "to take a rest", "to tell a friend"),
    "xNeed": ("to take the bus", "to find the way", "to ask a friend", "to get up early"),
}


def write_triples(path: pathlib.Path) -> None:
    """Some 1,400 triples, all different and all usable."""
    ends = [(relation, tail) for relation, tails in TAILS.items() for tail in tails]
    with open(path, "w") as file:
        for head, place, (relation, tail) in itertools.product(HEADS, PLACES, ends):
            row = {"head": f"PersonX {head} PersonY at {place}", "relation": relation}
            file.write(json.dumps({**row, "tail": tail}) + "\n")


def run(triples: str, url: str, output: str, concurrency: int, limit: int) -> dict:
    """What a run's report says of its start."""
    command = [sys.executable, "-m", "data_pipeline", "co3", f"--triples={triples}", "--quiet"]
    command += [f"--base_url={url}", "--model=teacher", f"--output={output}", "--no_plots"]
    command += [f"--concurrency={concurrency}", f"--limit={limit}", "--no_parquet"]
    subprocess.run(command, check=True)
    return json.loads((pathlib.Path(output) / "report.json").read_text())["this_start"]


def calls(args: argparse.Namespace) -> None:
    """Calls a second of a run, and of one call at a time."""
    with tempfile.TemporaryDirectory() as folder:
        triples = args.triples or f"{folder}/triples.jsonl"
        if not args.triples:
            write_triples(pathlib.Path(triples))
        teacher = [sys.executable, "-m", "data_pipeline", "teacher", "--port=0"]
        teacher += [f"--latency={LATENCY}"]
        with subprocess.Popen(teacher, stdout=subprocess.PIPE, text=True) as process:
            try:
                url = process.stdout.readline().split()[2].rstrip(",")
                one = run(triples, url, f"{folder}/one", 1, 20)
                many = run(triples, url, f"{folder}/many", CONCURRENCY, args.limit)
            finally:
                process.terminate()
                process.communicate()  # what it says at its end is read, or it could not say it
    ideal = CONCURRENCY / LATENCY
    print(f"calls to a teacher that takes {1000 * LATENCY:.0f} ms, in {many['calls']} calls")
    print(f"  {ideal:8.0f} calls/s are the ideal of {CONCURRENCY} at once")
    rate = many["calls"] / many["seconds"]
    print(f"  {rate:8.0f} calls/s, {rate / ideal:.1%} of it ({many['seconds']} s, start to end)")
    rate = one["calls"] / one["seconds"]
    print(f"  {rate:8.0f} calls/s one at a time, as the published loop asks")


def main(args: argparse.Namespace) -> None:
    """Both, and print them."""
    postprocessing(args)
    calls(args)
