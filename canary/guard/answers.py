"""Hold a model's answer back until its sentences are judged. Pure: no socket, no clock.

`Gate` takes the chunks of a stream, or a whole body, in OpenAI's form. It returns items in the
order in which they may leave: `Ready` at once, `Held` after its text has passed. Chunks are built
anew from known fields, so that nothing leaves in a field that is not known.

Every text that a model writes is held: content, reasoning, refusals, calls of tools,
log-probabilities. Calls are judged whole, with the escapes of their JSON undone.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from canary.guard import dialogue
from canary.guard.sentences import Splitter, whole
from cosmo.engine.base import json_lines

Form = Literal["chat", "completion"]
TEXTS = ("reasoning_content", "reasoning", "content", "refusal")  # fields of a delta that hold text
OBJECTS = {
    ("chat", True): "chat.completion.chunk",
    ("chat", False): "chat.completion",
    ("completion", True): "text_completion",
    ("completion", False): "text_completion",
}
FINISHES = ("stop", "length", "tool_calls", "function_call", "content_filter")
FILTERED = "content_filter"  # the finish_reason of an answer that was not passed whole
# Texts of the server, not of the model: they are short, and taken from the first chunk alone.
_SERVERS = {"id": r"[\w.:/-]{1,128}", "model": r"[\w.:/@+-]{1,128}"}
_SERVERS |= {"system_fingerprint": r"[\w.:-]{1,64}", "service_tier": r"\w{1,32}"}
_CALL_ID = re.compile(r"[\w.:-]{1,128}", re.A)
_TOKEN_COUNTS = ("cached_tokens", "audio_tokens", "reasoning_tokens")
_USAGE = {
    "prompt_tokens": None,
    "completion_tokens": None,
    "total_tokens": None,
    "prompt_tokens_details": _TOKEN_COUNTS,
    "completion_tokens_details": (
        *_TOKEN_COUNTS,
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
    ),
}
MAX_CALLS = 128  # of tools in one answer
RESYNC_CHARS = 16  # that a server may leave out between two tokens, such as white space


class GarbageError(ValueError):
    """An answer that is not in OpenAI's form."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A chunk that holds no text of the model. `choice` is None for one of the whole answer."""

    choice: int | None
    chunk: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Held:
    """A chunk that may leave once `text`, which follows `before` in its field, has passed."""

    choice: int
    field: str
    before: str
    text: str
    chunk: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failed:
    """An error that the upstream sent in place of a chunk."""

    choice: None
    error: Any


Item = Ready | Held | Failed


class Gate:
    """The held parts of one answer, of all its choices."""

    def __init__(
        self,
        form: Form,
        *,
        sentence_chars: int,
        context_chars: int,
        max_choices: int,
        alternatives: bool = False,
        begun: str = "",
    ):
        self.form: Form = form
        self.sentence_chars, self.context_chars = sentence_chars, context_chars
        self.max_choices, self.alternatives, self.begun = max_choices, alternatives, begun
        self.base: dict[str, Any] = {"object": OBJECTS[form, True]}
        self.choices: dict[int, _Choice] = {}

    def feed(self, chunk: Any) -> list[Item]:
        """Return the items that a chunk completes. Raises GarbageError."""
        if not isinstance(chunk, dict):
            raise GarbageError(f"a chunk is no object but {type(chunk).__name__}")
        self._take_base(chunk)
        if not chunk.get("choices") and (error := _error(chunk)):
            return [*self.finish(), Failed(None, error)]
        items: list[Item] = []
        for choice in self._choices(chunk):
            items += choice
        if isinstance(chunk.get("usage"), dict):
            usage = {"choices": [], "usage": numbers(chunk["usage"])}
            items.append(Ready(None, {**self.base, **usage}))
        return items

    def finish(self) -> list[Item]:
        """Return what is still held: the stream has ended, or broken off."""
        return [item for choice in self.choices.values() for item in choice.flush()]

    def text_chunk(self, choice: int, field: str, text: str) -> dict[str, Any]:
        """Return a chunk with a text in a field."""
        part = {"text": text} if self.form == "completion" else {"delta": {field: text}}
        return self._chunk(choice, {**part, "logprobs": None, "finish_reason": None})

    def end_chunk(self, choice: int, reason: str) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        return self._chunk(choice, {**self._empty(), "logprobs": None, "finish_reason": reason})

    def label_chunk(self, choice: int) -> dict[str, Any]:
        """Return an empty chunk, to carry the guard's own field."""
        return self._chunk(choice, {**self._empty(), "logprobs": None, "finish_reason": None})

    def _empty(self) -> dict[str, Any]:
        return {"text": ""} if self.form == "completion" else {"delta": {}}

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.base, "choices": [{"index": index, **choice}]}

    def _take_base(self, chunk: dict[str, Any]) -> None:
        for name, shape in _SERVERS.items():
            value = chunk.get(name)
            if (
                name not in self.base
                and isinstance(value, str)
                and re.fullmatch(shape, value, re.A)
            ):
                self.base[name] = value
        if "created" not in self.base and type(chunk.get("created")) is int:
            self.base["created"] = chunk["created"]

    def _choices(self, chunk: dict[str, Any]) -> Iterator[list[Item]]:
        found = chunk.get("choices")
        if found is None:
            return
        if not isinstance(found, list):
            raise GarbageError(f"choices is no list but {type(found).__name__}")
        for place, one in enumerate(found):
            if not isinstance(one, dict):
                raise GarbageError(f"a choice is no object but {type(one).__name__}")
            index = one.get("index", place)
            if type(index) is not int or not 0 <= index < self.max_choices:
                raise GarbageError(f"a choice's index is not 0 to {self.max_choices - 1}")
            choice = self.choices.get(index)
            if choice is None:
                choice = self.choices[index] = _Choice(self, index)
            if not choice.ended:
                yield list(choice.feed(one))


