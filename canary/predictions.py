"""Read the answers of anybody's model to ProsocialDialog, for a row of the paper's table 2.

A line of JSON for each context:
  id                  of the context, as `contexts` gives it
  label               one of the five; or `probabilities` alone, whose largest is the label
  probabilities       {label: number} of all five; without them there is no calibration
  rots                the rules of thumb: a text, or a list of texts; "" or [] for none
  rot_log_likelihood  of the gold rules of thumb, in nats, with `rot_tokens`, for perplexity

A classifier may leave out rots, and a generator label and probabilities; all lines have the same
fields. The output of `canary eval` and of `canary label` has this form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from canary.evaluation import Case
from canary.report import Found
from cosmo.engine.base.errors import UserError, shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import read_records
from cosmo.tasks.safety import LABELS, rot_text

# The sum of probabilities may miss 1 by so much: they may be rounded to three digits.
MAX_SUM_ERROR = 3e-3
# Below it a sum over a corpus overflows. -Infinity is allowed: an impossible text.
LEAST_LOG_LIKELIHOOD = -1e9
_ANSWERS = ("label", "probabilities", "rots")


def contexts(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Return the contexts to answer as {id, turns}, without the corpus's answers."""
    return [{"id": case.id, "turns": case.turns} for case in cases]


def read(path: Any, cases: Sequence[Case], used: int | None = None) -> list[Found]:
    """Return the answers of the file `path` to the first `used` of `cases` (None: all), in order.

    Raises DataError, naming file, line and field, for a bad line, an unknown id and an id twice.
    Raises UserError if a context has no answer.
    """
    known = {case.id for case in cases}
    found: dict[str, tuple[int, Found]] = {}
    first: frozenset[str] | None = None
    for place, row in read_records(resolve(path)):
        if not isinstance(row, Mapping):
            raise place.error("not a record", shown(row), "an object {id, label, ...}")
        name = _id(row, place)
        if name not in known:
            raise place.error(
                "field 'id' is no context's",
                shown(name),
                f"one of the split's {len(known):,} ids, such as {next(iter(known), '')!r} "
                "(--contexts writes them)",
            )
        if name in found:
            raise place.error("an id twice", shown(name), f"one line; line {found[name][0]} has it")
        given = frozenset(key for key in _ANSWERS if _has(row, key))
        first = given if first is None else first
        if given != first:
            got = f"{sorted(given) or 'no answer'}, before: {sorted(first)}"
            raise place.error("a line with other fields", got, "the same fields in every line")
        if not given:
            raise place.error("no answer", shown(sorted(row)), "label, probabilities or rots")
        found[name] = (place.line, _found(row, place))
    wanted = [case.id for case in cases[:used]]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing):,} of {len(wanted):,} contexts, such as {missing[0]!r}: "
            "give a line for each",
            setting="predictions",
        )
    return [found[name][1] for name in wanted]


def _has(row: Mapping[str, Any], key: str) -> bool:
    # Our own predictions name the text as the module does.
    return row.get(key) is not None or (key == "rots" and row.get("rot_text") is not None)


def _id(row: Mapping[str, Any], place: Place) -> str:
    name = row.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise place.error("field 'id' is no id", shown(name), "a text or a number")
    return str(name)


def _found(row: Mapping[str, Any], place: Place) -> Found:
    probabilities = _probabilities(row.get("probabilities"), place)
    label = row.get("label")
    if label is None and probabilities is not None:
        label = max(LABELS, key=probabilities.__getitem__)
    if label is not None and label not in LABELS:
        raise place.error("field 'label' has an unknown value", shown(label), f"one of {LABELS}")
    likelihood, tokens = _likelihood(row, place)
    return Found(label, probabilities, _rots(row, place), likelihood, tokens)


def _probabilities(given: Any, place: Place) -> dict[str, float] | None:
    if given is None:
        return None
    expected = f"a number from 0 for each of {LABELS}, with sum 1"
    good = isinstance(given, Mapping) and set(given) == set(LABELS)
    good = good and all(isinstance(p, int | float) and p >= 0 for p in given.values())
    total = math.fsum(given.values()) if good else math.nan
    if not abs(total - 1) <= MAX_SUM_ERROR:
        raise place.error("field 'probabilities' has a wrong value", shown(given), expected)
    # Divided by the sum, because `report` allows the rounding of float32 alone.
    return {label: given[label] / total for label in LABELS}


def _rots(row: Mapping[str, Any], place: Place) -> str | None:
    given = row.get("rot_text")
    given = row.get("rots") if given is None else given
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise place.error("field 'rots' is no text", shown(given), "a text or a list of texts")
    kept = [one for one in given if one.strip()]
    return rot_text(kept) if kept else ""


def _likelihood(row: Mapping[str, Any], place: Place) -> tuple[float | None, int]:
    likelihood, tokens = row.get("rot_log_likelihood"), row.get("rot_tokens") or 0
    if likelihood is None:
        return None, 0
    number = isinstance(likelihood, int | float) and not isinstance(likelihood, bool)
    if not number or not (LEAST_LOG_LIKELIHOOD <= likelihood <= 0 or likelihood == -math.inf):
        expected = f"nats from {LEAST_LOG_LIKELIHOOD:g} to 0"
        problem = "field 'rot_log_likelihood' has a wrong value"
        raise place.error(problem, shown(likelihood), expected)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise place.error(
            "field 'rot_tokens' has a wrong value", shown(row.get("rot_tokens")), "a number from 1"
        )
    return float(likelihood), tokens
