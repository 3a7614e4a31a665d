"""`python -m canary guard`: a proxy in front of a model server that judges what passes."""

import argparse
import logging
from typing import Any

from canary.cli import flags
from cosmo.engine.base.command_line import Verb

log = logging.getLogger("canary.guard")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    from cosmo.engine.web import errors

    errors.check_extra("canary guard")
    from canary import labeller
    from canary.guard import judging, settings, upstream
    from cosmo.engine.base.progress import counted
    from cosmo.engine.web import run as running

    # All that can be wrong, before the model is loaded.
    config = settings.GuardConfig(
        args.policy, args.audit, args.audit_text, args.queue, args.webhook
    )
    rules = config.rules()
    own_key = errors.key_from(args.api_key_env, "api_key_env")
    upstream_key = errors.key_from(args.upstream_key_env, "upstream_key_env")
    if own_key is not None and upstream_key is None:
        upstream_key = ""  # the client's key is the guard's: the upstream must not get it
    server = upstream.HttpUpstream(args.upstream, rules.limits, upstream_key)
    listener = running.listen(args.host, args.port)
    parts = config.parts(rules)
    running.warn_if_open(args.host, own_key)
    args.checkpoint = args.canary
    with running.starting(listener):
        canary = flags.model_settings(args, batch_size=1).open()
        longest = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
        labels = labeller.Labeller(
            canary, max_queue=args.max_queue, decoding=canary.decoding(**longest)
        )
        labels.warm_up(counted(log, "compiling Canary's programs"))
    judge = judging.Judge(labels, rules, *judging.of_model(canary))
    app = application(server, judge, rules, parts, own_key, args.host)
    log.info("guarding %s", server.url)
    try:
        running.serve(app, args.host, args.port, listener=listener)
    finally:
        labels.close()


def application(
    server: Any, judge: Any, rules: Any, parts: dict[str, Any], api_key: str | None, host: str
) -> Any:
    """Return the guard as an ASGI application, with /health and /metrics."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from canary.guard import routes
    from cosmo.engine.web import app as web
    from cosmo.engine.web.metrics import Metrics

    metrics = Metrics("canary")
    guard = routes.Guard(server, judge, rules, metrics=metrics, **parts)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return web.application(
        [*guard.routes(), Route("/health", health), metrics.route()],
        api_key=api_key,
        hosts=web.allowed_hosts(host),
        max_body_bytes=rules.limits.request_bytes,
        metrics=metrics,
        lifespan=guard.running,
    )


VERB = Verb(
    help="guard a model server: judge turns and answers between it and its clients",
    description="Listen as an OpenAI-compatible server, and ask another one. Each user turn is "
    "labelled given its dialogue: by policy it passes, is guided by rules of thumb, or is answered "
    "with a set text while a person is called. The model's answer is labelled sentence by "
    "sentence, and none reaches the client before it has passed. Needs the extra serve.",
    examples="""\
  python -m canary guard --upstream=http://127.0.0.1:8080 --canary=/tmp/canary
  python -m canary guard --upstream=https://api.openai.com/v1 --canary=/tmp/canary \\
    --policy=policy.toml --audit=audit.jsonl --queue=people.jsonl
""",
    run=run,
    flags=f"""
--upstream URL!     the server to guard, with /v1 or without
{flags.GUARD}--host HOST=127.0.0.1  where to listen
--port N=8100       where to listen; 0 takes a free port
--upstream_key_env NAME  environment variable with the upstream's key (default: the client's key
                    is handed on)
--api_key_env NAME  environment variable with a key that clients must send
--max_queue N=256   dialogues that may wait for a label; more fail as the policy says
--max_new_tokens N:int  longest rules of thumb
{flags.MODEL.replace("--checkpoint CKPT!", "--canary CKPT!    ")}
""",
)