class _Choice:
    """One choice of an answer: its fields, and whether it has ended."""

    def __init__(self, gate: Gate, index: int):
        self.gate, self.index, self.ended, self.begun = gate, index, False, False
        self.texts: dict[str, _Text] = {}
        self.calls: dict[Any, _Call] = {}

    def feed(self, one: dict[str, Any]) -> Iterator[Item]:
        form = self.gate.form
        delta = one.get("delta") or one.get("message") or {}
        if not isinstance(delta, dict):
            raise GarbageError(f"a delta is no object but {type(delta).__name__}")
        if form == "chat" and not self.begun:
            # The client may know that an answer begins. It has no text yet.
            yield Ready(self.index, self._chunk({"role": "assistant", "content": ""}))
        self.begun = True
        logprobs = one.get("logprobs")
        logprobs = logprobs if isinstance(logprobs, dict) else {}
        if form == "completion":
            yield from self._text("text", one.get("text"), _completion_tokens(logprobs))
        else:
            for field in TEXTS:
                tokens = logprobs.get(field)
                yield from self._text(field, delta.get(field), tokens)
            self._call_parts(delta)
        if one.get("finish_reason") is not None:
            yield from self.flush()
            reason = one["finish_reason"]
            reason = reason if reason in FINISHES else "stop"
            yield Ready(self.index, self.gate.end_chunk(self.index, reason))
            self.ended = True

    def flush(self) -> Iterator[Item]:
        """Yield all that is held."""
        for text in self.texts.values():
            yield from text.finish()
        calls, self.calls = self.calls, {}
        for place, call in enumerate(calls.values()):
            delta, words = call.whole(place)
            yield Held(self.index, call.field, "", words, self._chunk(delta))

    def _text(self, field: str, value: Any, tokens: Any) -> Iterator[Item]:
        value = _plain(value)
        tokens = tokens if isinstance(tokens, list) else []
        if not value and not tokens:
            return
        if field not in self.texts:
            # Reasoning has ended where content begins: what is left of it may be judged.
            for other in self.texts.values():
                yield from other.finish()
            self.texts[field] = _Text(self, field)
        yield from self.texts[field].add(value, tokens)

    def _call_parts(self, delta: dict[str, Any]) -> None:
        parts = delta.get("tool_calls")
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict):
                index = part.get("index", place)
                self._call(index if type(index) is int else place, "tool_calls").add(part)
        if isinstance(delta.get("function_call"), dict):
            self._call("function", "function_call").add({"function": delta["function_call"]})

    def _call(self, key: Any, field: str) -> "_Call":
        if key not in self.calls:
            if len(self.calls) >= MAX_CALLS:
                raise GarbageError(f"an answer has more than {MAX_CALLS} calls of tools")
            self.calls[key] = _Call(field)
        return self.calls[key]

    def _chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return self.gate._chunk(self.index, choice)


