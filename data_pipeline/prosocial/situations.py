"""Read problematic situations from the publishers' files, and count what each filter leaves.

Kim et al. 2022, section 3.1 and appendix A.1.

- Social Chemistry 101 (`social-chem-101.v1.0.tsv`): rows whose RoT targets the writer, under
  pressure against the action or strong pressure for it. Their RoTs are candidates.
- ETHICS, commonsense morality (`cm_train.csv`, `cm_test.csv`, `cm_test_hard.csv`): short texts that
  are labelled as wrong.
- SBIC (`SBIC.v2.agg.*.csv` or `SBIC.v2.*.csv`): posts of 10 to 40 words with a group and a
  stereotype.

Choices that the paper does not give: RoTs that an annotator marked as bad are left out. ETHICS has
no development set: `cm_test` is our validation, `cm_test_hard` our test. URLs and @names are taken
out of posts. A row that cannot be read is quarantined with file, line and reason.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import read_records, read_separated
from cosmo.tasks.safety import parse_answer, split_rots
from cosmo.tasks.sbic import cleaned
from data_pipeline.annotation.fields import built
from data_pipeline.prosocial import stereotypes

SOURCES = ("socialchemistry", "ethics_amt", "sbic")
# Situations that the paper's filters leave (appendix A.1).
PAPER = {"socialchemistry": "36k", "ethics_amt": "9.7k", "sbic": "12k"}
MAX_CANDIDATES = 5  # socialnorm1 to socialnorm5 of the paper's page
MIN_WORDS, MAX_WORDS = 10, 40  # of a post
# Beyond this share of bad rows among the first ones, the columns are not what the header names.
SHIFTED_SHARE, SHIFTED_ROWS = 0.5, 100

_SOCIAL_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_OTHER_SOCIAL_SPLITS = ("dev-extra", "test-extra", "analysis", "")
_PRESSURES = {-2.0: True, -1.0: True, 0.0: False, 1.0: False, 2.0: True}
_ETHICS_FILES = {"train": "train", "test_hard": "test", "test": "validation"}
_SBIC_FILES = {"trn": "train", "train": "train", "dev": "validation", "tst": "test", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Situation:
    """A situation; `rots` are candidates that the source gives."""

    id: str
    source: str
    split: str
    text: str
    rots: tuple[str, ...] = ()
    etc: str = ""


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row that cannot be used, with the place and the reason."""

    id: str
    reason: str
    row: Mapping[str, str]


