"""`python -m cosmo serve`: answer with a model behind OpenAI's API."""

import argparse
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError
from cosmo.serve import guard_flags


def run(args: argparse.Namespace) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    from cosmo.engine.web import errors

    errors.check_extra("serve")
    import dataclasses

    from cosmo.serve import server

    def given(config: type, **further: Any) -> Any:
        names = [f.name for f in dataclasses.fields(config) if f.name not in further]
        return config(**{name: getattr(args, name) for name in names}, **further)

    guard = given(server.GuardConfig)
    if args.canary is None and guard != server.GuardConfig():
        raise UserError("flags of the guard need --canary=PATH, the model that judges")
    server.serve(given(server.ServeConfig, guard=guard))


VERB = Verb(
    help="answer with a model behind OpenAI's API",
    description="Serve a model over HTTP with OpenAI's API: /v1/chat/completions and "
    "/v1/completions with streaming, /v1/models, and with --canary /v1/moderations. Requests that "
    "arrive together share their steps. Everything is compiled before the first request. "
    "/health and /metrics are for operators. Needs the extra `serve`; docs/serve.md has examples "
    "of requests.",
    examples="""\
  python -m cosmo serve --model=/tmp/run
  python -m cosmo serve --model=/data/cosmo-xl --canary=/tmp/canary --port=8001 --name=cosmo
  python -m cosmo serve --model=/tmp/run --backend=ctranslate2_int8
  python -m cosmo serve --model=/tmp/run --host=0.0.0.0 --api_key_env=COSMO_KEY
""",
    run=run,
    flags=f"""
the model:
--model PATH!       MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP, a
                    HuggingFace or T5X folder, or a ParlAI file: Cosmo, Prost, or any T5
--canary PATH       the safety module: its labels at /v1/moderations, a guarded API at /guard/v1,
                    and the rules of thumb that a Prost follows
--name NAME         the model's in the API (default: its folder's)
--vocabulary FILE   if none is kept with the checkpoint
--dtype float32|bfloat16  of products (float32 on a CPU, else bfloat16)
--num_partitions N=1  devices a model copy
--beams N=1         compile a beam search with so many beams, for requests that ask for it
{command_line.BACKEND_FLAG.format(macro="")}the guarded API at /guard/v1 (with --canary):
{guard_flags.GUARD}where it listens, and who may call:
--host HOST=127.0.0.1  0.0.0.0 is every address of this machine
--port N=8000       0 takes a free one, which is printed
--api_key_env NAME  environment variable with the key that clients must send (default: no key)
limits:
--slots N=32        answers that are written at a time
--max_queue N=256   requests that wait; more get status 429
--max_input_tokens N:int  longest input (the model's own); less means fewer programs to
                    compile, and less memory
--max_tokens N:int  longest answer (the model's own)
--deadline S=120.0  seconds that a request may take
--drain S=30.0      seconds that requests in flight have after SIGTERM
""",
)
