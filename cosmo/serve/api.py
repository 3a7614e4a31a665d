"""Answer the routes of OpenAI's API: models, chat, completions, moderations, health."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cosmo.engine.base.errors import QueueFull, UserError
from cosmo.engine.infer import continuous, ctranslate2_scheduler
from cosmo.engine.web import app, sse
from cosmo.engine.web.errors import ApiError, overloaded, unavailable, wrong
from cosmo.engine.web.metrics import Metrics
from cosmo.serve import answers, fields, page, scheduling, shapes
from cosmo.serve.model import Asked, Served

log = logging.getLogger("cosmo.serve")

# Tokenizing so many characters takes 10 ms, in which the event loop would do nothing else.
MAX_INLINE_CHARS = 10_000
MAX_DIALOGUES = 64  # of one request to /v1/moderations


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server. Times are in seconds."""

    deadline: float = 120.0
    max_searches: int = 8  # requests with beams that wait: each stops all others while it runs


class Service:
    """State that the routes share: a model behind a scheduler, a labeller, limits, counts.

    `labeller` is `canary.labeller.Labeller` under the name `canary_name`, or None.
    """

    def __init__(
        self,
        model: Served,
        scheduler: continuous.Scheduler | ctranslate2_scheduler.Scheduler,
        *,
        labeller: Any = None,
        canary_name: str = "canary",
        settings: Settings = Settings(),
        metrics: Metrics | None = None,
    ):
        self.model, self.scheduler, self.settings = model, scheduler, settings
        self.labeller, self.canary_name = labeller, canary_name
        self.limits = fields.Limits(model.max_tokens, scheduler.slots, model.beams, model.backend)
        self.created = int(time.time())
        self.draining = False
        self.searches = 0
        self.metrics = metrics or Metrics()
        self._count()

    def _count(self) -> None:
        made, scheduler = self.metrics, self.scheduler
        made.gauge("active_slots", "Answers being written.", lambda: scheduler.counts.active)
        made.gauge("slots", "Answers that can be written at a time.", lambda: scheduler.slots)
        made.gauge("queued_requests", "Requests that wait.", lambda: scheduler.counts.queued)
        made.gauge(
            "compilations", "Programs compiled since the start.", lambda: scheduler.compilations
        )
        made.gauge("steps", "Decoder steps since the start.", lambda: scheduler.counts.steps)
        made.gauge("encoder_batches", "Encoder passes.", lambda: scheduler.counts.encoder_batches)
        self.prompt_tokens = made.counter("prompt_tokens", "Tokens read.")
        self.completion_tokens = made.counter("completion_tokens", "Tokens written.")
        self.finished = made.counter("answers", "Answers that ended.", ["reason"])
        self.first_token = made.histogram("first_token_seconds", "Time to the first token.")
        self.seconds = made.histogram("answer_seconds", "Time of all of a request's answers.")
        if self.labeller is not None:
            made.gauge(
                "labels_queued", "Dialogues that wait for a label.", lambda: self.labeller.queued
            )

    def drain(self) -> None:
        """Accept no new request; those in flight are finished."""
        self.draining = True

    def check_open(self, request: Request) -> None:
        """Raise ApiError of status 503 while the server stops.

        A guard's request is part of one that was in flight, and is answered.
        """
        if self.draining and not getattr(request.app.state, "inner", False):
            raise unavailable("the server is stopping")

    @property
    def names(self) -> list[str]:
        """Return the names of the models that answer."""
        return [self.model.name]

    def moderates(self, name: str) -> bool:
        """Return whether `name` means Canary: its own name, or one of OpenAI's models."""
        # Clients send these unless they are given another name.
        openais = name.startswith(("omni-moderation-", "text-moderation-"))
        return openais or name == self.canary_name

    # Generation

    async def _body(self, request: Request, known: Any) -> dict[str, Any]:
        """Return a request's body, of which the names are checked. Raises ApiError."""
        body = await app.json_object(request)
        self.check_open(request)
        fields.check_names(body, known)
        fields.check_model(body, self.names)
        return body

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        body = await self._body(request, fields.CHAT)
        wanted = fields.wanted(body, self.limits, chat=True)
        dialogue = fields.dialogue(body)
        shape = shapes.Chat(self.model.name, self.created)
        return await self._until_left(request, self._chat(dialogue, wanted, shape))

    async def _chat(
        self, dialogue: fields.Dialogue, wanted: fields.Wanted, shape: shapes.Chat
    ) -> Response:
        deadline = time.monotonic() + self.settings.deadline
        rots = wanted.rots
        if self.labeller is not None and self.model.follows_rots:
            # Also beside the caller's rules of thumb: its label is wanted.
            labelled = self.label(dialogue.turns, rots=rots is None)
            chirp = await scheduling.before(deadline, self.settings.deadline, labelled)
            rots = chirp.rots if rots is None else rots
            shape = dataclasses.replace(
                shape, further={"label": chirp.label, "needs_human": chirp.needs_human}
            )
        texts = [dialogue.narrative, dialogue.instruction, *dialogue.turns, *(rots or ())]
        asked = await _aside(self.model.asked, dialogue, rots, size=sum(map(len, texts)))
        return await self._respond([asked], wanted, shape, deadline)

    async def completion(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        body = await self._body(request, fields.COMPLETION)
        wanted = fields.wanted(body, self.limits, chat=False)
        if wanted.rots is not None:
            raise wrong("rots", "only allowed in /v1/chat/completions", "unsupported_parameter")
        prompts = fields.prompts(body, self.model.session.vocabulary.size)
        if wanted.beams > 1 and len(prompts) > 1:
            raise wrong("prompt", "one prompt goes with beams")
        shape = shapes.Completion(self.model.name, self.created)

        async def answer() -> Response:
            deadline = time.monotonic() + self.settings.deadline
            asked = [
                await _aside(self.model.prompt, prompt, size=len(prompt)) for prompt in prompts
            ]
            return await self._respond(asked, wanted, shape, deadline)

        return await self._until_left(request, answer())

    async def _respond(
        self, asked: Sequence[Asked], wanted: fields.Wanted, shape: shapes.Shape, deadline: float
    ) -> Response:
        made = answers.Request(self.model, wanted, asked)
        made.on_first_token = self.first_token.observe
        if wanted.beams > 1:
            made.begin_search(self._search(asked[0], deadline))
        else:
            events = scheduling.Events(self.scheduler, deadline, self.settings.deadline)
            try:
                made.begin(events, self.model)
            except (QueueFull, continuous.QueueFull) as error:
                raise overloaded(f"too many requests: {error}") from error
            except RuntimeError as error:  # it closes
                raise unavailable("the server is stopping") from error
            except UserError as error:
                raise ApiError(400, error.message) from error
        if wanted.stream:
            return await self._streamed(made, shape)
        with self._counted(made):
            found = await answers.whole(made)
            for one in found:
                self.finished.labels(one.finish).inc()
        return JSONResponse(shape.whole(found, made.usage, made.cut))

    async def _streamed(self, made: answers.Request, shape: shapes.Shape) -> Response:
        deltas = made.deltas()
        try:
            # Before the status is sent, so that errors until the first token have one of their own.
            first = await anext(deltas)
        except BaseException:
            await deltas.aclose()
            made.close()
            raise
        source = self._events(made, first, deltas, shape)
        return sse.stream(source, on_close=made.close)

    async def _events(
        self,
        made: answers.Request,
        first: answers.Delta,
        deltas: AsyncIterator[answers.Delta],
        shape: shapes.Shape,
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream; an error is its last one."""
        usage = {"usage": None} if made.wanted.include_usage else {}
        with self._counted(made):
            try:
                for chunk in shape.opening(len(made.samples)):
                    yield sse.event({**chunk, **usage})
                yield sse.event({**shape.chunk(first), **usage})
                self._note(first)
                async for delta in deltas:
                    yield sse.event({**shape.chunk(delta), **usage})
                    self._note(delta)
                if made.wanted.include_usage:
                    yield sse.event(shape.last(made.usage, made.cut))
                yield sse.DONE
            except ApiError as error:
                yield sse.event(error.body())
            except Exception:
                log.exception("a stream failed")
                failed = ApiError(500, "the server failed; its log has the reason", "server_error")
                yield sse.event(failed.body())
            finally:
                await sse.close(deltas)
                made.close()

    def _note(self, delta: answers.Delta) -> None:
        if delta.finish is not None:
            self.finished.labels(delta.finish).inc()

    @contextlib.contextmanager
    def _counted(self, made: answers.Request):
        try:
            yield
        finally:
            made.close()
            self.prompt_tokens.inc(made.usage.prompt_tokens)
            self.completion_tokens.inc(made.usage.completion_tokens)
            self.seconds.observe(time.monotonic() - made.began)

    async def _search(self, asked: Asked, deadline: float) -> list[list[int]]:
        if self.searches >= self.settings.max_searches:
            raise overloaded(f"{self.searches} requests with beams wait")
        self.searches += 1
        try:
            future = self.scheduler.run_exclusive(lambda: self.model.search(asked))
            waiting = asyncio.wrap_future(future)
            return await scheduling.before(deadline, self.settings.deadline, waiting)
        finally:
            self.searches -= 1

    async def _until_left(self, request: Request, answer: Any) -> Any:
        """Return an answer; stop making it once its client has left."""
        try:
            return await answers.unless_left(answer, app.left(request.receive))
        except answers.ClientLeftError:
            raise ClientDisconnect from None

    # Labels

    async def label(self, turns: Sequence[str], *, rots: bool) -> Any:
        """Return Canary's Chirp of a dialogue. Raises ApiError."""
        try:
            return await self.labeller.label(turns, rots=rots)
        except QueueFull as error:
            raise overloaded(f"too many dialogues wait for a label: {error}") from error
        except UserError as error:
            raise ApiError(400, error.message) from error

    async def moderation(self, request: Request) -> Response:
        """Answer POST /v1/moderations."""
        body = await app.json_object(request)
        self.check_open(request)
        if self.labeller is None:
            raise ApiError(
                404,
                "this server labels nothing: it was started without --canary",
                code="model_not_found",
            )
        fields.check_names(body, fields.MODERATION)
        name = body.get("model")
        if name is not None and not (isinstance(name, str) and self.moderates(name)):
            fields.check_model(body, [self.canary_name])
        rots = body.get("rots") is None or fields.boolean(body, "rots")
        dialogues = fields.dialogues(body, MAX_DIALOGUES)
        labels = asyncio.gather(*(self.label(turns, rots=rots) for turns in dialogues))
        deadline = time.monotonic() + self.settings.deadline
        waiting = scheduling.before(deadline, self.settings.deadline, labels)
        chirps = await self._until_left(request, waiting)
        results = [shapes.moderation(chirp) for chirp in chirps]
        return JSONResponse(
            {"id": f"modr-{uuid.uuid4().hex}", "model": self.canary_name, "results": results}
        )

    # Description of the server

    async def models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        return JSONResponse({"object": "list", "data": self._models()})

    async def one_model(self, request: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        name = request.path_params["name"]
        for model in self._models():
            if model["id"] == name:
                return JSONResponse(model)
        fields.check_model({"model": name}, self.names)
        raise AssertionError  # it has raised

    def _models(self) -> list[dict[str, Any]]:
        usual = {"object": "model", "created": self.created, "owned_by": "cosmo"}
        limits = {
            "max_input_tokens": self.model.max_input_tokens,
            "max_tokens": self.model.max_tokens,
            "beams": self.model.beams,
            "takes_seed": self.model.takes_seed,
            "follows_rots": self.model.follows_rots,
        }
        found = [{"id": self.model.name, **usual, **limits}]
        if self.labeller is not None:
            found.append({"id": self.canary_name, **usual, "moderates": True})
        return found

    async def health(self, request: Request) -> Response:
        """Answer GET /health."""
        if self.draining:
            raise unavailable("the server is stopping")
        return JSONResponse({"status": "ok"})

    async def unguarded(self, request: Request) -> Response:
        """Refuse a request to the guarded API of a server that has none."""
        raise ApiError(
            404, "this server guards nothing: it was started without --canary", code="unknown_url"
        )

    def close(self, drain: bool = True) -> None:
        """End the threads."""
        if self.labeller is not None:
            self.labeller.close()
        self.scheduler.close(drain)


def routes(service: Service) -> list[BaseRoute]:
    """Return the routes of a service."""
    return [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/moderations", service.moderation, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/health", service.health),
        service.metrics.route(),
        Route("/", page.page),
    ]


def inner(service: Service) -> Starlette:
    """Return the service's routes as an application without key, host names, counts, log or end.

    For callers in this process, such as a guard in front of it, which counts and logs its requests.
    """
    made = app.application(routes(service), api_key=None, log_requests=False)
    made.state.inner = True  # see `Service.check_open`
    return made


def application(
    service: Service,
    *,
    api_key: str | None = None,
    hosts: Any = None,
    further: Sequence[BaseRoute] = (),
    around: Callable[[], contextlib.AbstractAsyncContextManager[Any]] = contextlib.nullcontext,
    **limits: Any,
) -> Starlette:
    """Return the application of a service. `further` routes stand beside its own.

    They run inside `around()`.

    `limits` are those of `app.application`. Leaving the application's lifespan closes the service.
    """

    @contextlib.asynccontextmanager
    async def lifespan(made: Starlette) -> AsyncIterator[None]:
        try:
            async with around():
                yield
        finally:
            # Requests in flight have ended, or were cut.
            await asyncio.to_thread(service.close, False)

    # After `further`: a guard has this path too.
    unguarded = Route("/guard/v1/{rest:path}", service.unguarded, methods=["GET", "POST"])
    return app.application(
        [*routes(service), *further, unguarded],
        api_key=api_key,
        hosts=hosts,
        # The page asks for the key itself.
        open_paths=("/health", "/"),
        metrics=service.metrics,
        lifespan=lifespan,
        **limits,
    )


async def _aside(function: Callable[..., Any], *args: Any, size: int) -> Any:
    """Return what a function gives, called in another thread where it takes long."""
    if size <= MAX_INLINE_CHARS:
        return function(*args)
    return await asyncio.to_thread(function, *args)
