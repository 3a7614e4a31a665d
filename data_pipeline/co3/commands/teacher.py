"""Serve scripted answers to CO3's prompts: varied, plausible, the same for the same request.

It also answers the prompts of `prosocial make` and of `annotate judge`.

It speaks OpenAI's /v1/completions, /v1/chat/completions, /v1/moderations and /v1/models. Flags
make it give bad answers. GET /stats counts the requests. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno

from cosmo.engine.base.errors import UserError
from data_pipeline.co3 import prompts
from data_pipeline.co3.teacher import server


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `teacher`."""
    flags.description = __doc__
    flags.add_argument("--port", type=int, default=8765, help="0 takes a free port and prints it")
    flags.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    flags.add_argument("--latency", type=float, default=0.0, help="seconds to each answer")
    flags.add_argument("--misbehave", type=float, default=0.0, help="share of bad answers, 0 to 1")
    kinds = server.PASSING + server.LASTING
    flags.add_argument("--kinds", default=",".join(kinds), help="which: some of %(default)s")
    flags.add_argument("--retry_after", default="0.1", help="of a 429, in seconds")
    flags.add_argument("--slow_seconds", type=float, default=1.0, help="until a slow answer")
    flags.add_argument("--forms", default="completion,chat", help="those it offers (%(default)s)")
    flags.add_argument("--no_logprobs", action="store_true", help="give no log-probabilities")
    flags.add_argument("--model", default="teacher", help="the name it answers to (%(default)s)")
    flags.add_argument("--most_at_once", type=int, help="429 for more calls in flight than this")
    flags.add_argument("--key", default="", help="the key that callers must show; none by default")
    # The templates of the run that asks, because the teacher knows a stage by its template.
    flags.add_argument("--prompts", default=str(prompts.DEFAULT), help="the prompts it knows")
    flags.add_argument("--seed", type=int, default=0, help="another seed, other answers")


def run_teacher(args: argparse.Namespace) -> int:
    """Run `teacher`: serve until stopped."""
    kinds = server.PASSING + server.LASTING
    chosen = tuple(kind for kind in args.kinds.split(",") if kind)
    if unknown := set(chosen) - set(kinds):
        raise UserError(f"--kinds: no {unknown.pop()!r}; there are {', '.join(kinds)}")
    if not 0 <= args.misbehave <= 1:
        raise UserError(f"--misbehave={args.misbehave}: give a share from 0 to 1")
    same = ("latency", "misbehave", "retry_after", "slow_seconds", "model", "key", "most_at_once")
    manners = server.Manners(
        kinds=chosen,
        logprobs=not args.no_logprobs,
        forms=tuple(args.forms.split(",")),
        **{name: getattr(args, name) for name in (*same, "seed")},
    )
    try:
        texts = prompts.load(args.prompts)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={args.prompts}: {error}") from error
    teacher = server.Teacher(manners, texts)
    try:
        asyncio.run(server.forever(teacher, args.host, args.port))
    except OSError as error:
        # An earlier teacher is often still running.
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port={args.port} is in use: give another, or 0") from error
        raise UserError(f"--host={args.host}: {error}") from error
    return 0
