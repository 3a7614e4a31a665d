"""Send one request to a model server, return its raw text, and parse that text.

The openai library builds what a server needs: address, key, organisation and headers. Its HTTP
library, httpx2, carries the calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
from typing import Any

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.base.retries import RETRYABLE_STATUS, is_retryable, retry_after
from data_pipeline.calls import answer_text, secrets
from data_pipeline.calls.requests import Request, Response

FORMS = {"completion": "/completions", "chat": "/chat/completions", "moderation": "/moderations"}
# A reply's text begins with one of these exception names if no connection was made.
UNCONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# httpx2 looks through all connections of a pool at each call: 4.4 ms of a core a call with one pool
# of 256, 1.8 ms with 32 pools of 8.
POOL_CONNECTIONS = 8
MAX_ANSWER_BYTES = 1 << 26  # 64 MiB, decompressed; the longest answers have a few MiB
PROBE_WAITS = (0.2, 1.0, 5.0)  # seconds between the tries of a start's first call
MAX_PORT = 65535
TIMED_OUT = "no answer within"
# Words of servers for an answer that the token limit cut off.
CUT_OFF = frozenset(("length", "max_tokens", "max_output_tokens", "model_length", "token_limit"))
# Fields of a message, and types of its parts, that hold reasoning. They are no answer.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_content")
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
    # Always: caps on tokens and cost count on it.
    asked["max_tokens"] = sampling.max_tokens
    names = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
    if server.form != "chat" or not sampling.completion_only:
        asked |= {name: getattr(sampling, name) for name in names}
    # Some servers stream an answer unless the request refuses that.
    asked |= {"seed": seed, "stream": False}
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
    """Return the response in a server's text. Raises AnswerError if there is none.

    The text of the response is the answer alone. One without an answer has a `fault`.
    """
    try:
        # Servers write infinities and numbers of any length, and some a byte order mark.
        answer = json.loads(text.removeprefix("\ufeff"), parse_int=_integer)
        if form == "moderation":
            scores = answer["results"][0]["category_scores"]
            return Response(scores={name: float(value or 0) for name, value in scores.items()})
        choice = answer["choices"][0]
        message = choice["message"] if form == "chat" or "text" not in choice else {}
        words = _words(message.get("content") or message.get("refusal") if message else None)
        words = words or _words(choice.get("text"))
        reasoning = [message[name] for name in REASONING_FIELDS if message.get(name)]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        what = "truncated or no JSON" if isinstance(error, ValueError) else "unexpected JSON"
        raise AnswerError(f"{what}: {str(error) or type(error).__name__}") from error
    except RecursionError as error:
        raise AnswerError("JSON of too many levels") from error
    finish = str(choice.get("finish_reason") or "stop")
    finish = "length" if finish.lower() in CUT_OFF else finish
    if not words.isascii():  # an escaped half of a surrogate pair is no text
        words = words.encode("utf-8", "replace").decode()
    said, fault, reasoned = answer_text.separated(words, finish)
    if not words and finish == "length" and (form == "chat" or reasoning):
        fault = answer_text.USED_UP  # tokens were made, and none of them shown
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Response(
        text=said,
        finish_reason=finish,
        # The first tokens of reasoning would be taken for those of the answer.
        logprobs=None if reasoned else _logprobs(choice.get("logprobs")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        fault=fault,
        written_bytes=len(words.encode()) + sum(len(str(part)) for part in reasoning),
    )


def _words(content: Any) -> str:
    """Return the text of a message's content: a text, or a list of parts.

    Raises TypeError for a part that is neither text nor reasoning.
    """
    if content is None or isinstance(content, str):
        return content or ""
    words = ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") not in REASONING_PARTS:
            part = part.get("text", part.get("refusal"))
            part = part.get("value") if isinstance(part, dict) else part
        elif isinstance(part, dict):
            continue
        if not isinstance(part, str):
            raise TypeError(f"a part of the content is {type(part).__name__}, no text")
        words += part
    return words


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < 20 else float(digits)


def _number(value: Any) -> float:
    """Return a number, or NaN for what is none."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _count(value: Any) -> int:
    """Return a number of tokens, or 0 for what is none. `limits.used_tokens` bounds it."""
    number = _number(value)
    return int(number) if math.isfinite(number) and number > 0 else 0


