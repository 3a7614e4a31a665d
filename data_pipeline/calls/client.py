"""Send one request to a model server, return its raw text, and parse that text.

The openai library builds what a server needs: address, key, organisation and headers. Its HTTP
library, httpx2, carries the calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import time
from typing import Any

from cosmo.engine.base.errors import UserError
from data_pipeline.calls import secrets
from data_pipeline.calls.requests import Request, Response

FORMS = {"completion": "/completions", "chat": "/chat/completions", "moderation": "/moderations"}
# A reply's text begins with one of these exception names if no connection was made.
UNCONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# httpx2 looks through all connections of a pool at each call: 4.4 ms of a core a call with one pool
# of 256, 1.8 ms with 32 pools of 8.
POOL_CONNECTIONS = 8
MAX_TOKENS = 10**9  # no prompt or answer has more tokens
NO_KEY = "none"  # local servers want no key, but the library wants one


@dataclasses.dataclass(frozen=True)
class Server:
    """A model server: address, model, form.

    `key_variable` names the environment variable with the key, which is stored nowhere else.
    """

    base_url: str
    model: str
    form: str = "completion"
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    extra_body: str = "{}"  # JSON: fields to add to every body; null takes one away

    @property
    def address(self) -> str:
        """Return `base_url` without its secrets."""
        return secrets.address(self.base_url)

    def key(self) -> str:
        """Return the key from the environment. Raises UserError, which does not show the key."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"the environment variable {self.key_variable} holds characters that no header "
                "can carry: set it to the key alone"
            )
        return key or NO_KEY


@dataclasses.dataclass(frozen=True)
class Reply:
    """The outcome of one call. Status 0 means that no reply came; `text` then gives the cause."""

    status: int
    text: str
    retry_after: float | None = None  # seconds

    @property
    def billed(self) -> bool:
        """Return whether the server may have made an answer, and charge for it."""
        # A call that timed out or broke off may have been answered. One without a connection was
        # not.
        return self.status == 200 or (self.status == 0 and not self.text.startswith(UNCONNECTED))


class AnswerError(ValueError):
    """A reply of status 200 is cut off, or not in the expected form."""


def request_body(request: Request, server: Server, seed: int = 0) -> bytes:
    """Return a request as JSON in the server's form.

    A server that obeys the seed answers the same request alike, and another attempt differently.
    """
    if request.stage == "moderation":
        return _dumps({"model": server.model, "input": request.prompt})
    sampling = request.sampling
    asked: dict[str, Any] = {"model": server.model}
    if server.form == "chat":
        messages = request.messages or (("user", request.prompt),)
        asked["messages"] = [{"role": role, "content": text} for role, text in messages]
        if sampling.top_logprobs:
            asked |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    else:
        asked["prompt"] = request.prompt
        if sampling.top_logprobs:
            asked["logprobs"] = sampling.top_logprobs
    names = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty")
    asked |= {name: getattr(sampling, name) for name in names}
    asked["seed"] = seed
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if server.extra_body != "{}":
        asked |= json.loads(server.extra_body)
        asked = {name: value for name, value in asked.items() if value is not None}
    return _dumps(asked)


def _dumps(asked: dict[str, Any]) -> bytes:
    # Half of a surrogate pair is no text that UTF-8 can carry.
    return json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace")


