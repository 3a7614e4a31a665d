"""Write answers as OpenAI's API has them: whole, and in the chunks of a stream."""

import dataclasses
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from cosmo.serve.answers import Delta, TokenEntry, Usage, Whole


class Shape(Protocol):
    """The JSON of one endpoint."""

    def whole(self, found: Sequence[Whole], usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the body of an answer in one piece."""

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first text."""

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return the chunk of a delta."""

    def last(self, usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the chunk of the counts."""


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


@dataclasses.dataclass(frozen=True)
class Chat:
    """The shape of /v1/chat/completions. `further` are fields of ours beside every message."""

    model: str
    started: int
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: str = dataclasses.field(default_factory=lambda: _new_id("chatcmpl"))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, found: Sequence[Whole], usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the body of an answer in one piece."""
        choices = []
        for index, one in enumerate(found):
            message = {"role": "assistant", "content": one.text, "refusal": None, **self.further}
            if one.rots is not None:
                message["rots"] = list(one.rots)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _chat_logprobs(one.logprobs) if one.logprobs else None,
                    "finish_reason": one.finish,
                }
            )
        return {**self._head("chat.completion", choices), "usage": usage.body(), "input_cut": cut}

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield a chunk for each answer that names its role."""
        for index in range(count):
            yield self._chunk(index, {"role": "assistant", "content": "", **self.further})

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return the chunk of a delta."""
        fields: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.rots is not None:
            fields["rots"] = list(delta.rots)
        logprobs = _chat_logprobs(delta.logprobs) if delta.logprobs else None
        return self._chunk(delta.sample, fields, delta.finish, logprobs)

    def last(self, usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the chunk of the counts."""
        head = self._head("chat.completion.chunk", [])
        return {**head, "usage": usage.body(), "input_cut": cut}

    def _chunk(self, index: int, delta: Mapping[str, Any], finish=None, logprobs=None):
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head("chat.completion.chunk", [choice])

    def _head(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return _head(self, kind, choices)


@dataclasses.dataclass(frozen=True)
class Completion:
    """The shape of /v1/completions."""

    model: str
    started: int
    id: str = dataclasses.field(default_factory=lambda: _new_id("cmpl"))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, found: Sequence[Whole], usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the body of an answer in one piece."""
        choices = [
            self._choice(index, one.text, one.finish, one.logprobs)
            for index, one in enumerate(found)
        ]
        return {**_head(self, "text_completion", choices), "usage": usage.body()}

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield nothing: a completion has no role."""
        yield from ()

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return the chunk of a delta."""
        choice = self._choice(delta.sample, delta.text, delta.finish, delta.logprobs)
        return _head(self, "text_completion", [choice])

    def last(self, usage: Usage, cut: bool) -> dict[str, Any]:
        """Return the chunk of the counts."""
        return {**_head(self, "text_completion", []), "usage": usage.body()}

    def _choice(self, index: int, text: str, finish: str | None, entries: Any) -> dict[str, Any]:
        logprobs = _completion_logprobs(entries) if entries else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _head(shape: Any, kind: str, choices: list[Any]) -> dict[str, Any]:
    return {
        "id": shape.id,
        "object": kind,
        "created": shape.created,
        "model": shape.model,
        # Equal seeds give equal answers as long as it stays.
        "system_fingerprint": f"fp_{shape.started:x}",
        "choices": choices,
    }


def _chat_logprobs(entries: Sequence[TokenEntry]) -> dict[str, Any]:
    def token(piece, logprob):
        return {"token": piece.text, "logprob": logprob, "bytes": list(piece.data)}

    content = [
        {**token(e.piece, e.logprob), "top_logprobs": [token(*one) for one in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(entries: Sequence[TokenEntry]) -> dict[str, Any]:
    return {
        "tokens": [entry.piece.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {piece.text: logprob for piece, logprob in entry.top} or None for entry in entries
        ],
        "text_offset": [entry.start for entry in entries],
    }


def moderation(chirp: Any) -> dict[str, Any]:
    """Return a Chirp of Canary's as a result of /v1/moderations."""
    return {
        "flagged": chirp.label != "__casual__",
        "categories": {label: label == chirp.label for label in chirp.probabilities},
        "category_scores": dict(chirp.probabilities),
        "label": chirp.label,
        "rots": list(chirp.rots),
        "needs_human": chirp.needs_human,
    }