def _logprobs(given: Any) -> tuple[dict[str, float], ...] | None:
    """Return each token's alternatives, or None if the server gives none.

    An alternative without a number (null where it means minus infinity) is left out.
    """
    if not isinstance(given, dict):
        return None
    tokens: list[list[tuple[Any, Any]]] = []
    if isinstance(given.get("content"), list):  # chat, and servers that use its shape for both
        for token in given["content"]:
            others = token.get("top_logprobs") if isinstance(token, dict) else None
            others = [other for other in others or () if isinstance(other, dict)]
            tokens.append([(other.get("token"), other.get("logprob")) for other in others])
    elif isinstance(given.get("top_logprobs"), list):
        for token in given["top_logprobs"]:
            tokens.append(list(token.items()) if isinstance(token, dict) else [])
    if not tokens:
        return None
    numbered = ([(name, _number(p)) for name, p in token] for token in tokens)
    return tuple(
        {name: p for name, p in token if isinstance(name, str) and not math.isnan(p)}
        for token in numbered
    )


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
            # The path of a call goes before the query, where openai would not put it.
            base = httpx2.URL(server.base_url)
            if not base.host or (base.port or 0) > MAX_PORT:
                fault = f"port {base.port} is above {MAX_PORT}" if base.host else "it has no host"
                raise UserError(f"{server.address}: {fault}", setting="base_url")
            path = base.path.rstrip("/")
            self._urls = {
                form: base.copy_with(path=path + end, fragment=None) for form, end in FORMS.items()
            }
        except openai.OpenAIError as error:
            raise UserError(str(error)) from error
        except httpx2.InvalidURL as error:
            raise UserError(f"{server.address}: {error}", setting="base_url") from error
        headers = {**settings.default_headers, **settings.auth_headers}
        # openai marks headers to leave out with an object that is not a string.
        headers = {name: value for name, value in headers.items() if isinstance(value, str)}
        for pool in self._pools:
            pool.headers.update({**headers, "Content-Type": "application/json"})
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
                pool = self._pools[index]
                request = pool.build_request("POST", self._urls[form], content=data)
                got = await pool.send(request, stream=True)
                content = bytearray()
                try:
                    async for part in got.aiter_bytes():
                        content += part
                        if len(content) > MAX_ANSWER_BYTES:
                            return Reply(0, f"more than {MAX_ANSWER_BYTES >> 20} MiB of answer")
                finally:
                    await got.aclose()
        except (TimeoutError, self._timeouts):
            return Reply(0, f"{TIMED_OUT} {self.server.timeout:g} s")
        except self._no_reply as error:
            return Reply(0, f"{type(error).__name__}: {error}".rstrip(": "))
        finally:
            self._in_flight[index] -= 1
        # An error page need not be UTF-8, but its text goes into UTF-8 files.
        text = content.decode("utf-8", "replace")
        wait = retry_after(got.headers) if got.status_code != 200 else None
        return Reply(got.status_code, text, wait)


async def probe(client: Client, form: str) -> str:
    """Send one small request; return the form that the server takes.

    "auto" tries the completion form first. A server without it, or a model that only converses, is
    tried in the chat form. Raises UserError for no answer, one that cannot be read, a wrong key or
    an unknown model.
    """
    server, unreadable = client.server, ""
    for tried in ("completion", "chat") if form == "auto" else (form,):
        candidate = dataclasses.replace(server, form=tried)
        data = json.loads(request_body(Request("probe", "probe", 0, "Hello"), candidate))
        # One token is enough to see the status, and the cheapest.
        data |= {name: 1 for name in ("max_tokens", "max_completion_tokens") if name in data}
        reply, fault = await _first_reply(client, tried, _dumps(data), form == "auto")
        if reply.status == 0:
            raise UserError(
                f"{server.address} does not answer ({reply.text}): start the server, or correct "
                "the address",
                setting="base_url",
            )
        if fault:
            unreadable = unreadable or (
                f"{server.address}: its answer in the {tried} form cannot be read ({fault}): it "
                f"begins {shown(reply.text[:100])}. Give the address of an OpenAI-compatible API "
                "(it often ends in /v1), or another form"
            )
            continue
        # No such path, or a 400 that names the chat form: the model only converses.
        other = reply.status in (404, 405, 501) or (reply.status == 400 and "chat" in reply.text)
        if form == "auto" and tried == "completion" and other:
            continue
        if unreadable and reply.status != 200:
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
    raise UserError(unreadable, setting=("base_url", "form"))


async def _first_reply(client: Client, form: str, data: bytes, decides: bool) -> tuple[Reply, str]:
    """Return a start's first reply, and why it cannot be read or ""; try again what may pass.

    An overload is tried again only if the reply decides the form, because later calls wait anyway.
    """
    timeouts = 0
    for wait in (*PROBE_WAITS, None):
        reply, fault = await client.post(form, data), ""
        if reply.status == 200:
            try:
                parse_answer(reply.text, form)
                return reply, ""
            except AnswerError as error:
                fault = str(error)
        overloaded = is_retryable(reply.status) and reply.status != 501
        # A call that broke off may have been answered. Without a connection there is no server.
        broke_off = reply.status == 0 and reply.billed
        timeouts += reply.text.startswith(TIMED_OUT)
        again = fault or (overloaded and decides) or (broke_off and timeouts < 2)
        if wait is None or not again:
            break
        await asyncio.sleep(min(reply.retry_after or wait, 30))
    return reply, fault


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