def parse_answer(text: str, form: str) -> Response:
    """Return the response in a server's text. Raises AnswerError if there is none."""
    try:
        answer = json.loads(text)
        if form == "moderation":
            scores = answer["results"][0]["category_scores"]
            return Response(scores={name: float(value or 0) for name, value in scores.items()})
        choice = answer["choices"][0]
        if form == "chat":
            message = choice["message"]
            words = message.get("content") or message.get("refusal") or ""
        else:
            words = choice["text"] or ""
        if not isinstance(words, str):
            raise TypeError(f"text is {type(words).__name__}")
        if not words.isascii():  # an escaped half of a surrogate pair is no text
            words = words.encode("utf-8", "replace").decode()
        prompt_tokens, completion_tokens = _usage(answer.get("usage") or {})
        return Response(
            text=words,
            finish_reason=choice.get("finish_reason") or "stop",
            logprobs=_logprobs(choice.get("logprobs"), form),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        what = "truncated or no JSON" if isinstance(error, ValueError) else "unexpected JSON"
        raise AnswerError(f"{what}: {str(error) or type(error).__name__}") from error
    except RecursionError as error:
        raise AnswerError("JSON of too many levels") from error


def _usage(usage: dict) -> tuple[int, int]:
    """Return prompt and completion tokens, or zeros if one is no possible count.

    Raises ValueError or TypeError for what is no number.
    """
    counts = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    return counts if all(0 <= count <= MAX_TOKENS for count in counts) else (0, 0)


def _logprobs(given: dict | None, form: str) -> tuple[dict[str, float], ...] | None:
    """Return each token's alternatives, or None if the server gives none."""
    if not given:
        return None
    if given.get("content"):  # chat, and servers that use its shape for both
        return tuple(
            {other["token"]: float(other["logprob"]) for other in token.get("top_logprobs") or []}
            for token in given["content"]
        )
    if given.get("top_logprobs"):
        tokens = given["top_logprobs"]
        return tuple({name: float(p) for name, p in (token or {}).items()} for token in tokens)
    return None


def retry_after(headers: Any, now: float | None = None) -> float | None:
    """Return the seconds to wait by `retry-after-ms` or `Retry-After` (RFC 9110, 10.2.3)."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        given = headers.get("retry-after")
        if not given:
            return None
        try:
            return max(0.0, float(given))
        except ValueError:
            then = email.utils.parsedate_to_datetime(given).timestamp()
            return max(0.0, then - (time.time() if now is None else now))
    except (ValueError, TypeError, OverflowError):
        return None


class Client:
    """Calls to one server, many at once. `async with Client(server, connections) as client:`.

    Raises UserError if the openai library is missing or refuses the settings.
    """

    def __init__(self, server: Server, connections: int):
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise UserError(f"{error}: pip install -e '.[co3]'") from error
        self.server = server
        # `limits` bounds the calls, so the pools must not: a call that waits in a pool would use up
        # its timeout there. Keeping every connection saves a handshake for each call.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=POOL_CONNECTIONS)
        verify = httpx2.create_ssl_context()  # it takes 20 ms, so the pools share one
        self._pools = [
            httpx2.AsyncClient(limits=limits, timeout=server.timeout, verify=verify)
            for _ in range(-(-connections // POOL_CONNECTIONS))
        ]
        self._in_flight = [0] * len(self._pools)
        try:
            settings = openai.AsyncOpenAI(
                base_url=server.base_url, api_key=server.key(), http_client=self._pools[0]
            )
        except openai.OpenAIError as error:
            raise UserError(str(error)) from error
        headers = {**settings.default_headers, **settings.auth_headers}
        # openai marks headers to leave out with an object that is no string.
        headers = {name: value for name, value in headers.items() if isinstance(value, str)}
        for pool in self._pools:
            pool.headers.update({**headers, "Content-Type": "application/json"})
        base = str(settings.base_url).rstrip("/")
        self._urls = {form: httpx2.URL(base + path) for form, path in FORMS.items()}
        self._timeouts, self._no_reply = httpx2.TimeoutException, httpx2.RequestError

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        for pool in self._pools:
            await pool.aclose()

    async def post(self, form: str, data: bytes) -> Reply:
        """Send one request body; return the reply, or why none came (status 0)."""
        index = self._in_flight.index(min(self._in_flight))
        self._in_flight[index] += 1
        try:
            # The library's timeout bounds each read. This one bounds the whole call, so a header
            # or an answer that arrives byte by byte cannot hold a place for ever.
            async with asyncio.timeout(self.server.timeout):
                # Not through `openai.post`: it costs 0.35 ms of a core more for each call.
                got = await self._pools[index].post(self._urls[form], content=data)
        except (TimeoutError, self._timeouts):
            return Reply(0, f"no answer within {self.server.timeout:g} s")
        except self._no_reply as error:
            return Reply(0, f"{type(error).__name__}: {error}".rstrip(": "))
        finally:
            self._in_flight[index] -= 1
        # An error page need not be UTF-8, but its text goes into UTF-8 files.
        text = got.content.decode("utf-8", "replace")
        wait = retry_after(got.headers) if got.status_code != 200 else None
        return Reply(got.status_code, text, wait)


async def probe(client: Client, form: str) -> str:
    """Send one small request; return the form that the server takes.

    "auto" tries the completion form first. A server without it, or a model that only converses, is
    tried in the chat form. Raises UserError for no answer, a wrong key or an unknown model.
    """
    server = client.server
    for tried in ("completion", "chat") if form == "auto" else (form,):
        candidate = dataclasses.replace(server, form=tried)
        data = json.loads(request_body(Request("probe", "probe", 0, "Hello"), candidate))
        # One token is enough to see the status, and the cheapest.
        data |= {name: 1 for name in ("max_tokens", "max_completion_tokens") if name in data}
        # The form is kept for later starts, so an overloaded server must not decide it.
        for wait in (0.2, 1.0, 5.0, None) if form == "auto" else (None,):
            reply = await client.post(tried, _dumps(data))
            passing = reply.status in RETRYABLE_STATUS or (
                reply.status >= 500 and reply.status != 501
            )
            if not passing or wait is None:
                break
            await asyncio.sleep(min(reply.retry_after or wait, 30))
        if reply.status == 0:
            raise UserError(
                f"{server.address} does not answer ({reply.text}): start the server, or correct "
                "the address",
                setting="base_url",
            )
        # No such path, or a 400 that names the chat form: the model only converses.
        other = reply.status in (404, 405, 501) or (reply.status == 400 and "chat" in reply.text)
        if form == "auto" and tried == "completion" and other:
            continue
        if is_final(reply) or is_refused(reply):
            raise refusal(reply, candidate)
        if form == "auto" and reply.status != 200:
            raise UserError(
                f"{server.address}: {_status_line(reply)}: this does not show whether it takes "
                "completions or chat; try again later, or set the form",
                setting="form",
            )
        return tried
    raise AssertionError("unreachable: the chat form is returned or refused")


RETRYABLE_STATUS = (408, 409, 425, 429)  # the 4xx that another try may pass


def is_refused(reply: Reply) -> bool:
    """Return whether the server refuses this request. A redirection is not followed."""
    return 0 < reply.status < 500 and reply.status != 200 and reply.status not in RETRYABLE_STATUS


def is_final(reply: Reply) -> bool:
    """Return whether no call can succeed before the user changes something."""
    unpaid = reply.status == 429 and "insufficient_quota" in reply.text
    return reply.status in (401, 402, 404, 405) or unpaid


def _status_line(reply: Reply) -> str:
    return f"{reply.status}: {' '.join(reply.text.split())[:300]}"


def refusal(reply: Reply, server: Server) -> UserError:
    """Return the error for a refusal: its meaning on one line, and the remedy."""
    where = f"{server.address}: {_status_line(reply)}"
    if reply.status < 400:
        text = f"{where}. The server redirects: correct the address (https?)"
        return UserError(text, setting="base_url")
    if reply.status == 401:
        return UserError(f"{where}. The key is that of the variable {server.key_variable}")
    if reply.status in (402, 429):
        return UserError(f"{where}. The account has no money left")
    if reply.status in (404, 405):
        path = FORMS[server.form]
        return UserError(
            f"{where}. There is no {path} with a model {server.model!r}. The address often ends in "
            "/v1",
            setting=("base_url", "model", "form"),
        )
    return UserError(f"{where}. Change the fields of the request", setting="body")
