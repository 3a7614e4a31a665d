"""The HTTP side of a study: tokens, forms, pages, the operator's status.

A judge's token stands in the address of the page and in its form, in no cookie. Two judges may so
share a browser. The log has paths alone, so it holds no token.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Mapping
from urllib.parse import parse_qsl, quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.web import app as web
from cosmo.engine.web import page_headers
from cosmo.engine.web.errors import ApiError
from cosmo.engine.web.metrics import Metrics
from data_pipeline.annotation import assignment, views
from data_pipeline.annotation.answers import utterance_numbers
from data_pipeline.annotation.assignment import DONE, NOT_QUALIFIED
from data_pipeline.annotation.serving import drawing, study
from data_pipeline.annotation.task_files import Item, Task, fields

log = logging.getLogger("data_pipeline")

MAX_BODY_BYTES = 2**20
MAX_FIELDS = 1000
REFRESH_SECONDS = 30  # of the page of a judge who waits for items that others hold
HEADERS = {
    **page_headers.ALWAYS,
    "Content-Security-Policy": page_headers.policy("'self'", "'self'", forms="'self'"),
    # Not no-referrer: browsers would then send a form's Origin as null. A link elsewhere, which no
    # page has, would get no token.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
    "X-Robots-Tag": "noindex",
}
ACTIONS = ("consent", "answer", "skip", "feedback")
_ASSETS = {
    "/page.css": ("text/css", drawing.STYLE),
    "/page.js": ("text/javascript", drawing.SCRIPT),
}


def page(text: str, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """Return a page with its policy."""
    return HTMLResponse(text, status, headers={**HEADERS, **headers})


def error_page(error: ApiError) -> Response:
    """Return an error as a page."""
    titles = {404: "There is no such page", 413: "This is too long", 503: "Please try again"}
    title = titles.get(error.status, "This did not work")
    text = drawing.message(
        title, f"{error.message}.", "Go back: what you wrote is still on the page before."
    )
    return page(text, error.status, error.headers)


class Pages:
    """The routes of a study. `tokens` is {judge: token}."""

    def __init__(self, made: study.Study, tokens: Mapping[str, str]):
        self.study, self.task, self.names = made, made.task, tuple(tokens)
        # A lookup of digests: its time reveals nothing about the tokens.
        self.judges = {_digest(token): judge for judge, token in tokens.items()}
        self.wrong_tokens = 0

    def routes(self) -> list[Route]:
        """Return Starlette's routes."""
        return [
            Route("/", self.front),
            Route("/judge", self.show, methods=["GET"]),
            Route("/judge", self.receive, methods=["POST"]),
            Route("/status", self.status),
            Route("/health", self.health),
            *(Route(path, self.asset) for path in _ASSETS),
        ]

    async def health(self, request: Request) -> Response:
        """Answer that the server runs."""
        return JSONResponse({"status": "ok"})

    async def asset(self, request: Request) -> Response:
        """Answer with the style or the script."""
        kind, text = _ASSETS[request.url.path]
        return Response(text, media_type=kind, headers=HEADERS)

    async def front(self, request: Request) -> Response:
        """Answer a visitor without a token."""
        return page(drawing.stranger(wrong=False))

    async def status(self, request: Request) -> Response:
        """Answer the operator, on this machine alone: a page, or JSON for programs."""
        _check_operator(request)
        state = await run_in_threadpool(self.study.status, self.names)
        state = {**state, "wrong_tokens": self.wrong_tokens}
        if "text/html" in request.headers.get("accept", ""):
            return page(drawing.status(state))
        return JSONResponse(state, headers={"cache-control": "no-store"})

    async def show(self, request: Request) -> Response:
        """Answer with the judge's next item."""
        token = request.query_params.get("token", "")
        judge = self._judge(token)
        if judge is None:
            return self._stranger()
        return await run_in_threadpool(self._next, judge, token)

    async def receive(self, request: Request) -> Response:
        """Take a form of a judge."""
        form = _form(request, await request.body())
        token = form.pop("token", "")
        judge = self._judge(token)
        if judge is None:
            return self._stranger()
        action = form.pop("action", "answer")
        if action not in ACTIONS:
            raise ApiError(400, f"action: got {shown(action)}, expected one of {ACTIONS}")
        try:
            return await run_in_threadpool(getattr(self, f"_{action}"), judge, token, form)
        except UserError as error:  # the disk: nothing is confirmed
            log.error("%s", error)  # it names files, which are not the judge's business
            raise ApiError(503, "Your answer could not be stored. Please send it again") from error

    def _judge(self, token: str) -> str | None:
        return self.judges.get(_digest(token)) if len(token) <= 500 else None

    def _stranger(self) -> Response:
        self.wrong_tokens += 1
        return page(drawing.stranger(wrong=True), 403)

    def _next(self, judge: str, token: str) -> Response:
        if judge not in self.study.consented:
            return page(drawing.consent(self.task, token, self.study.hold_seconds))
        found = self.study.next(judge)
        progress = self.study.progress(judge)
        if found.item is not None:
            wait = self.study.seconds_left(judge, found.item.id)
            return page(drawing.item(self.task, token, found.item, found.order, progress, wait))
        if found.reason == DONE:
            texts = ("Thank you", progress, "There is nothing more for you to judge.")
        elif found.reason == NOT_QUALIFIED:
            text = (
                "The first pages were a test of whether this task suits you. It ends here for you."
            )
            texts = ("Thank you for trying", progress, text)
        else:
            text = "Others are at work on the items that are left. This page looks again by itself."
            waiting = drawing.end(
                self.task, token, "Please wait", progress, text, again=REFRESH_SECONDS
            )
            return page(waiting)
        return page(drawing.end(self.task, token, *texts))

    def _consent(self, judge: str, token: str, form: Mapping[str, str]) -> Response:
        _check_names(form, {"consent"})
        if self.task.page.consent and not form.get("consent"):
            problem = "Please agree first, or close this page."
            text = drawing.consent(self.task, token, self.study.hold_seconds, problem)
            return page(text, 422)
        self.study.agree(judge)
        return _to_next(token)

    def _skip(self, judge: str, token: str, form: Mapping[str, str]) -> Response:
        # Answers that were filled in are dropped; the remark is kept.
        self.study.feedback(judge, form.get("_feedback", ""), form.get("item", ""))
        self.study.skip(judge, form.get("item", ""))
        return _to_next(token)

    def _feedback(self, judge: str, token: str, form: Mapping[str, str]) -> Response:
        _check_names(form, {"_feedback"})
        self.study.feedback(judge, form.get("_feedback", ""))
        text = drawing.message("Thank you", "Your remark is stored.", further=drawing.go_on(token))
        return page(text)

    def _answer(self, judge: str, token: str, form: Mapping[str, str]) -> Response:
        name = form.get("item", "")
        one = self.task.by_id.get(name)
        if one is None:
            raise ApiError(400, f"item: got {shown(name)}, which is none of this study")
        _check_names(form, {"item", "_feedback", *control_names(self.task, one)})
        values = {k: v for k, v in form.items() if k not in ("item", "_feedback")}
        sent = self.study.send(judge, name, values)
        if sent.outcome in (study.STORED, study.ALREADY):
            if sent.outcome == study.STORED:
                self.study.feedback(judge, form.get("_feedback", ""), name)
            return _to_next(token)
        if sent.outcome in (study.FAULTY, study.TOO_FAST):
            return self._again(judge, token, one, form, sent)
        title, text = {
            study.OTHERWISE: (
                "You have answered this page already",
                "Your first answer is kept. What you sent now was not stored.",
            ),
            study.FULL: (
                "This page has enough answers",
                f"You had it for more than {drawing.duration(self.study.hold_seconds)}, and others "
                "have answered it since. What you sent now was not stored.",
            ),
            study.NOT_GIVEN: (
                "This page is not yours",
                "It was not given to you, or you have not agreed to take part yet.",
            ),
        }[sent.outcome]
        return page(drawing.message(title, text, further=drawing.go_on(token)), 409)

    def _again(
        self, judge: str, token: str, one: Item, form: Mapping[str, str], sent: study.Sent
    ) -> Response:
        """Return the page with all that was filled in, and what is wrong."""
        asked = {field.key: field.text for field in fields(self.task.page, one)}
        if sent.outcome == study.TOO_FAST:
            problem = (
                f"Please take at least {self.task.min_seconds:g} seconds for each page: send it "
                f"again in {math.ceil(sent.wait)} seconds. Your answers are still here."
            )
        else:
            problem = f"This needs {sent.fault}: {asked[sent.key]}"
        text = drawing.item(
            self.task, token, one, assignment.shown_order(self.task, one, judge),
            self.study.progress(judge), sent.wait, form, problem,
        )  # fmt: skip
        return page(text, 422)