class _Text:
    """One text field of a choice: what is held of it, and the tokens that belong to it."""

    def __init__(self, choice: _Choice, field: str):
        self.choice, self.field = choice, field
        self.splitter = Splitter(choice.gate.sentence_chars)
        self.context = choice.gate.begun if field in ("content", "text") else ""
        self.tokens = Tokens(choice.gate.alternatives)

    def add(self, text: str, tokens: list[Any]) -> Iterator[Item]:
        self.tokens.wait(tokens)
        yield from map(self._item, self.splitter.add(text))

    def finish(self) -> Iterator[Item]:
        yield from map(self._item, self.splitter.finish())

    def _item(self, sentence: str) -> Item:
        gate, index = self.choice.gate, self.choice.index
        chunk = gate.text_chunk(index, self.field, sentence)
        if tokens := self.tokens.of(sentence):
            packed = _packed(tokens) if gate.form == "completion" else {self.field: tokens}
            chunk["choices"][0]["logprobs"] = packed
        before = self.context
        self.context = (before + sentence)[-gate.context_chars :]
        if not sentence.strip():
            return Ready(index, chunk)  # white space alone: there is nothing to judge
        return Held(index, self.field, before, sentence, chunk)


class _Call:
    """One call of a tool, collected until the answer ends."""

    def __init__(self, field: str):
        self.field, self.id, self.kind, self.name, self.arguments = field, "", "function", [], []

    def add(self, part: dict[str, Any]) -> None:
        kind = "custom" if part.get("type") == "custom" or "custom" in part else "function"
        self.kind = kind if self.kind == "function" else self.kind
        if isinstance(part.get("id"), str) and _CALL_ID.fullmatch(part["id"]):
            self.id = self.id or part["id"]
        call = part.get(kind)
        call = call if isinstance(call, dict) else {}
        for field, texts in (("name", self.name), ("arguments", self.arguments)):
            field = "input" if (field, kind) == ("arguments", "custom") else field
            if isinstance(call.get(field), str):
                texts.append(call[field])

    def whole(self, place: int) -> tuple[dict[str, Any], str]:
        """Return (the delta with the call, its words to judge)."""
        name, arguments = whole("".join(self.name)), whole("".join(self.arguments))
        words = dialogue.argument_text(name, arguments)
        if self.field == "function_call":
            return {"function_call": {"name": name, "arguments": arguments}}, words
        given = "input" if self.kind == "custom" else "arguments"
        call = {"index": place, "id": self.id or f"call_{place}", "type": self.kind}
        return {"tool_calls": [{**call, self.kind: {"name": name, given: arguments}}]}, words


class Tokens:
    """The tokens of a text with their log-probabilities, which leave with the text they hold.

    A token leaves if it stands in the text where the one before it ended, wholly within a sentence
    that leaves. Any other is left out: its characters were judged nowhere.
    """

    def __init__(self, alternatives: bool):
        self.alternatives = alternatives
        self.waiting: list[dict[str, Any]] = []
        self.text = ""  # that has left, from the end of the last token on
        self.partial = b""  # bytes of a character that several tokens share

    def wait(self, tokens: Iterable[Any]) -> None:
        """Take the tokens that come with a piece of the text."""
        self.waiting += [one for one in tokens if isinstance(one, dict)]

    def of(self, sentence: str) -> list[dict[str, Any]]:
        """Return the tokens that end in `sentence`, which is the next of the text."""
        if not self.waiting:
            self.text = (self.text + sentence)[-RESYNC_CHARS:]
            return []
        self.text += sentence
        found, place = [], 0
        for number, token in enumerate(self.waiting):
            end = self._end(token, place)
            if end is None:
                # Its rest may come with the next sentence.
                self.waiting = self.waiting[number:]
                break
            if end >= place:
                words = token["token"]
                found.append(self._clean(token, self.text[place:end].endswith(words)))
                place = end
        else:
            self.waiting = []
        self.text = self.text[place:]
        return found

    def _end(self, token: dict[str, Any], place: int) -> int | None:
        """Return where a token ends; None if it may lie ahead, -1 if it is not in the text."""
        text, words = self.text, token.get("token")
        if not isinstance(words, str) or not words:
            return -1
        if not self.partial:
            start = text.find(words, place, place + RESYNC_CHARS + len(words))
            if start >= 0:
                return start + len(words)
        data = _bytes(token)
        if data is not None:
            # Servers write a part of a character as an escape, and its bytes beside it.
            character = text[place : place + 1].encode("utf-8", "replace")
            grown = self.partial + data
            if character and grown == character:
                self.partial = b""
                return place + 1
            if character and character.startswith(grown):
                self.partial = grown
                return place
        self.partial = b""
        # The text held so far may be the beginning of this token.
        rest = text[place:]
        ahead = any(
            words.startswith(rest[skip:]) for skip in range(min(len(rest), RESYNC_CHARS) + 1)
        )
        return None if len(rest) <= RESYNC_CHARS + len(words) and ahead else -1

    def _clean(self, token: dict[str, Any], in_text: bool) -> dict[str, Any]:
        """Return a token that leaves; `in_text` is whether its words stand in the text."""
        data, words = _bytes(token), token["token"]
        if data is not None and in_text:
            # The text was judged; the bytes that a token names were not.
            data = json_lines.encode(words)
        elif data is not None:
            words = data.decode("utf-8", "replace")
        clean: dict[str, Any] = {"token": words, "logprob": _number(token.get("logprob"))}
        clean["bytes"] = list(data) if data is not None else None
        if "offset" in token:
            clean["offset"] = token["offset"] if type(token["offset"]) is int else 0
        top = token.get("top_logprobs")
        others = top if self.alternatives and isinstance(top, list) else []
        clean["top_logprobs"] = [
            {"token": whole(one["token"]), "logprob": _number(one.get("logprob")), "bytes": None}
            for one in others
            if isinstance(one, dict) and isinstance(one.get("token"), str)
        ]
        return clean


