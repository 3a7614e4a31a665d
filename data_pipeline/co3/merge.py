"""Merge the outputs of shards into the bytes that one run over all triples would have left.

Streams: one line of each shard is in memory, and a key of 12 bytes for each record.
"""

from __future__ import annotations

import contextlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import replacing, write_atomic
from cosmo.engine.base.errors import UserError
from data_pipeline.calls.outputs import FILES
from data_pipeline.co3 import postprocess, report

_ESTIMATED = {"estimated_tokens": 0, "estimated_cost": 0}  # reports of older versions lack them


def check(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings of the merged run. Raises UserError if shards do not fit together."""
    first: dict[str, Any] = {}
    shards: dict[str, Path] = {}
    for folder in folders:
        missing = [n for n in ("run.json", "soda.jsonl") if not (folder / n).exists()]
        if missing:
            raise UserError(f"{folder} has no {missing[0]}: give folders of finished runs of co3")
        if any((folder / f"{name}.jsonl.partial").exists() for name in FILES):
            raise UserError(
                f"a run in {folder} has not ended, so its files are of an earlier run: let it end"
            )
        about = json.loads((folder / "run.json").read_text())
        # Shards of one run differ in this setting alone, and in the server's address.
        shard = about.pop("shard")
        if shard in shards:
            raise UserError(f"{shards[shard]} and {folder} are both shard {shard}")
        shards[shard] = folder
        first = first or about
        for name, value in about.items():
            # Several servers may serve one model.
            if name != "base_url" and value != first.get(name):
                raise UserError(
                    f"{folder} was made with {name}={value}, {folders[0]} with "
                    f"{first.get(name)}: they are not shards of one run"
                )
    counts = {shard.split("/")[1] for shard in shards}
    if len(counts) > 1:
        raise UserError(f"shards of several divisions: {', '.join(sorted(shards))}")
    count = int(counts.pop())
    gone = [f"{i}/{count}" for i in range(count) if f"{i}/{count}" not in shards]
    if gone:
        raise UserError(f"missing of the shards: {', '.join(gone)}")
    return first


def merge(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the merged files and their report to `output`; return the report. Raises UserError."""
    about = {**check(folders), "shard": "0/1"}
    durable.make_folder(output)
    keys: set[bytes] = set()
    # Under hidden names first, so that a kill leaves no half of a corpus.
    places: dict[str, Path] = {name: output / f".{name}.jsonl.partial" for name in FILES}
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(p, "w", encoding="utf-8")) for n, p in places.items()}
        # Positions rise, so this list has the order that the merge of rejections needs.
        again: list[tuple[int, str, Path]] = []
        for position, row, origin, folder in _in_order(map(_records, folders)):
            # Each shard kept its own first. The first of all shards is known in this order alone.
            key = postprocess.key_of(json.loads(row))
            if key in keys:
                lines = postprocess.duplicate_lines(json.loads(row), json.loads(origin))
                again.append((position, lines["rejected"] + "\n", folder))
                continue
            keys.add(key)
            files["soda"].write(row)
            files["provenance"].write(origin)
        for _, line, _ in _in_order([*map(_rejected, folders), again]):
            files["rejected"].write(line)
    for name, path in places.items():
        with replacing(output / f"{name}.jsonl", path):
            pass  # written above
    write_atomic(output / "run.json", json.dumps(about, indent=1))
    numbers, reasons = report.count_outputs(output)
    calls: dict[str, Counter] = {}
    for folder in folders:
        # From the reports, because the journals may be left on other machines.
        for stage, row in json.loads((folder / "report.json").read_text())["calls"].items():
            calls.setdefault(stage, Counter()).update({**_ESTIMATED, **row})
    # Without numbers of this start, because merging makes no calls.
    made = report.build(about, numbers, reasons, {k: dict(v) for k, v in calls.items()}, {})
    report.write(output, made)
    return made


def _in_order(shards: Iterable[Iterable[tuple]]) -> Iterator[tuple]:
    """Merge items (position, ..., folder). Raises UserError if two have one position."""
    before = (-1, None)
    # By position alone. Equal ones are an error, so their lines are never compared.
    for item in heapq.merge(*shards, key=lambda item: item[0]):
        position, folder = item[0], item[-1]
        if position == before[0]:
            raise UserError(f"{before[1]} and {folder} overlap: both have triple {position}")
        before = (position, folder)
        yield item


def _records(folder: Path) -> Iterator[tuple[int, str, str, Path]]:
    """Yield (position, line of soda.jsonl, line of provenance.jsonl, folder) of a shard."""
    with (
        open(folder / "soda.jsonl", encoding="utf-8") as rows,
        open(folder / "provenance.jsonl", encoding="utf-8") as origins,
    ):
        for row, origin in zip(rows, origins, strict=True):
            yield json.loads(origin)["position"], row, origin, folder


def _rejected(folder: Path) -> Iterator[tuple[int, str, Path]]:
    with open(folder / "rejected.jsonl", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["position"], line, folder