def control_names(task: Task, item: Item) -> set[str]:
    """Return the names of the fields of an item's form."""
    names: set[str] = set()
    for field in fields(task.page, item):
        if field.question.kind not in views.NUMBERED:
            names.add(field.key)
        elif field.question.kind == "several":
            names |= {f"{field.key}-{n}" for n in range(1, len(item.rots) + 1)}
        else:
            names |= {f"{field.key}-{n}" for n in utterance_numbers(field.question, item)}
    return names


def _check_names(form: Mapping[str, str], known: Collection[str]) -> None:
    if unknown := sorted({*form} - {*known}):
        raise ApiError(400, f"the form has an unknown field {shown(unknown[0])}")


def _form(request: Request, body: bytes) -> dict[str, str]:
    """Return the fields of a form. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(415, f"got {shown(kind)}, expected a form of this server's pages")
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict",
            max_num_fields=MAX_FIELDS,
        )  # fmt: skip
    except ValueError as error:  # UnicodeDecodeError too
        raise ApiError(400, f"the form cannot be read: {error}") from None
    form = {name: value.replace("\r\n", "\n") for name, value in pairs}
    if len(form) < len(pairs):
        raise ApiError(400, "the form has a field twice")
    return form


def _check_operator(request: Request) -> None:
    """Raise ApiError unless the request comes from this machine, through no proxy."""
    host = web.hostname(f"//{request.headers.get('host', '')}") or ""
    client = request.client.host if request.client else ""
    forwarded = {"forwarded", "x-forwarded-for", "x-forwarded-host"} & {*request.headers}
    if not (web.is_loopback(client) and web.is_loopback(host)) or forwarded:
        raise ApiError(403, "the status is for the machine that the server runs on")


def _to_next(token: str) -> Response:
    # See Other: the browser then asks for the next page, and a reload sends nothing again.
    return RedirectResponse(f"/judge?token={quote(token, safe='')}", 303, headers=HEADERS)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def application(
    made: study.Study, tokens: Mapping[str, str], hosts: Collection[str] | None = None
) -> Starlette:
    """Return a study as an ASGI application."""
    return web.application(
        Pages(made, tokens).routes(),
        api_key=None,
        hosts=hosts,
        max_body_bytes=MAX_BODY_BYTES,
        metrics=Metrics("annotate"),
        error_page=error_page,
    )
