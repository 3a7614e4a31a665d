"""The judges of a study and their tokens: a CSV file of judge, token, link.

A token is the judge's key. The file keeps it over restarts, so that links stay as they were.
"""

from __future__ import annotations

import csv
import io
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.tasks.record_files import read_lines, read_table
from data_pipeline.annotation.answers import check_person, same_person

COLUMNS = ("judge", "token", "link")
MAX_JUDGES = 10_000
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")  # of 16 characters, so that nobody can guess it


def new_token() -> str:
    """Return a token of 128 random bits."""
    return secrets.token_urlsafe(16)


def link(base: str, token: str) -> str:
    """Return the address of a judge's page."""
    return f"{base.rstrip('/')}/judge?token={quote(token, safe='')}"


def read_names(path: Path) -> list[str]:
    """Return the judges of a file, a name a line. Raises DataError for a bad or doubled name."""
    lines = [(number, line.strip()) for number, line in read_lines(path)]
    rows = [(number, name) for number, name in lines if name]
    _check_names(path, rows, "judges_file")
    return [name for _, name in rows]


def read_tokens(path: Path) -> dict[str, str]:
    """Return {judge: token} of a tokens file. Raises DataError, which names the line."""
    found: dict[str, str] = {}
    rows = list(read_table(path, delimiter=","))
    if rows and not {"judge", "token"} <= rows[0][1].keys():
        raise DataError.at(
            path, 1, "no tokens file", got=f"columns {shown(list(rows[0][1]))}",
            expected=",".join(COLUMNS), remedy="Give the file that `annotate serve` wrote.",
            setting="tokens",
        )  # fmt: skip
    _check_names(path, [(place.line, row["judge"]) for place, row in rows], "tokens")
    for place, row in rows:
        token = row["token"] or ""
        if not _TOKEN.fullmatch(token) or token in found.values():
            # The token itself is a secret: it stays out of the message.
            raise DataError.at(
                path, place.line, "a token that cannot be used",
                got=f"one of {len(token)} characters for {shown(row['judge'])}",
                expected="16 or more letters, digits, - or _, different for each judge",
                remedy="Remove the line: the judge then gets a new token.", setting="tokens",
            )  # fmt: skip
        found[row["judge"]] = token
    return found


def checked(names: Sequence[str]) -> list[str]:
    """Return names of a command line. Raises DataError for a bad or doubled one."""
    _check_names("--judges", [(None, name) for name in names], "judges")
    return list(names)


def _check_names(path: Path | str, rows: Sequence[tuple[int | None, str]], setting: str) -> None:
    seen: dict[str, int | None] = {}
    for number, name in rows:
        try:
            check_person(name or "")
        except ValueError as error:
            place = f"{path}:{number}" if number else path
            raise UserError(f"{place}: {error}. Correct the name.", setting=setting) from None
        same = same_person(name)
        if same in seen:
            raise DataError.at(
                path, number, "two judges of one name", got=shown(name),
                expected="a different name for each judge"
                + (f" (it is in line {seen[same]} already)" if seen[same] else ""),
                remedy="Give each judge a name of their own.", setting=setting,
            )  # fmt: skip
        seen[same] = number
    if len(rows) > MAX_JUDGES:
        raise UserError(f"{path}: {len(rows):,} judges, at most {MAX_JUDGES:,}", setting=setting)


def write_tokens(path: Path, tokens: Mapping[str, str], base: str) -> None:
    """Write a tokens file that its owner alone may read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((judge, token, link(base, token)) for judge, token in tokens.items())
    try:
        if not path.exists():
            path.touch(mode=0o600)
        write_atomic(path, text.getvalue())
        path.chmod(0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", setting="tokens") from error


def judges(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return {judge: token}: those of the file, and a new token for each of `names` without one.

    With `names`, only these may judge. Raises UserError where there is nobody.
    """
    known = read_tokens(path) if path.exists() else {}
    if not names:
        if not known:
            raise UserError("nobody may judge: give --judges or --judges_file")
        return known
    spelled = {same_person(name): name for name in known}
    for name in names:
        before = spelled.get(same_person(name), name)
        if before != name:
            raise UserError(f"judge {shown(name)} is {shown(before)} in {path}: give one name")
    return {name: known.get(name) or new_token() for name in names}