@dataclasses.dataclass
class Count:
    """Rows and situations that are left after each filter of a source, in their order."""

    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    texts: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def add(self, step: str, text: str) -> None:
        """Count a row that reached `step`."""
        self.rows[step] = self.rows.get(step, 0) + 1
        self.texts.setdefault(step, set()).add(text)

    def result(self) -> list[dict[str, Any]]:
        """Return a row for each filter."""
        return [
            {"left after": step, "rows": rows, "situations": len(self.texts[step])}
            for step, rows in self.rows.items()
        ]


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that was read: situations, counts by source, and quarantined rows."""

    situations: tuple[Situation, ...]
    counts: dict[str, list[dict[str, Any]]]
    bad: tuple[Bad, ...]


def find(paths: Mapping[str, Any], sample: int | None = None, seed: int = 0) -> Found:
    """Return the situations of the sources that have a path ("socialchemistry", "ethics", "sbic").

    `sample` draws so many of all by seed. Raises DataError for a missing or empty file, for columns
    that are missing or shifted, and if no situation is left.
    """
    readers = {
        "socialchemistry": social_chemistry, "ethics": ethics, "sbic": sbic,
    }  # fmt: skip
    found: list[Situation] = []
    bad: list[Bad] = []
    counts = {}
    for name, path in paths.items():
        if path is None:
            continue
        count = Count()
        found += readers[name](path, count, bad)
        counts["ethics_amt" if name == "ethics" else name] = count.result()
    if not found:
        raise DataError.at(
            ", ".join(str(path) for path in paths.values() if path), None, "no situation is left",
            got=json.dumps(counts) + (f"; {bad[0].id}: {bad[0].reason}" if bad else ""),
            expected="at least one that passes the filters",
            remedy="Give the publishers' files.", setting="social_chemistry",
        )  # fmt: skip
    if sample is not None and sample < len(found):
        drawn = sorted(found, key=lambda one: fraction_bits(seed, "situation", one.id))[:sample]
        kept = {one.id for one in drawn}
        found = [one for one in found if one.id in kept]
    return Found(tuple(found), counts, tuple(bad))


def social_chemistry(path: Any, count: Count, bad: list[Bad]) -> list[Situation]:
    """Return the situations of Social Chemistry 101, with their RoTs as candidates."""
    columns = (
        "area", "split", "rot-char-targeting", "rot-bad", "action-pressure", "situation",
        "situation-short-id", "rot",
    )  # fmt: skip
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in _rows(path, ("tsv",), "\t", columns, bad, _social_fault):
        name = row["situation-short-id"]
        count.add("all rows", name)
        if row["split"] not in _SOCIAL_SPLITS:
            continue
        count.add("splits train, dev and test", name)
        if row["rot-bad"] not in ("0", "0.0"):
            continue
        count.add("RoT not marked as bad (ours)", name)
        if row["rot-char-targeting"] != "char-0":
            continue
        count.add("RoT targets the writer", name)
        # Empty: the annotator gave no answer.
        if not row["action-pressure"] or not _PRESSURES[float(row["action-pressure"])]:
            continue
        count.add("pressure against, or strong pressure for", name)
        grouped.setdefault(name, []).append(row)
    return [
        Situation(
            f"socialchemistry-{name}",
            "socialchemistry",
            _SOCIAL_SPLITS[rows[0]["split"]],
            " ".join(rows[0]["situation"].split()),
            # One RoT has a row for each annotator who broke it down.
            tuple(dict.fromkeys(row["rot"].strip() for row in rows if row["rot"].strip())),
            _etc(rows[0]["area"], name),
        )
        for name, rows in grouped.items()
    ]


def _etc(area: str, name: str) -> str:
    """Return area and id as published rows have them: `reddit/amitheasshole/b26onw`."""
    if "/" in name:
        return name
    site = "reddit/" if area in ("amitheasshole", "confessions") else ""
    return f"{site}{area}/{name}"


def _social_fault(row: Mapping[str, str]) -> str:
    """Return the fault of a Social Chemistry row, "" if it has none."""
    if row["split"] not in (*_SOCIAL_SPLITS, *_OTHER_SOCIAL_SPLITS):
        return f"column 'split': got {shown(row['split'])}, expected train, dev, test ..."
    if row["rot-bad"] not in ("", "0", "1", "0.0", "1.0"):
        return f"column 'rot-bad': got {shown(row['rot-bad'])}, expected 0 or 1"
    if row["rot-char-targeting"] and not row["rot-char-targeting"].startswith("char-"):
        got = shown(row["rot-char-targeting"])
        return f"column 'rot-char-targeting': got {got}, expected char-0 ..."
    if row["action-pressure"]:
        try:
            known = float(row["action-pressure"]) in _PRESSURES
        except ValueError:
            known = False
        if not known:
            return (
                f"column 'action-pressure': got {shown(row['action-pressure'])}, expected -2 to 2"
            )
    for name in ("situation", "situation-short-id"):
        if not row[name].strip():
            return f"column '{name}' is empty"
    return ""


def ethics(path: Any, count: Count, bad: list[Bad]) -> list[Situation]:
    """Return the short situations of ETHICS that are labelled as wrong."""
    found: dict[str, Situation] = {}
    for row in _rows(path, ("csv",), ",", ("label", "input", "is_short"), bad, _ethics_fault):
        name = Path(row[_FILE]).name
        split = _split_of(row[_FILE], _ETHICS_FILES)
        text = " ".join(row["input"].split())
        count.add("all rows", text)
        if row["label"] != "1":
            continue
        count.add("labelled as wrong", text)
        if row["is_short"].lower() != "true":
            continue
        count.add("one or two sentences", text)
        # Its row names it, because ETHICS gives no ids.
        id = f"ethics_amt-{name.removesuffix('.csv')}-{row[_LINE]}"
        found.setdefault(text, Situation(id, "ethics_amt", split, text))
    return list(found.values())


def _ethics_fault(row: Mapping[str, str]) -> str:
    if row["label"] not in ("0", "1"):
        return f"column 'label': got {shown(row['label'])}, expected 0 or 1"
    if row["is_short"].lower() not in ("true", "false"):
        return f"column 'is_short': got {shown(row['is_short'])}, expected True or False"
    return "" if row["input"].strip() else "column 'input' is empty"


def sbic(path: Any, count: Count, bad: list[Bad]) -> list[Situation]:
    """Return the posts of SBIC with a group and a stereotype, of 10 to 40 words."""
    columns = ("post", "targetMinority", "targetStereotype")
    grouped: dict[str, list[Mapping[str, str]]] = {}
    for row in _rows(path, ("csv",), ",", columns, bad, _sbic_fault):
        count.add("all rows", row["post"])
        grouped.setdefault(row["post"], []).append(row)
    found = []
    for post, rows in grouped.items():
        pairs = [
            (stereotype, group)
            for row in rows
            for stereotype, group in _pairs(row["targetStereotype"], row["targetMinority"])
        ]
        if not pairs:
            continue
        count.add("has a group and a stereotype", post)
        text = cleaned(post)
        if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            continue
        count.add("10 to 40 words", post)
        name = f"sbic-{Path(rows[0][_FILE]).name.removesuffix('.csv')}-{rows[0][_LINE]}"
        split = _split_of(rows[0][_FILE], _SBIC_FILES)
        found.append(Situation(name, "sbic", split, text, tuple(stereotypes.rules(pairs))))
    return found


def _pairs(stereotype: str, group: str) -> Iterator[tuple[str, str]]:
    """Yield the (stereotype, group) pairs of a row; the aggregated files hold lists of both."""
    if not stereotype.strip("[] ") or not group.strip("[] "):
        return
    given = [stereotype], [group]
    if stereotype.startswith("["):
        try:
            given = json.loads(stereotype), json.loads(group)
        except ValueError:
            return
    texts, groups = given
    for number, text in enumerate(texts):
        if str(text).strip():
            yield str(text), str(groups[min(number, len(groups) - 1)]) if groups else ""


def _sbic_fault(row: Mapping[str, str]) -> str:
    if not row["post"].strip():
        return "column 'post' is empty"
    if not any(character.isalnum() for character in cleaned(row["post"])):
        return "the post has no words beside URLs and @names"
    return ""


# Keys of a row for the file and the line that it came from.
_FILE, _LINE = "\0file", "\0line"


def _rows(
    path: Any,
    endings: Sequence[str],
    delimiter: str,
    columns: Sequence[str],
    bad: list[Bad],
    fault: Callable[[Mapping[str, str]], str],
) -> Iterator[dict[str, str]]:
    """Yield the rows of a file or folder that `fault` finds nothing in; add the others to `bad`."""
    seen = 0
    for file in _files(path, endings):
        header: list[str] = []
        faults: list[str] = []
        number = 0
        for place, fields in read_separated(file, delimiter):
            if not header:
                header = fields
                _check_header(header, columns, place)
                continue
            number += 1
            if len(fields) != len(header):
                row = {"text": delimiter.join(fields)}
                problem = f"{len(fields)} fields, where the header has {len(header)}"
            else:
                row = dict(zip(header, fields, strict=True))
                problem = fault(row)
            if not problem and not json_lines.is_whole("".join(fields)):
                problem = "characters that UTF-8 cannot encode"
            if problem:
                faults.append(f"line {place.line}: {problem}")
                bad.append(Bad(f"{Path(str(file)).name}:{place.line}", problem, row))
            else:
                yield {**row, _FILE: str(file), _LINE: str(place.line)}
            many = number in (SHIFTED_ROWS, 4 * SHIFTED_ROWS)
            if many and len(faults) > SHIFTED_SHARE * number:
                raise _shifted(file, faults, number)
        if number and len(faults) > SHIFTED_SHARE * number and number > 1:
            raise _shifted(file, faults, number)
        seen += number
    if not seen:
        raise DataError.at(
            path, None, "no rows", got="a header at most", expected=f"rows of {list(columns)}",
            remedy="Give the publishers' files.",
        )  # fmt: skip


def _shifted(file: Any, faults: Sequence[str], number: int) -> DataError:
    return DataError.at(
        file, None, f"{len(faults)} of {number} rows do not fit their columns",
        got=faults[0], expected="rows as their publishers ship them",
        remedy="Columns may be shifted: download the file again, or correct its header.",
    )  # fmt: skip


def _check_header(header: Sequence[str], columns: Iterable[str], place: Place) -> None:
    for name in columns:
        if name not in header:
            raise place.error(f"column '{name}' is missing", shown(list(header)), "it")


def _files(path: Any, endings: Sequence[str]) -> list[Any]:
    place = resolve(path)
    if place.is_dir():
        found = sorted(f for e in endings for f in place.iterdir() if f.name.endswith(f".{e}"))
        # The commonsense part of ETHICS has texts of several paragraphs in files of its own.
        found = [file for file in found if "ambig" not in file.name]
    else:
        found = [place] if place.is_file() else []
    if not found:
        raise DataError.at(
            path, None, "no such file or folder", got="nothing",
            expected=f"a file or a folder of .{' or .'.join(endings)}", remedy="Correct the path.",
        )  # fmt: skip
    return found


def _split_of(file: str, names: Mapping[str, str]) -> str:
    """Return the split that a file's name gives; DataError if it gives none."""
    stem = Path(file).name.lower()
    for part, split in names.items():
        if re.search(rf"(?<![a-z]){part}(?![a-z_])", stem):
            return split
    raise DataError.at(
        file, None, "the file's name gives no split", got=stem,
        expected=f"one of {list(names)} in it", remedy="Give the file its publishers' name.",
    )  # fmt: skip


