"""How fast CO3's post-processing is, on one core: `python -m tools.bench pipeline`.

From a line of SODA's schema to the line that is written: reading, filters, names replaced, the key
for duplicates, writing. Counted in CPU seconds of the process, so that neighbours matter less.
The dialogues are the sample corpus over and over, each time with another id, and so other names.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
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


def main(args: argparse.Namespace) -> None:
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
