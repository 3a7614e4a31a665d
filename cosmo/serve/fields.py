"""Read the fields of requests: OpenAI's, ours, what is accepted and ignored, what is refused.

A field that is null counts as absent. A field that stands in no list here is refused, as OpenAI
refuses it: a misspelled field would else be ignored without a word.
"""

import dataclasses
import difflib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosmo.engine.base.errors import shown
from cosmo.engine.web.errors import ApiError, wrong

MAX_STOPS = 4  # OpenAI's limit
MAX_TOP_LOGPROBS = 20  # OpenAI's limit for chat; here for completions too
MAX_TEMPERATURE = 2.0  # OpenAI's limit
MIN_TEMPERATURE = 1e-3  # below it a temperature counts as 0: divided logits would overflow
MAX_CHARS = 200_000  # of a request's texts: tokenizing them takes a tenth of a second
MAX_PROMPTS = 64
MAX_MESSAGES = 10_000  # to read them takes a tenth of a second

# They describe the caller or the bill, and change no answer.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "reasoning_effort",
        "verbosity",
    }
)
# Field -> values that ask for nothing. Any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "prediction": (),
    "web_search_options": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "echo": (False,),
    "suffix": ("",),
}
_SAMPLING = {"n", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_tokens"}
_OURS = {"top_k", "beams", "rots"}
CHAT = {
    *_SAMPLING,
    *_OURS,
    "model",
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "narrative",
    "instruction",
}
COMPLETION = {*_SAMPLING, *_OURS, "model", "prompt", "logprobs", "best_of"}
MODERATION = {"model", "input", "messages", "rots"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest values that a request may have. `max_tokens` is the model's longest answer.

    A `backend` other than "jax" is CTranslate2, which lacks two fields.
    """

    max_tokens: int
    max_samples: int
    beams: int = 1
    backend: str = "jax"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a request wants its answers. `logprobs` is None, or the number of likeliest tokens."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None
    beams: int
    rots: tuple[str, ...] | None


def check_names(body: Mapping[str, Any], known: set[str]) -> None:
    """Raise ApiError for a field that this endpoint has not, or that asks for what it cannot do."""
    for name, value in body.items():
        if name in known or name in IGNORED or value is None:
            continue
        if name in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                raise wrong(name, "this server does not support it", "unsupported_parameter")
            continue
        near = difflib.get_close_matches(name[:100], known, 1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ApiError(
            400,
            f"Unrecognized request argument supplied: {shown(name)}{hint}",
            param=name[:100],
            code="unknown_parameter",
        )


def _same(value: Any, neutral: Any) -> bool:
    # False equals 0 in Python, and is another value in JSON.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def wanted(body: Mapping[str, Any], limits: Limits, *, chat: bool) -> Wanted:
    """Return how a request wants its answers. Raises ApiError that names the wrong field."""
    n = integer(body, "n", 1, 1, limits.max_samples)
    best_of = integer(body, "best_of", n, 1, limits.max_samples)
    if best_of != n:
        raise wrong("best_of", "this server does not support it", "unsupported_parameter")
    beams = integer(body, "beams", 1, 1, None)
    if beams not in (1, limits.beams):
        started = f"--beams={limits.beams}" if limits.beams > 1 else "without --beams"
        raise wrong("beams", f"got {beams}, but this server was started {started}")
    stream = boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None:
        if not isinstance(options, dict) or options.keys() - {
            "include_usage",
            "include_obfuscation",
        }:
            raise wrong("stream_options", "expected an object {include_usage}")
        if not stream:
            raise wrong("stream_options", "only allowed when stream is true")
    given = {}
    # The newer name wins, as with OpenAI.
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            given["max_tokens"] = integer(body, name, None, 1, None)
    seed = integer(body, "seed", None, None, None)
    found = Wanted(
        n=n,
        # Clients send their usual limit to any model: the model's own limit holds then.
        max_tokens=min(given.get("max_tokens", limits.max_tokens), limits.max_tokens),
        temperature=number(body, "temperature", 0.0 if beams > 1 else 1.0, 0.0, MAX_TEMPERATURE),
        top_p=number(body, "top_p", 1.0, 0.0, 1.0),
        top_k=integer(body, "top_k", 0, 0, 2**31 - 1),
        seed=(secrets.randbits(32) if seed is None else seed) & 0xFFFFFFFF,
        stops=_stops(body.get("stop")),
        stream=stream,
        include_usage=options is not None and boolean(options, "include_usage", "stream_options."),
        logprobs=_chat_logprobs(body) if chat else _completion_logprobs(body),
        beams=beams,
        rots=_rots(body.get("rots")),
    )
    if found.top_p == 0.0 or found.temperature < MIN_TEMPERATURE:
        # OpenAI allows a top_p of 0; of an empty nucleus the likeliest token is left.
        found = dataclasses.replace(found, top_p=1.0, temperature=0.0)
    if beams > 1:
        _check_beams(found, given)
    if limits.backend != "jax":
        _check_ctranslate2(found, seed, "top_logprobs" if chat else "logprobs")
    return found


def _check_ctranslate2(found: Wanted, seed: int | None, top: str) -> None:
    """Raise ApiError for what CTranslate2 has not. `top` is the field of the likeliest tokens."""
    # The likeliest token is the same for every seed, so that one does no harm there.
    if seed is not None and found.temperature:
        problem = "this server answers by CTranslate2, which repeats no sample: leave it out"
        raise wrong("seed", problem, "unsupported_parameter")
    if found.logprobs:
        problem = "this server answers by CTranslate2, which gives no token but the chosen one"
        raise wrong(top, f"{problem}: send 0", "unsupported_parameter")


def _check_beams(found: Wanted, given: Mapping[str, Any]) -> None:
    for name, given_value, allowed in (
        ("n", found.n, found.n <= found.beams),
        ("temperature", found.temperature, found.temperature == 0.0),
        ("top_p", found.top_p, found.top_p == 1.0),
        ("top_k", found.top_k, found.top_k == 0),
        ("logprobs", found.logprobs, found.logprobs is None),
        ("max_tokens", found.max_tokens, "max_tokens" not in given),
    ):
        if not allowed:
            raise wrong(name, f"got {shown(given_value)}, which does not go with beams")


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(stop, str) and stop for stop in values):
        raise wrong("stop", "expected a text, or a list of texts, that are not empty")
    if len(values) > MAX_STOPS:
        raise wrong("stop", f"got {len(values)}, at most {MAX_STOPS} are allowed")
    return tuple(values)


def _rots(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(rot, str) for rot in value):
        raise wrong("rots", "expected a list of texts")
    check_size("rots", value)
    return tuple(rot.strip() for rot in value if rot.strip())


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    asked = boolean(body, "logprobs")
    top = integer(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if body.get("top_logprobs") is not None and not asked:
        raise wrong("top_logprobs", "only allowed when logprobs is true")
    return top if asked else None


def _completion_logprobs(body: Mapping[str, Any]) -> int | None:
    return integer(body, "logprobs", None, 0, MAX_TOP_LOGPROBS)


def boolean(body: Mapping[str, Any], name: str, place: str = "") -> bool:
    """Return a field that is true or false, false if it is absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{place}{name}", f"got {shown(value)}, expected true or false", "invalid_type")
    return bool(value)


def integer(
    body: Mapping[str, Any], name: str, default: Any, least: int | None, most: int | None
) -> Any:
    """Return a field that is a whole number between the limits, `default` if it is absent."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, f"got {shown(value)}, expected a whole number", "invalid_type")
    return _limited(name, value, least, most)


def number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """Return a field that is a number between the limits, `default` if it is absent."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, f"got {shown(value)}, expected a number", "invalid_type")
    # The body's reader refuses NaN; a value may also come from Python.
    if not (isinstance(value, int) or math.isfinite(value)):
        raise wrong(name, f"got {value}, expected a finite number")
    return float(_limited(name, value, least, most))


def _limited(name: str, value: Any, least: Any, most: Any) -> Any:
    if (least is not None and value < least) or (most is not None and value > most):
        rule = f"at least {least}" if most is None else f"{least} to {most}"
        raise wrong(name, f"got {shown(value)}, expected {rule}")
    return value


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation as the model has it: `narrative` is the situation, `instruction` the role."""

    narrative: str
    instruction: str
    turns: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return it as `records.row` takes it."""
        return {**dataclasses.asdict(self), "turns": list(self.turns)}


def dialogue(body: Mapping[str, Any]) -> Dialogue:
    """Return the dialogue of a request's `messages`, `narrative` and `instruction`.

    System messages (also "developer") stand before all others. Their first paragraph is the
    situation, the rest the role; `narrative` and `instruction` replace either. Messages of "user"
    and "assistant" are the turns. Neighbours of one role are one turn, joined by a space, because
    the model's turns alternate. The last message is the user's. Raises ApiError.
    """
    system: list[str] = []
    runs: list[list[str]] = []  # the texts of each turn
    last = ""
    for number, message in enumerate(_messages(body)):
        place = f"messages[{number}]"
        role, text = _role(message, place), content(message, place)
        if role == "system":
            if runs:
                raise wrong(f"{place}.role", "a system message must come before all others")
            system.append(text)
        elif not text.strip():
            raise wrong(f"{place}.content", "is empty")
        elif role == last:
            runs[-1].append(text)
        else:
            runs.append([text])
            last = role
    if last != "user":
        raise wrong("messages", "the last message must be the user's: the model answers it")
    situation, _, role = (
        "\n\n".join(part for part in system if part.strip()).strip().partition("\n\n")
    )
    parts = {"narrative": situation, "instruction": role}
    for name in parts:
        given = body.get(name)
        if given is not None:
            if not isinstance(given, str):
                raise wrong(name, f"got {shown(given)}, expected a text", "invalid_type")
            parts[name] = given
    turns = tuple(" ".join(texts) for texts in runs)
    check_size("messages", [*parts.values(), *turns])
    return Dialogue(*(" ".join(part.split()) for part in parts.values()), turns)


def dialogues(body: Mapping[str, Any], most: int) -> list[tuple[str, ...]]:
    """Return the dialogues of a moderation, each as its turns.

    `input` is a text, a list of text parts, or a list of texts, each a dialogue of one turn.
    `messages`, a field of ours, is one dialogue, whose latest turn is labelled. Raises ApiError.
    """
    value = body.get("input")
    if (value is None) == (body.get("messages") is None):
        raise wrong("input", "expected either input or messages")
    if value is None:
        places = [(f"messages[{number}]", one) for number, one in enumerate(_messages(body))]
        spoken = [(place, one) for place, one in places if _role(one, place) != "system"]
        found, name = [tuple(content(one, place) for place, one in spoken)], "messages"
    else:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and any(isinstance(one, dict) for one in texts):
            texts = [_joined(texts, "input")]  # parts of one text, as OpenAI's newer models take it
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise wrong("input", "expected a text or a list of texts", "invalid_type")
        if len(texts) > most:
            raise wrong("input", f"got {len(texts)} texts, at most {most} are allowed")
        found, name = [(text,) for text in texts], "input"
    for number, turns in enumerate(found):
        if not turns or not all(turn.strip() for turn in turns):
            raise wrong(name if name == "messages" else f"input[{number}]", "is empty")
    check_size(name, [turn for turns in found for turn in turns])
    return found


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "expected a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        got = f"got {len(messages):,}, at most {MAX_MESSAGES:,} are allowed"
        raise wrong("messages", got, "array_above_max_length")
    return messages


# Fields of a message that change nothing here.
_MESSAGE_FIELDS = {"role", "content", "name", "refusal", "annotations", "audio"}
_REFUSED_MESSAGE_FIELDS = ("tool_calls", "function_call", "tool_call_id")
# Fields that our own answers have: clients send answers back as they came.
_ANSWER_FIELDS = {"rots", "label", "needs_human", "guard"}


def _role(message: Any, place: str) -> str:
    if not isinstance(message, dict):
        raise wrong(place, "expected an object {role, content}", "invalid_type")
    for name, value in message.items():
        if value is None or value == []:
            continue
        if name in _REFUSED_MESSAGE_FIELDS:
            raise wrong(f"{place}.{name}", "tools are not supported", "unsupported_parameter")
        if name not in _MESSAGE_FIELDS | _ANSWER_FIELDS:
            raise wrong(f"{place}.{name[:100]}", "no field of a message", "unknown_parameter")
    role = message.get("role")
    if role in ("system", "developer"):
        return "system"
    if role not in ("user", "assistant"):
        raise wrong(
            f"{place}.role", f"got {shown(role)}, expected system, developer, user or assistant"
        )
    return role


def content(message: Mapping[str, Any], place: str) -> str:
    """Return the text of a message's content: a text, or a list of parts that are texts."""
    value = message.get("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(f"{place}.content", "expected a text or a list of text parts", "invalid_type")
    return _joined(value, f"{place}.content")


def _joined(parts: Sequence[Any], place: str) -> str:
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise wrong(f"{place}[{number}]", f"got {shown(kind)}, only text parts are supported")
        if not isinstance(part.get("text"), str):
            raise wrong(f"{place}[{number}].text", "expected a text", "invalid_type")
        texts.append(part["text"])
    return "".join(texts)


def prompts(body: Mapping[str, Any], vocabulary_size: int) -> list[str | list[int]]:
    """Return the prompts of a completion: texts, or lists of token ids. Raises ApiError."""
    value = body.get("prompt")
    whole_number = _is_id(vocabulary_size)
    if isinstance(value, str) or (
        isinstance(value, list) and value and all(map(whole_number, value))
    ):
        found = [value]
    elif isinstance(value, list) and value:
        found = value
    else:
        raise wrong("prompt", "expected a text, a list of texts, or lists of token ids")
    for number, prompt in enumerate(found):
        good = isinstance(prompt, str) or (
            isinstance(prompt, list) and all(map(whole_number, prompt))
        )
        if not good or not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise wrong(
                f"prompt[{number}]",
                f"expected a text that is not empty, or token ids from 1 to {vocabulary_size - 1}",
            )
    if len(found) > MAX_PROMPTS:
        raise wrong("prompt", f"got {len(found)} prompts, at most {MAX_PROMPTS} are allowed")
    check_size("prompt", [prompt for prompt in found if isinstance(prompt, str)])
    return found


def _is_id(size: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x < size


def check_size(name: str, texts: Sequence[str]) -> None:
    """Raise ApiError for texts that are too long to be worth tokenizing."""
    size = sum(map(len, texts))
    if size > MAX_CHARS:
        raise wrong(
            name,
            f"{size:,} characters, at most {MAX_CHARS:,} are allowed",
            "string_above_max_length",
        )


def check_model(body: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ApiError unless the request names a model of this server."""
    name = body.get("model")
    if not isinstance(name, str):
        raise wrong("model", "expected the name of a model; /v1/models lists them")
    if name not in names:
        raise ApiError(
            404,
            f"The model {shown(name)} does not exist; this server has {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