def _error(chunk: dict[str, Any]) -> Any:
    """Return the error that a chunk is, None for any other. Raises GarbageError."""
    error = chunk.get("error")
    if not error and chunk.get("object") == "error":  # older servers have it without a frame
        error = {name: chunk.get(name) for name in ("message", "type", "param", "code")}
    if error and holds_choices(json.dumps(error)):
        raise GarbageError("an error holds an answer")
    return error


def holds_choices(text: str) -> bool:
    """Return whether JSON has the name of a field with a model's answers, at any depth."""
    return '"choices"' in text


def _bytes(token: dict[str, Any]) -> bytes | None:
    data = token.get("bytes")
    if isinstance(data, list) and all(type(one) is int and 0 <= one < 256 for one in data):
        return bytes(data)
    return None


def _number(value: Any) -> float | None:
    # Python reads and writes NaN and infinity, which are not JSON.
    good = type(value) is int or (type(value) is float and math.isfinite(value))
    return value if good else None


def _plain(value: Any) -> str:
    """Return the text of a field, which some servers give as a list of parts."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _completion_tokens(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens of a completion's log-probabilities in chat's form."""
    columns = [logprobs.get(name) for name in ("token_logprobs", "top_logprobs", "text_offset")]
    tokens = logprobs.get("tokens")
    found = []
    for place, words in enumerate(tokens if isinstance(tokens, list) else ()):
        likely, top, offset = (
            column[place] if isinstance(column, list) and place < len(column) else None
            for column in columns
        )
        top = top.items() if isinstance(top, dict) else ()
        others = [{"token": name, "logprob": value} for name, value in top]
        one = {"token": words, "logprob": likely, "offset": offset, "top_logprobs": others}
        found.append(one)
    return found


def _packed(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens as a completion's log-probabilities."""
    tops = [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in tokens]
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [token["offset"] for token in tokens],
    }


def numbers(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the known counts of tokens: numbers alone."""
    found: dict[str, Any] = {}
    for name, inner in _USAGE.items():
        value = usage.get(name)
        if inner is None and _number(value) is not None:
            found[name] = value
        elif inner is not None and isinstance(value, dict):
            found[name] = {key: value[key] for key in inner if _number(value.get(key)) is not None}
    return found


def body(gate: Gate, chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the chunks that have left as one body, as an answer without a stream has it."""
    found: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage", usage)
        for one in chunk["choices"]:
            known = found.setdefault(one["index"], {"index": one["index"], "finish_reason": None})
            _add(known, one, gate.form)
    whole_body = {**gate.base, "object": OBJECTS[gate.form, False]}
    whole_body["choices"] = [found[index] for index in sorted(found)]
    return whole_body if usage is None else {**whole_body, "usage": usage}


def _add(known: dict[str, Any], one: dict[str, Any], form: Form) -> None:
    """Add a chunk's choice to the choice of a body."""
    known["finish_reason"] = one["finish_reason"] or known["finish_reason"]
    logprobs = known.setdefault("logprobs", None)
    for name, tokens in (one["logprobs"] or {}).items():
        logprobs = known["logprobs"] = known["logprobs"] or {}
        logprobs[name] = (logprobs.get(name) or []) + (tokens or []) or None
    if form == "completion":
        known["text"] = known.get("text", "") + one["text"]
        return
    message = known.setdefault("message", {"role": "assistant", "content": None})
    for field, value in one["delta"].items():
        if field in TEXTS and (value or field != "content"):
            message[field] = (message.get(field) or "") + value
        elif field == "tool_calls":
            # A body's calls are in order, without their numbers.
            calls = [{k: v for k, v in call.items() if k != "index"} for call in value]
            message.setdefault(field, []).extend(calls)
        elif field == "function_call":
            message[field] = value
