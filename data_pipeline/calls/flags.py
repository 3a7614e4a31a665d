"""Flags of commands that ask a model: server, limits, prices; checked before any call."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable

from cosmo.engine.base.errors import UserError
from data_pipeline.calls import secrets
from data_pipeline.calls.client import Server
from data_pipeline.calls.limits import Allowance

FORMS = ("auto", "completion", "chat")
# Numbers that must be above 0, and the least value of others.
_ABOVE_0 = ("timeout", "requests_per_minute", "tokens_per_minute")
_LEAST = {"concurrency": 1, "tries": 1} | dict.fromkeys(
    ("token_cap", "cost_cap", "price_in", "price_out"), 0
)


def add_server(group: argparse._ActionsContainer, required: bool = True) -> None:
    """Add the flags of a server and its model."""
    # Without a default, so that a forgotten flag sends no calls to a paid service.
    group.add_argument("--base_url", required=required, help="such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", required=required)
    add_calls(group)


def add_calls(group: argparse._ActionsContainer) -> None:
    """Add the flags of how a server is asked."""
    group.add_argument("--form", choices=FORMS, default="auto")
    # The name of a variable, because every user of a machine can list the arguments of processes.
    group.add_argument("--api_key_env", default="OPENAI_API_KEY", metavar="NAME")
    group.add_argument("--body", default="{}", help="JSON: fields to add to each request, or null")
    group.add_argument("--timeout", type=float, default=120, help="seconds (%(default)s)")
    group.add_argument("--tries", type=int, default=8, help="of a call (%(default)s)")


def add_limits(group: argparse._ActionsContainer) -> None:
    """Add the flags of limits and prices."""
    group.add_argument(
        "--concurrency",
        type=int,
        default=16,
        help="calls in flight at most (%(default)s); fewer after a 429 or 503",
    )
    group.add_argument("--requests_per_minute", type=float)
    group.add_argument("--tokens_per_minute", type=float)
    group.add_argument("--token_cap", type=int, help="of all starts of this run together")
    group.add_argument("--cost_cap", type=float, help="the same, in the currency of the prices")
    group.add_argument("--price_in", type=float, default=0, help="of a million tokens")
    group.add_argument("--price_out", type=float, default=0)


def check(
    args: argparse.Namespace,
    urls: Iterable[str] = ("base_url",),
    least: dict[str, float] | None = None,
) -> None:
    """Raise UserError for an address without a scheme, or a number out of range.

    `least` are further flags with their least values.
    """
    for name in urls:
        url = getattr(args, name)
        # Without a scheme the host would be taken for one: "localhost:8000".
        if url is not None and not url.lower().startswith(("http://", "https://")):
            shown = secrets.address(url)
            raise UserError(f"--{name}={shown}: http:// or https:// is missing before it")
    bounds = _LEAST | (least or {})
    for name in (*_ABOVE_0, *bounds):
        value = getattr(args, name)
        if value is None:
            continue
        low, above = bounds.get(name, 0), name in _ABOVE_0
        # argparse reads "nan" as a number, and no comparison refuses it.
        if not math.isfinite(value) or value < low or (above and value == 0):
            want = "more than 0" if above else f"{low} or more"
            raise UserError(f"--{name}={value:g}: give {want}")


def server(
    args: argparse.Namespace, base_url: str | None = None, model: str | None = None
) -> Server:
    """Return the server of the flags, or one at another address with their other settings."""
    try:
        if not isinstance(json.loads(args.body), dict):
            raise ValueError("give a JSON object")
    except ValueError as error:
        raise UserError(f"--body: {error}") from error  # without the value: it may hold a secret
    return Server(
        args.base_url if base_url is None else base_url,
        args.model if model is None else model,
        key_variable=args.api_key_env,
        timeout=args.timeout,
        extra_body=args.body,
    )


def allowance(args: argparse.Namespace) -> Allowance:
    """Return the limits of the flags."""
    # At a price of 0 the cap would never be reached.
    if args.cost_cap is not None and not (args.price_in or args.price_out):
        raise UserError("--cost_cap needs --price_in and --price_out, of a million tokens")
    names = [field.name for field in dataclasses.fields(Allowance)]
    return Allowance(**{name: getattr(args, name) for name in names})
