"""Requests to a model and its responses: the boundary between the stages and the network.

A stage is a generator: it yields a `Request`, is sent the `Response`, and returns its result. It
opens no socket and reads no clock, so the same responses always make the same record, whatever
their order. `run` drives the generators, and `gateway` answers their requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are the paper's (Kim et al. 2023, appendix A)."""

    max_tokens: int = 1024
    temperature: float = 0.9
    top_p: float = 0.95
    frequency_penalty: float = 1.0
    presence_penalty: float = 0.6
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0  # alternatives wanted for each token, with their log-probabilities
    completion_only: bool = False  # True: the chat form sends max_tokens alone


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of `stage` for record `record_id`, its `attempt` counted from 0.

    The completion form sends `prompt`, the chat form `messages` (role, content). A moderation
    request (`stage` is "moderation") has the text to judge in `prompt`, and no messages.
    """

    record_id: str
    stage: str
    attempt: int
    prompt: str
    messages: tuple[tuple[str, str], ...] = ()
    sampling: Sampling = Sampling()

    def key(self, model: str, form: str, body: str = "{}") -> str:
        """Return this request's key in the journal: equal for equal requests to equal models.

        `body` is the JSON of fields that the user adds to every request. The key covers prompt or
        messages, whichever is sent.
        """
        # Another key for the same request would pay for every answer in users' journals again.
        sampling = dict(vars(self.sampling))
        # Left out where false, because the keys of older journals lack it.
        if not sampling["completion_only"]:
            del sampling["completion_only"]
        asked = {**vars(self), "sampling": sampling, "model": model, "form": form}
        del asked["prompt" if form == "chat" and self.messages else "messages"]
        # Parsed, so that white space in the user's JSON makes no new keys. Left out if empty,
        # because the journals of runs without it have keys without it.
        if more := json.loads(body):
            asked["body"] = more
        # Sorted, so that a reordered dataclass makes no new keys. With surrogatepass, because a
        # text with half a surrogate pair needs a key too.
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Response:
    """The model's answer.

    `finish_reason` is "stop", "length", or the server's own word. `logprobs` has for each token its
    likeliest alternatives {token: log-probability in nats}, or is None if the server gives none.
    `scores` are a moderation's {category: 0 to 1}. `fault` is why the model's reply has no answer:
    a reason of rejections. `written_bytes` counts the reply's text, reasoning included. Tokens are
    0 if the server gives no possible count.
    """

    text: str = ""
    finish_reason: str = "stop"
    logprobs: tuple[dict[str, float], ...] | None = None
    scores: dict[str, float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: str = ""
    written_bytes: int = dataclasses.field(default=0, compare=False)


Stage = Generator[Request, Response, Result]


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that was dropped: at which stage, why (`reason`, counted), and its fields so far."""

    id: str
    stage: str
    reason: str
    record: dict[str, Any]
