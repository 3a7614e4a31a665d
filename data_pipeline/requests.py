"""What the stages ask of a model, and what comes back: the seam between them and the network.

A stage that needs a model is a generator: it yields a `Request`, is sent the `Response`, and
returns its result. It opens no socket and reads no clock, so the same responses always make the
same record, in whatever order and with however many at once they were fetched. The engine
(`run`) drives the generators, and answers a request from the journal if it was answered before.
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
    """How a completion is drawn; the defaults are the paper's (Kim et al. 2023, appendix A)."""

    max_tokens: int = 1024
    temperature: float = 0.9
    top_p: float = 0.95
    frequency_penalty: float = 1.0
    presence_penalty: float = 0.6
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0  # alternatives wanted for each token, with their log-probabilities


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to the model: of `stage`, for record `record_id`, the `attempt`-th from 0.

    `prompt` is the text of the completion form; `messages` (role, content) that of the chat form.
    The engine sends the one that the server takes. Of a moderation request (`stage` is
    "moderation") `prompt` is the text to be judged, and `messages` is empty.
    """

    record_id: str
    stage: str
    attempt: int
    prompt: str
    messages: tuple[tuple[str, str], ...] = ()
    sampling: Sampling = Sampling()

    def key(self, model: str, form: str, body: str = "{}") -> str:
        """What names this request in the journal: equal for equal questions to equal models.

        `body` is the JSON of fields that the user adds to every request. Of prompt and messages
        the one counts that is sent. Other keys would lose every journal that there is.
        """
        asked = {**vars(self), "sampling": vars(self.sampling), "model": model, "form": form}
        del asked["prompt" if form == "chat" and self.messages else "messages"]
        if more := json.loads(body):
            asked["body"] = more
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Response:
    """The model's answer.

    `finish_reason` is "stop", "length", or what the server said. `logprobs` holds for each token
    its likeliest alternatives {token: log-probability in nats}, or is None where the server gives
    none. `scores` are a moderation's {category: 0 to 1}.
    """

    text: str = ""
    finish_reason: str = "stop"
    logprobs: tuple[dict[str, float], ...] | None = None
    scores: dict[str, float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


Stage = Generator[Request, Response, Result]


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that does not go on: why (`reason`, counted), at which stage, and how it looked."""

    id: str
    stage: str
    reason: str
    record: dict[str, Any]
