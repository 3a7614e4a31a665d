"""Count the workers' survey for the data statement (Kim et al. 2022, appendix A.6).

A table (.csv, .tsv) or JSON lines with a row for each worker who took part, or the answers to the
page `survey` of annotation. Every question is optional: `age` in years or as a decade ("20s"),
seven questions of choice, and two on a scale of 1 to 5. Names of workers are neither needed nor
kept.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from typing import Any

from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import read_records, read_table

# The paper's answers: 85% of 212 workers took part.
PAPER = {
    "gender": "50% man, 49% woman, 1% non-binary",
    "age": "10% 20s, 41% 30s, 27% 40s, 14% 50s, 6% 60s, 1% 70s",
    "race": "73% White, 9% multiracial, 7% Asian, 6% Black, 4% Hispanic, <1% Native American",
    "residence": "57% suburban, 25% urban, 18% rural; 97% in the US for more than 10 years",
    "education": "48% bachelor's degree, 19% some college, 12% associate degree, 12% graduate "
    "degree, 9% high school",
    "class": "43% middle, 39% working, 10% lower, 8% upper-middle",
    "politics": "62% liberal-leaning, 20% conservative-leaning, 18% moderate",
    "religion": "62% none, 29% Christian, 9% another",
    "assertiveness": "2.79 ± 1.02",
    "conflict_aversion": "3.63 ± 1.03",
}
_DECADE = re.compile("[1-9]0s")
_SCALES = ("assertiveness", "conflict_aversion")


def count(path: Any) -> dict[str, str]:
    """Return each question's answers in words; DataError for a value that is not an answer."""
    file = resolve(path)
    delimiter = {"csv": ",", "tsv": "\t"}.get(str(file).rsplit(".", 1)[-1])
    rows = list(read_table(file, delimiter) if delimiter else read_records(file))
    if not rows:
        raise DataError.at(
            path, None, "an empty survey", got="no row", expected="a row for each worker",
            remedy="Leave out the flag, or correct the path.", setting="survey",
        )  # fmt: skip
    found: dict[str, list[Any]] = {name: [] for name in PAPER}
    for place, given in rows:
        # A line of annotation's answers holds them in a field.
        nested = isinstance(given, dict) and isinstance(given.get("answers"), dict)
        row = given["answers"] if nested else given
        if nested and not row:
            continue  # a worker who left out every question
        if not isinstance(row, dict) or not found.keys() & row.keys():
            raise place.error("a survey's row", shown(row), f"some of {list(PAPER)}")
        for name in found.keys() & row.keys():
            text = str(row[name] if row[name] is not None else "")
            value = " ".join(text.replace("_", " ").split())
            if not value:
                continue  # every question is optional
            if name == "age" and _DECADE.fullmatch(value):
                value = value[:-1]
            if name in (*_SCALES, "age"):
                most = 5 if name in _SCALES else 120
                if not value.isdecimal() or not 1 <= int(value) <= most:
                    raise place.error(f"field '{name}'", shown(value), f"1 to {most}")
            found[name].append(value)
    return {name: _words(name, values) for name, values in found.items() if values}


def _words(name: str, values: list[str]) -> str:
    if name in _SCALES:
        numbers = [int(value) for value in values]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return f"{statistics.mean(numbers):.2f} ± {spread:.2f}"
    if name == "age":
        # Decades alone, because a single age may point to a person.
        decades = Counter(int(value) // 10 * 10 for value in values)
        return _shares({f"{age}s": number for age, number in sorted(decades.items())})
    return _shares(dict(Counter(value.lower() for value in values).most_common()))


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{100 * number / total:.0f}% {name}" for name, number in counts.items())
