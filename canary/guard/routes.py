"""Serve OpenAI's API in front of another server: judge turns, guide, hold answers, intervene."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from canary.guard import answers, audit, dialogue
from canary.guard.answers import Failed, Form, Gate, Held, Item, Ready
from canary.guard.judging import HUMAN, CanaryFailedError, Judge, Verdict, of_model
from canary.guard.people import People
from canary.guard.policy import Policy
from canary.guard.upstream import Answer, Headers, Upstream, UpstreamError
from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import shortened, shown
from cosmo.engine.web import sse
from cosmo.engine.web.app import json_object, left
from cosmo.engine.web.errors import ApiError
from cosmo.engine.web.metrics import Metrics

log = logging.getLogger("canary.guard")

PATHS: dict[Form, str] = {"chat": "/chat/completions", "completion": "/completions"}
# Fields of a request, outside its messages, in which text or sound could pass by the guard.
UNREAD: dict[Form, tuple[str, ...]] = {
    "chat": (
        "prompt",
        "input",
        "input_ids",
        "documents",
        "audio",
        "chat_template",
        "prompt_embeds",
    ),
    "completion": ("messages", "input", "input_ids", "prompt_embeds", "prompt_token_ids"),
}
# Fields that the guard reads. Some servers take a field whatever the case of its letters: one that
# differs from these in it alone would be the one that counts.
READ: dict[Form, frozenset[str]] = {
    "chat": frozenset({"messages", "n", "stream", "modalities", *dialogue.EXTRA, *UNREAD["chat"]}),
    "completion": frozenset(
        {"prompt", "suffix", "n", "stream", *dialogue.EXTRA, *UNREAD["completion"]}
    ),
}
ITEMS_AHEAD = 8  # of one answer that are read while an earlier one waits
MAX_ERROR_BYTES = 1 << 20
ID_HEADER = "x-guard-request-id"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_PLAIN_PATH = re.compile(r"/[\w.~@:+-]+(?:/[\w.~@:+-]+)*")
T = TypeVar("T")


class CutError(ClientDisconnect):
    """The upstream broke off its stream, so the client's connection is broken off too.

    It has this type because the server then closes the connection and logs no failure of its own.
    """


@dataclasses.dataclass
class Call:
    """One guarded request, and what the audit log gets of it at its end."""

    id: str
    form: Form
    body: dict[str, Any]
    turns: tuple[str, ...]
    seen: tuple[str, ...]  # what Canary reads of the turns with a sentence of the answer
    gate: Gate
    mark: dict[str, Any]  # the field `guard` of the answer
    began: float
    sent: float = 0.0  # when the upstream was asked
    first: float | None = None  # when its first chunk came
    status: int | None = None
    received_bytes: int = 0
    passed_chars: int = 0
    outcome: str = "left"  # unless the answer ends

    @property
    def choices(self) -> int:
        """Return the number of answers that were asked for."""
        return self.body.get("n") or 1


class Guard:
    """The guard of one upstream."""

    def __init__(
        self,
        upstream: Upstream,
        judge: Judge,
        policy: Policy,
        log_file: audit.Log,
        people: People,
        *,
        audit_text: bool = False,
        metrics: Metrics | None = None,
    ):
        self.upstream, self.judge, self.policy = upstream, judge, policy
        self.log_file, self.people, self.audit_text = log_file, people, audit_text
        metrics = metrics or Metrics("guard")
        self._decisions = metrics.counter(
            "guard_decisions", "Decisions.", ["kind", "label", "action"]
        )
        self._seconds = metrics.histogram("guard_label_seconds", "Time of a label.", ["kind"])

    @contextlib.asynccontextmanager
    async def running(self, app: Any = None) -> AsyncIterator[None]:
        """Call the people whom an earlier process was to call; at the end close what was opened."""
        await self.people.start()
        try:
            yield
        finally:
            await self.people.close()
            await self.log_file.close()
            await self.upstream.close()

    # Requests

    async def handle(self, request: Request, form: Form) -> Response:
        """Answer a request of chat or of completions."""
        name = f"guard-{uuid.uuid4().hex}"
        try:
            body = await json_object(request)
        except ApiError as error:
            raise await self._refused(name, error) from None
        began = time.monotonic()
        try:
            judged = self._read(form, body)
            verdict = await _while_here(request, self.judge.turn(judged.dialogues))
            seen = self.judge.recent(judged.turns)
        except dialogue.RefusedError as refused:
            error = ApiError(400, str(refused), param=refused.param, code=refused.code)
            raise await self._refused(name, error) from None
        except CanaryFailedError as error:
            await self._record(name, "turn", action="fail", problem=str(error))
            raise _unjudged() from None
        action = "pass" if verdict.label is None else self.policy.turn[verdict.label]
        mark = _mark(verdict, action)
        shown_turns = {"turns": list(judged.turns)} if self.audit_text else {}
        sizes = {"turns": len(judged.turns), "chars": sum(map(len, judged.turns))}
        await self._record(name, "turn", verdict, action, sizes=sizes, **shown_turns)
        gate = self._gate(form, judged.begun)
        call = Call(name, form, body, judged.turns, seen, gate, mark, began)
        if action == "intervene":
            return await self._intervene(call)
        if action == "guide":
            call.body = dialogue.guide(form, body, judged, verdict.rots, self.policy)
        return await self._ask(request, call)

    def _read(self, form: Form, body: dict[str, Any]) -> dialogue.Judged:
        """Return the dialogues of a request. Raises RefusedError."""
        stream, count = body.get("stream"), body.get("n")
        if stream is not None and not isinstance(stream, bool):
            raise dialogue.RefusedError(
                f"stream = {shown(stream)}: expected true or false", "stream"
            )
        if stream and not self.policy.stream.enabled:
            problem = "stream: the guard's policy allows no streams; leave it out"
            raise dialogue.RefusedError(problem, "stream", "stream_disabled")
        most = self.policy.limits.max_choices
        if count is not None and (type(count) is not int or not 1 <= count <= most):
            raise dialogue.RefusedError(f"n = {shown(count)}: expected 1 to {most}", "n")
        if self.policy.dialogue.unreadable == "refuse":
            found = [name for name in UNREAD[form] if body.get(name) is not None]
            known = READ[form]
            found += [name for name in body if name not in known and name.casefold() in known]
            if body.get("modalities") not in (None, ["text"]):
                found.append("modalities")
            if found:
                name = shortened(found[0])
                raise dialogue.RefusedError(
                    f"{name}: the guard cannot read this field, and its policy refuses what it "
                    "cannot read",
                    name,
                    "unreadable",
                )
        read = dialogue.read_chat if form == "chat" else dialogue.read_completion
        return read(body, self.policy)

    def _gate(self, form: Form, begun: str) -> Gate:
        stream = self.policy.stream
        return Gate(
            form,
            sentence_chars=stream.sentence_chars,
            context_chars=stream.context_chars,
            max_choices=self.policy.limits.max_choices,
            alternatives=stream.alternatives == "pass",
            begun=begun,
        )

    async def _record(
        self,
        name: str,
        kind: str,
        verdict: Verdict | None = None,
        action: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write a decision to the audit log; return it. Raises ApiError if that fails."""
        record: dict[str, Any] = {"time": _now(), "request": name, "kind": kind}
        if verdict is not None:
            record |= {
                "label": verdict.label,
                "probabilities": _rounded(verdict.probabilities),
                "rots": list(verdict.rots),
                "label_ms": _ms(verdict.seconds),
                "needs_human": verdict.label == HUMAN,
            }
            if verdict.problem:
                record["problem"] = verdict.problem
            self._seconds.labels(kind).observe(verdict.seconds)
        record |= {"action": action} if action else {}
        record |= more
        if action:
            self._decisions.labels(kind, str(record.get("label")), action).inc()
        try:
            await self.log_file.write(record)
        except OSError as error:
            # A decision that is not recorded is not acted on. No policy changes that.
            log.error("the audit log cannot be written: %s", error)
            raise ApiError(
                503,
                "the guard cannot record its decision",
                "server_error",
                code="guard_unavailable",
            ) from error
        return record

    async def _refused(self, name: str, error: ApiError) -> ApiError:
        """Record that a request is refused; return its error.

        The line has no text of the request: not its path, and not the error's words.
        """
        problem = error.code or "invalid"
        await self._record(name, "refused", action="refuse", problem=problem, status=error.status)
        return error

    # Interventions

    async def _intervene(self, call: Call) -> Response:
        """Call a person, and answer with the set text."""
        mark = call.mark
        record = {"time": _now(), "request": call.id, **mark}
        del record["answer_labels"], record["action"]
        if self.policy.intervention.include_text:
            record["turns"] = list(call.turns)
        try:
            await self.people.call(record)
        except OSError as error:
            # The person in danger still gets the set text: it is better than an error.
            log.error("the queue file cannot be written: %s", error)
        gate, text = call.gate, self.policy.texts.intervention
        model = call.body.get("model")
        gate.base |= {"id": call.id, "created": int(time.time())}
        gate.base["model"] = model if isinstance(model, str) else ""
        field = "content" if call.form == "chat" else "text"
        chunks = []
        for number in range(call.choices):
            chunks.append(gate.text_chunk(number, field, text))
            if call.form == "chat":
                chunks[-1]["choices"][0]["delta"] = {"role": "assistant", field: text}
            # Not "content_filter": clients hide such a text, and it must be read.
            chunks.append(gate.end_chunk(number, "stop"))
        headers = [(ID_HEADER, call.id)]
        if call.body.get("stream"):
            return _streamed(_events(_marked(chunks, mark)), headers)
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        whole = {**answers.body(gate, chunks), "usage": usage, "guard": mark}
        return _json(200, whole, headers)

    # The upstream

    async def _ask(self, request: Request, call: Call) -> Response:
        """Ask the upstream, and return its guarded answer."""
        query = request.scope.get("query_string", b"").decode("latin-1")
        path = PATHS[call.form] + (f"?{query}" if query else "")
        data = json_lines.encode(json.dumps(call.body, ensure_ascii=False, separators=(",", ":")))
        # The client may name another type: the server would not read what was judged.
        headers = _without(_request_headers(request), "content-type")
        headers.append(("content-type", "application/json"))
        call.sent = time.monotonic()
        try:
            answer = await _while_here(
                request, self.upstream.send("POST", path, headers, data), _close_answer
            )
        except UpstreamError as error:
            await self._end(call, error.code)
            raise _as_api_error(error) from None
        except BaseException:
            await self._end(call, "left")
            raise
        call.status = answer.status
        returned = [*_without(answer.headers, "content-type"), (ID_HEADER, call.id)]
        if answer.status >= 300:
            return await _while_here(request, self._upstream_error(call, answer, returned))
        kind = {k.lower(): v for k, v in answer.headers}.get("content-type", "")
        if kind.partition(";")[0].strip().lower() == sse.MEDIA_TYPE:
            if call.body.get("stream"):
                events = self._stream(call, answer)
                return _streamed(_Source(events, lambda: self._unstarted(call, answer)), returned)
            # A server that always streams: the client asked for a whole answer.
            work = self._whole(call, answer, self._events(call, answer), returned)
        else:
            work = self._whole(call, answer, self._body(call, answer), returned)
        return await _while_here(request, work)

    async def _upstream_error(self, call: Call, answer: Answer, headers: Headers) -> Response:
        """Hand on an answer that is an error, as it is."""
        try:
            data = await self._read_all(call, answer, MAX_ERROR_BYTES)
            if answer.status < 400:
                raise UpstreamError(
                    502,
                    f"the upstream redirects (status {answer.status}), which the guard does not "
                    "follow: give the new address as --upstream",
                    "upstream_redirect",
                )
            if answer.status > 599:
                raise UpstreamError(502, f"the upstream has status {answer.status}", "garbage")
            if _holds_answer(data):
                raise UpstreamError(502, "an error of the upstream holds an answer", "garbage")
        except UpstreamError as error:
            await self._end(call, error.code)
            raise _as_api_error(error) from None
        await self._end(call, "upstream_error")
        kept = [pair for pair in headers if pair[0] != "location"]
        media = [(k, v) for k, v in answer.headers if k.lower() == "content-type"]
        return _raw(answer.status, data, [*kept, *media])

    async def _whole(
        self, call: Call, answer: Answer, items: AsyncIterator[Item | None], headers: Headers
    ) -> Response:
        """Return an answer without a stream, made of what has passed."""
        released = self._released(call, items)
        chunks, labels, failure = [], call.mark["answer_labels"], None
        try:
            async with asyncio.timeout(self.policy.limits.total_seconds):
                async for chunk in released:
                    if chunk is None:
                        continue
                    if "error" in chunk:
                        failure = chunk
                        break
                    labels += chunk.pop("guard", {}).get("answer_labels", [])
                    chunks.append(chunk)
        except UpstreamError as error:
            call.outcome = error.code
            raise _as_api_error(error) from None
        except TimeoutError:
            call.outcome = "upstream_timeout"
            raise _as_api_error(_late("total_seconds")) from None
        except CanaryFailedError:
            call.outcome = "canary_failed"
            raise _unjudged() from None
        finally:
            await released.aclose()
            await _close_answer(answer)
            await self._end(call, call.outcome)
        if failure is not None:
            return _json(200, failure, headers)
        return _json(200, {**answers.body(call.gate, chunks), "guard": call.mark}, headers)

    async def _stream(self, call: Call, answer: Answer) -> AsyncIterator[bytes]:
        """Yield the events of a guarded stream."""
        released = self._released(call, self._events(call, answer))
        mark: dict[str, Any] | None = call.mark
        try:
            async with contextlib.aclosing(released):
                async for chunk in released:
                    if chunk is None:
                        yield sse.DONE
                        continue
                    if mark is not None and "error" not in chunk:
                        chunk, mark = {**chunk, "guard": mark | chunk.get("guard", {})}, None
                    yield sse.event(chunk)
        except UpstreamError as error:
            call.outcome = error.code
            if error.code == "upstream_cut":
                raise CutError(str(error)) from None
            yield sse.event(_as_api_error(error).body())
        except CanaryFailedError:
            call.outcome = "canary_failed"
            yield sse.event(_unjudged().body())
        except ApiError as error:  # the audit log
            call.outcome = "failed"
            yield sse.event(error.body())
        finally:
            await _close_answer(answer)
            await self._end(call, call.outcome)

    async def _unstarted(self, call: Call, answer: Answer) -> None:
        """End a stream whose client left before its first event."""
        await _close_answer(answer)
        await self._end(call, "left")

    async def _end(self, call: Call, outcome: str) -> None:
        """Record the end of a call, after it: nothing follows from this line."""
        call.outcome = outcome
        record = {
            "outcome": outcome,
            "status": call.status,
            "first_byte_ms": None if call.first is None else _ms(call.first - call.sent),
            "upstream_bytes": call.received_bytes,
            "passed_chars": call.passed_chars,
            "total_ms": _ms(time.monotonic() - call.began),
        }
        with contextlib.suppress(ApiError):
            await self._record(call.id, "end", **record)

    # Answers

    async def _bytes(self, call: Call, answer: Answer, most: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an answer. Raises UpstreamError past a limit of time or size."""
        limits = self.policy.limits
        ends = call.sent + limits.total_seconds
        async with contextlib.aclosing(answer.chunks) as chunks:
            while True:
                name = "first_byte_seconds" if call.first is None else "event_seconds"
                wait, rest = getattr(limits, name), ends - time.monotonic()
                if rest < wait:
                    name, wait = "total_seconds", rest
                if wait <= 0:
                    raise _late(name)
                try:
                    async with asyncio.timeout(wait):
                        chunk = await anext(chunks, None)
                except TimeoutError:
                    raise _late(name) from None
                if chunk is None:
                    return
                if call.first is None:
                    call.first = time.monotonic()
                call.received_bytes += len(chunk)
                if call.received_bytes > most:
                    raise _garbage(f"it has more than {most:,} bytes")
                yield chunk

    async def _read_all(self, call: Call, answer: Answer, most: int) -> bytes:
        async with contextlib.aclosing(self._bytes(call, answer, most)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def _body(self, call: Call, answer: Answer) -> AsyncIterator[Item | None]:
        """Yield the items of an answer in one piece."""
        data = await self._read_all(call, answer, self.policy.limits.answer_bytes)
        try:
            value = json_lines.value(data)
        except ValueError as error:
            raise _garbage(f"it is {error}") from None
        if not isinstance(value, dict) or not ("choices" in value or "error" in value):
            raise _garbage("it has no choices")
        for item in self._fed(call, value):
            yield item
        for item in call.gate.finish():
            yield item

    async def _events(self, call: Call, answer: Answer) -> AsyncIterator[Item | None]:
        """Yield the items of a stream, and None for its [DONE].

        Held text is judged too when the stream breaks off, before the error is raised.
        """
        limits = self.policy.limits
        parser = sse.Parser(limits.event_bytes)
        problem: UpstreamError | None = None
        async with contextlib.aclosing(self._bytes(call, answer, limits.answer_bytes)) as chunks:
            try:
                async for chunk in chunks:
                    for event in parser.feed(chunk):
                        if event.data.strip() == "[DONE]":
                            for item in call.gate.finish():
                                yield item
                            yield None
                            return
                        for item in self._fed(call, _parsed(event.data)):
                            yield item
            except sse.TooLongError:
                problem = _garbage(f"an event has more than {limits.event_bytes:,} characters")
            except UpstreamError as error:
                problem = error
        for item in call.gate.finish():
            yield item
        if problem is not None:
            raise problem

    def _fed(self, call: Call, chunk: Any) -> list[Item]:
        try:
            return call.gate.feed(chunk)
        except answers.GarbageError as error:
            raise _garbage(str(error)) from None

    async def _released(
        self, call: Call, items: AsyncIterator[Item | None]
    ) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the chunks that may leave, in order, and None for [DONE].

        A sentence is judged while the one before it is recorded and sent. A choice whose sentence
        does not pass ends with the set text. Once all have ended so, the upstream's call ends.
        """
        waiting: asyncio.Queue[tuple[Item | None, asyncio.Task[Verdict] | None]]
        waiting = asyncio.Queue(ITEMS_AHEAD)
        tasks: set[asyncio.Task[Verdict]] = set()

        def forget(task: asyncio.Task[Verdict]) -> None:
            tasks.discard(task)
            if not task.cancelled():
                task.exception()  # asyncio would log one that nobody awaits any more

        async def read() -> None:
            async with contextlib.aclosing(items):
                async for item in items:
                    task = None
                    if isinstance(item, Held):
                        work = self.judge.sentence(call.seen, item.before, item.text)
                        task = asyncio.ensure_future(work)
                        tasks.add(task)
                        task.add_done_callback(forget)
                    await waiting.put((item, task))
                    if task is not None:
                        # One label at a time: the first sentences of other answers come before the
                        # later ones of this one.
                        await asyncio.wait({task})

        reader = asyncio.ensure_future(read())
        stopped: set[int] = set()
        ended: set[int] = set()
        try:
            while (found := await _next(waiting, reader)) is not None:
                item, task = found
                if item is None:
                    call.outcome = "answered"
                    yield None
                    return
                if isinstance(item, Failed):
                    call.outcome = "upstream_error"
                    yield {"error": item.error}
                    return
                if item.choice in stopped:
                    if task is not None:
                        task.cancel()
                    continue
                if isinstance(item, Ready):
                    yield item.chunk
                    ended |= {one["index"] for one in item.chunk["choices"] if one["finish_reason"]}
                    continue
                assert task is not None
                async for chunk in self._decided(call, item, task, stopped):
                    yield chunk
                if stopped and ended | stopped >= set(range(call.choices)):
                    call.outcome = "stopped"
                    yield None
                    return
            call.outcome = "answered"
        finally:
            reader.cancel()
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reader

    async def _decided(
        self, call: Call, item: Held, task: "asyncio.Task[Verdict]", stopped: set[int]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield what leaves in place of a held chunk, after the decision is recorded."""
        about = {"choice": item.choice, "field": item.field}
        try:
            verdict = await task
        except dialogue.RefusedError as refused:  # too long to judge, or in unknown letters
            verdict, action = Verdict(None, {}, (), 0.0, refused.code), "replace"
        except CanaryFailedError as error:
            await self._record(call.id, "answer", action="fail", problem=str(error), **about)
            raise
        else:
            action = "pass" if verdict.label is None else self.policy.answer[verdict.label]
        shown_text = {"text": item.text} if self.audit_text else {}
        sizes = {"chars": len(item.text)}
        await self._record(call.id, "answer", verdict, action, sizes=sizes, **about, **shown_text)
        gate, choice = call.gate, item.choice
        if action == "pass":
            call.passed_chars += len(item.text)
            yield item.chunk
        elif action == "replace":
            field = "text" if call.form == "completion" else "content"
            # A sentence begins with the space before it, which is replaced with it.
            before = item.before if item.field == field else ""
            space = " " if before and not before[-1].isspace() else ""
            yield gate.text_chunk(choice, field, space + self.policy.texts.replacement)
        label = {**about, "label": verdict.label, "action": action}
        label["probabilities"] = _rounded(verdict.probabilities)
        yield {**gate.label_chunk(choice), "guard": {"answer_labels": [label]}}
        if action != "pass":
            stopped.add(choice)
            yield gate.end_chunk(choice, answers.FILTERED)

    # Other routes

    def routes(self, prefix: str = "/v1") -> list[Route]:
        """Return the routes below `prefix`: chat, completions, and all others."""

        def handler(form: Form) -> Any:
            async def handle(request: Request) -> Response:
                return await self.handle(request, form)

            return handle

        async def other(request: Request) -> Response:
            return await self.other(request, f"/{request.path_params['rest']}")

        return [
            *(
                Route(f"{prefix}{path}", handler(form), methods=["POST"])
                for form, path in PATHS.items()
            ),
            Route(f"{prefix}/{{rest:path}}", other, methods=METHODS),
        ]

    async def other(self, request: Request, path: str) -> Response:
        """Hand on a request of a route that the policy allows; refuse any other by name."""
        method, name = request.method, f"guard-{uuid.uuid4().hex}"
        if not (_PLAIN_PATH.fullmatch(path) and self._allows(method, f"/v1{path}")):
            error = ApiError(
                403,
                f"{method} /v1{path}: the guard hands on only what it can check, or what its "
                "policy allows ([routes] pass)",
                code="unguarded_route",
            )
            raise await self._refused(name, error)
        query = request.scope.get("query_string", b"").decode("latin-1")
        full = quote(path, safe="/@:+~") + (f"?{query}" if query else "")
        try:
            body = await request.body() or None
        except ApiError as error:  # too large, or too slow
            raise await self._refused(name, error) from None
        gate = self._gate("chat", "")
        now = time.monotonic()
        call = Call(name, "chat", {}, (), (), gate, {}, now, now)
        try:
            answer = await _while_here(
                request,
                self.upstream.send(method, full, _request_headers(request), body),
                _close_answer,
            )
            most = self.policy.limits.answer_bytes
            data = await _while_here(request, self._read_all(call, answer, most))
        except UpstreamError as error:
            raise _as_api_error(error) from None
        if 300 <= answer.status < 400:
            raise _as_api_error(UpstreamError(502, "the upstream redirects", "upstream_redirect"))
        return _raw(answer.status, data, answer.headers)

    def _allows(self, method: str, path: str) -> bool:
        for route in self.policy.routes.allowed:
            wanted, _, pattern = route.partition(" ")
            begins = pattern.endswith("/*") and path.startswith(pattern[:-1])
            if method == wanted and (path == pattern or begins):
                return ".." not in path.split("/")
        return False


def guard_routes(
    upstream: Upstream,
    labeller: Any,
    policy: Policy,
    log_file: audit.Log | None = None,
    people: People | None = None,
    *,
    prefix: str = "/v1",
    **settings: Any,
) -> list[Route]:
    """Return the routes of a guard of `upstream`, which asks a `canary.labeller.Labeller`.

    By default nothing is recorded, and the policy's webhook is called. `settings` are Guard's.
    """
    judge = Judge(labeller, policy, *of_model(labeller.canary))
    people = people or People(policy.intervention)
    guard = Guard(upstream, judge, policy, log_file or audit.NoLog(), people, **settings)
    return guard.routes(prefix)


class _Source:
    """A stream's events. Closed before its first event, it awaits `unstarted` instead."""

    def __init__(self, events: AsyncIterator[bytes], unstarted: Any):
        self.events, self.unstarted, self.started = events, unstarted, False

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        self.started = True
        return await anext(self.events)

    async def aclose(self) -> None:
        """End the upstream's call."""
        if self.started:
            await sse.close(self.events)
        else:
            await self.unstarted()


async def _next(waiting: asyncio.Queue, reader: "asyncio.Task[None]") -> Any:
    """Return the next of the queue; None once the reader has ended. Raises the reader's error."""
    while waiting.empty():
        if reader.done():
            reader.result()
            return None
        got = asyncio.ensure_future(waiting.get())
        try:
            await asyncio.wait({got, reader}, return_when=asyncio.FIRST_COMPLETED)
            if got.done():
                return got.result()
        finally:
            got.cancel()
    return waiting.get_nowait()


async def _while_here(request: Request, work: Coroutine[Any, Any, T], undo: Any = None) -> T:
    """Return the result of `work`, which is cancelled if the client leaves.

    `undo` is awaited with a result that came too late.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect("the client has left")
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                late = await task
                if undo is not None:
                    await undo(late)


async def _close_answer(answer: Answer) -> None:
    await sse.close(answer.chunks)


def _parsed(data: str) -> Any:
    try:
        return json_lines.value(data)
    except ValueError as error:
        raise _garbage(f"an event is {error}") from None


def _holds_answer(data: bytes) -> bool:
    try:
        # Written anew: escapes in a name are undone.
        text = json.dumps(json_lines.value(data))
    except ValueError:
        # Such as events, or JSON in an encoding that clients read.
        text = data.decode(json.detect_encoding(data), "replace")
    return answers.holds_choices(text)


def _garbage(problem: str) -> UpstreamError:
    return UpstreamError(502, f"the upstream's answer cannot be used: {problem}", "garbage")


def _late(limit: str) -> UpstreamError:
    problem = f"the upstream did not answer in time (the policy's {limit})"
    return UpstreamError(504, problem, "upstream_timeout")


def _as_api_error(error: UpstreamError) -> ApiError:
    return ApiError(error.status, str(error), "upstream_error", code=error.code)


def _unjudged() -> ApiError:
    return ApiError(
        503,
        "the guard cannot judge this now, and lets nothing pass unjudged",
        "server_error",
        code="guard_unavailable",
        headers={"retry-after": "1"},
    )


def _mark(verdict: Verdict, action: str) -> dict[str, Any]:
    """Return the field `guard` of an answer."""
    return {
        "label": verdict.label,
        "probabilities": _rounded(verdict.probabilities),
        "rots": list(verdict.rots),
        "action": action,
        "needs_human": verdict.label == HUMAN,
        "answer_labels": [],
    }


def _rounded(probabilities: Any) -> dict[str, float]:
    return {label: round(share, 6) for label, share in probabilities.items()}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _request_headers(request: Request) -> Headers:
    return [(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.scope["headers"]]


def _without(headers: Iterable[tuple[str, str]], *names: str) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]


def _marked(chunks: list[dict[str, Any]], mark: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [{**chunks[0], "guard": mark}, *chunks[1:], None]


async def _events(chunks: Iterable[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield sse.DONE if chunk is None else sse.event(chunk)


def _streamed(source: AsyncIterator[bytes], headers: Headers) -> Response:
    return _with_headers(sse.stream(source), _without(headers, "cache-control"))


def _json(status: int, value: Any, headers: Headers) -> Response:
    # Not Starlette's own JSON: half a character is no UTF-8.
    data = json_lines.encode(json.dumps(value, ensure_ascii=False))
    return _raw(status, data, [*headers, ("content-type", "application/json")])


def _raw(status: int, data: bytes, headers: Headers) -> Response:
    return _with_headers(Response(data, status), headers)


def _with_headers(response: Response, headers: Headers) -> Response:
    # A list, because a header such as Set-Cookie may come several times.
    extra = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers]
    response.raw_headers = [*response.raw_headers, *extra]
    return response
