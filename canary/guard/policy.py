"""Read the guard's policy: a TOML file over the default that is shipped beside this module."""

import dataclasses
import difflib
import ipaddress
import math
import pathlib
import tomllib
import typing
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from cosmo.engine.base import annotations
from cosmo.engine.base.errors import UserError, shown
from cosmo.tasks import safety

DEFAULT = pathlib.Path(__file__).with_name("policy.toml")
TurnAction = Literal["pass", "guide", "intervene"]
AnswerAction = Literal["pass", "replace", "stop"]
KEYS = tuple(label.strip("_") for label in safety.LABELS)  # of the tables that list labels
# Routes that return generated text in forms that the guard does not read. No policy opens them.
GENERATING = (
    "responses", "assistants", "threads", "messages", "conversations", "chat", "completions",
    "edits", "images", "audio", "realtime", "batches", "fine_tuning", "videos", "evals",
    "containers", "files", "uploads", "vector_stores", "generate", "engines", "complete", "rerank",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Texts:
    """Set texts; see policy.toml."""

    intervention: str
    replacement: str
    system_message: str
    usual_rot: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Settings of the dialogue that Canary reads; see policy.toml."""

    max_turns: int
    system_messages: Literal["skip", "label"]
    tool_messages: Literal["skip", "label"]
    extra_fields: Literal["skip", "label"]
    unreadable: Literal["refuse", "pass"]
    max_unread_share: float
    max_pieces: int


@dataclasses.dataclass(frozen=True)
class Stream:
    """Settings of answers, streamed or not; see policy.toml."""

    enabled: bool
    sentence_chars: int
    context_chars: int
    alternatives: Literal["drop", "pass"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """The action when Canary fails; see policy.toml."""

    canary: Literal["closed", "open"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits in seconds and bytes; see policy.toml."""

    label_seconds: float
    connect_seconds: float
    first_byte_seconds: float
    event_seconds: float
    total_seconds: float
    event_bytes: int
    answer_bytes: int
    request_bytes: int
    max_choices: int


@dataclasses.dataclass(frozen=True)
class Routes:
    """Routes handed on unjudged; see policy.toml. `allowed` is the key `pass`."""

    allowed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Intervention:
    """How a person is called; see policy.toml."""

    webhook: str
    webhook_seconds: float
    webhook_tries: int
    include_text: bool


@dataclasses.dataclass(frozen=True)
class Policy:
    """All settings of the guard. The tables that list labels have the labels' full names."""

    turn: Mapping[str, TurnAction]
    answer: Mapping[str, AnswerAction]
    turn_thresholds: Mapping[str, float]
    answer_thresholds: Mapping[str, float]
    texts: Texts
    dialogue: Dialogue
    stream: Stream
    failure: Failure
    limits: Limits
    routes: Routes
    intervention: Intervention

    def turn_label(self, probabilities: Mapping[str, float], likeliest: str) -> str:
        """Return the label that holds for a turn."""
        return held_label(probabilities, likeliest, self.turn_thresholds)

    def answer_label(self, probabilities: Mapping[str, float], likeliest: str) -> str:
        """Return the label that holds for a sentence of an answer."""
        return held_label(probabilities, likeliest, self.answer_thresholds)


def held_label(
    probabilities: Mapping[str, float], likeliest: str, thresholds: Mapping[str, float]
) -> str:
    """Return the most severe label that reaches its threshold.

    If none does, return the likeliest of the labels without a threshold; casual if all have one.
    """
    if not thresholds:
        return likeliest
    for label in reversed(safety.LABELS):
        if label in thresholds and probabilities[label] >= thresholds[label]:
            return label
    if likeliest not in thresholds:
        return likeliest
    rest = [label for label in safety.LABELS if label not in thresholds]
    return max(rest, key=lambda label: probabilities[label], default=safety.LABELS[0])


def load(path: str | pathlib.Path | None = None) -> Policy:
    """Return the policy of a file, with the default for each key that it lacks. Raises UserError.

    The error names the file, the table, the key, the value and what is expected.
    """
    tables = _read(DEFAULT)
    if path is not None:
        for name, table in _read(pathlib.Path(path)).items():
            if name not in tables:
                raise UserError(f"{path}: {_unknown('table', name, tables)}")
            if not isinstance(table, dict):
                raise UserError(f"{path}: {name} = {shown(table)}: expected a table, [{name}]")
            # The default has no thresholds: their keys are checked as labels below.
            for key in table if not name.endswith("_thresholds") else ():
                if key not in tables[name]:
                    raise UserError(f"{path}: [{name}]: {_unknown('key', key, tables[name])}")
            tables[name] |= table
    return from_tables(tables, str(path or DEFAULT))


def from_tables(tables: dict[str, Any], where: str) -> Policy:
    """Return the policy of whole tables. Raises UserError, which begins with `where`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Policy):
        table = tables[field.name]
        if dataclasses.is_dataclass(field.type):
            found[field.name] = _section(field.type, table, f"{where}: [{field.name}]")
        elif field.name.endswith("_thresholds"):
            found[field.name] = _thresholds(table, f"{where}: [{field.name}]")
        else:
            action = typing.get_args(field.type)[1]
            found[field.name] = _actions(action, table, f"{where}: [{field.name}]")
    policy = Policy(**found)
    _check(policy, where)
    return policy


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the policy {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: the policy is no TOML: {error}") from error


def _section(kind: type, table: dict[str, Any], where: str) -> Any:
    values = {}
    for field in dataclasses.fields(kind):
        key = "pass" if field.name == "allowed" else field.name  # `pass` is a word of Python
        value = table[key]
        if isinstance(value, list):
            value = tuple(value)
        if not annotations.fits(value, field.type):
            expected = annotations.words(field.type).replace("tuple", "list")  # TOML's word
            raise UserError(f"{where} {key} = {shown(table[key])}: expected {expected}")
        # TOML has inf and nan. Every number here counts something or is a time.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{where} {key} = {value}: expected a number above 0")
        values[field.name] = value
    return kind(**values)


def _label(key: str, where: str) -> str:
    if key not in KEYS:
        raise UserError(f"{where}: {_unknown('label', key, KEYS)}")
    return f"__{key}__"


def _actions(kind: Any, table: dict[str, Any], where: str) -> dict[str, Any]:
    for key, action in table.items():
        if not annotations.fits(action, kind):
            expected = annotations.words(kind)
            raise UserError(f"{where} {key} = {shown(action)}: expected {expected}")
    return {_label(key, where): action for key, action in table.items()}


def _thresholds(table: dict[str, Any], where: str) -> dict[str, float]:
    for key, value in table.items():
        if not annotations.fits(value, float) or not 0 <= value <= 1:
            raise UserError(f"{where} {key} = {shown(value)}: expected a probability, 0 to 1")
    return {_label(key, where): float(value) for key, value in table.items()}


def _check(policy: Policy, where: str) -> None:
    """Raise UserError for values that are of the right type and cannot work."""
    for name in ("intervention", "replacement", "usual_rot"):
        if not getattr(policy.texts, name).strip():
            raise UserError(f"{where}: [texts] {name} is empty: expected a text")
    if policy.texts.system_message.count("{rots}") != 1:
        raise UserError(f"{where}: [texts] system_message: expected {{rots}} in it, once")
    if policy.stream.sentence_chars < 40:
        got = policy.stream.sentence_chars
        raise UserError(f"{where}: [stream] sentence_chars = {got}: expected at least 40")
    for route in policy.routes.allowed:
        check_route(route, f"{where}: [routes] pass")
    if policy.intervention.webhook:
        check_webhook(policy.intervention.webhook, f"{where}: [intervention] webhook")


def check_route(route: str, where: str) -> None:
    """Raise UserError for a route that is not a "METHOD /v1/..." or that generates text."""
    method, _, path = route.partition(" ")
    parts = path.split("/")
    if method not in ("GET", "POST", "DELETE") or parts[:2] != ["", "v1"] or not "".join(parts[2:]):
        raise UserError(f'{where}: {route!r}: expected for example "GET /v1/models"')
    if "*" in path and (path.count("*") > 1 or not path.endswith("/*") or len(parts) < 4):
        raise UserError(f"{where}: {route!r}: expected * as the last part alone, as /v1/models/*")
    if parts[2] in GENERATING:
        raise UserError(
            f"{where}: {route!r} returns generated text that the guard does not check: leave it out"
        )


def check_webhook(url: str, where: str) -> None:
    """Raise UserError unless a URL is https, or http to this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise UserError(f"{where} = {url!r}: no URL ({error})") from error
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"{where} = {url!r}: expected https://HOST/...")
    if parts.scheme == "http" and not is_loopback(host):
        # It may carry what a person in danger wrote.
        raise UserError(f"{where} = {url!r}: expected https, since {host} is another machine")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown {what} {name!r}: {hint}"