def lines(found: Found) -> bytes:
    """Return the situations as the content of a file, one a line."""
    return json_lines.lines(dataclasses.asdict(one) for one in found.situations)


def split_counts(found: Found) -> dict[str, int]:
    """Return the number of situations of each source and split."""
    counts: dict[str, int] = {}
    for one in found.situations:
        name = f"{one.source} {one.split}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def read(path: Any) -> list[Situation]:
    """Return the situations of a file that `lines` made; DataError names a bad line."""
    found: dict[str, Situation] = {}
    for place, row in read_records(resolve(path)):
        try:
            one = built(Situation, row, "the situation")
        except ValueError as error:
            raise place.error("a broken situation", str(error), "a situation") from None
        if one.source not in SOURCES:
            raise place.error("field 'source'", shown(one.source), f"one of {SOURCES}")
        if one.split not in ("train", "validation", "test"):
            raise place.error("field 'split'", shown(one.split), "train, validation or test")
        if not one.id.strip() or not one.text.strip():
            raise place.error("field 'id' or 'text' is empty", shown(row), "texts")
        if one.id in found:
            raise place.error("an id twice", shown(one.id), "a different id for each situation")
        found[one.id] = one
    if not found:
        raise DataError.at(
            path, None, "no situations", got="an empty file", expected="a situation a line",
            remedy="Make it with `prosocial situations`.", setting="situations",
        )  # fmt: skip
    return list(found.values())


def with_rules(found: Iterable[Situation], path: Any) -> list[Situation]:
    """Return the situations with the rules of a file: lines {id, rots} or {id, prediction}.

    Those that have rules of their own keep them.
    """
    given: dict[str, list[str]] = {}
    for place, row in read_records(resolve(path)):
        name = row.get("id") if isinstance(row, dict) else None
        texts = row.get("rots", _predicted(row)) if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(texts, list):
            raise place.error("a line of rules", shown(row), "id, and rots or prediction")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise place.error("a rule is empty or no text", shown(texts), "texts")
        given.setdefault(name, []).extend(text.strip() for text in texts)
    return [
        one
        if one.rots
        else dataclasses.replace(one, rots=tuple(dict.fromkeys(given.get(one.id, ()))))
        for one in found
    ]


def _predicted(row: Mapping[str, Any]) -> list[Any]:
    """Return the rules of a line of `cosmo infer`; a Canary writes its label before them."""
    text = row.get("prediction")
    label, rots = parse_answer(text) if isinstance(text, str) else (None, text)
    return [rots] if label is None else list(split_rots(rots))
