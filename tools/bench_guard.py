"""Measure what `canary guard` adds to the first token: `python -m tools.bench_guard`.

A scripted server streams an answer whose first event is one whole sentence. The added time is thus
the guard's own: two labels and the audit log's fsyncs. The same requests go to the server directly
and through the guard, in turn. From a guarded request's time to its first character, the median of
the direct ones is subtracted.

The Canary is a T5 1.1 small with random weights: times do not depend on them, but labels do. So
they are biased to one label, and the policy lets every label pass. A casual turn costs its label
alone. For a turn that needs caution, rules of thumb of --rot_tokens tokens are written before the
server is asked. Both are measured, each in a process of its own.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table
from cosmo.tasks import safety
from tools import bench_label

# T5's own if it is here, because a label costs by its pieces.
VOCABULARIES = bench_label.VOCABULARIES
# A casual turn costs its label alone, any other one its rules of thumb too.
LABELS = {"casual": safety.LABELS[0], "caution": "__needs_caution__"}
SENTENCE = "I would say that it depends on what you and your friend want. "
POLICY = """
[turn]
possibly_needs_caution = "pass"
probably_needs_caution = "pass"
needs_caution = "pass"
needs_intervention = "pass"
[answer]
needs_caution = "pass"
needs_intervention = "pass"
[limits]
label_seconds = 120.0
"""
WORDS = [
    "I",
    "you",
    "my",
    "friend",
    "want",
    "to",
    "go",
    "home",
    "and",
    "talk",
    "work",
    "the",
    "dog",
]


def write_canary(folder: pathlib.Path, vocabulary_path: str, label: str) -> None:
    """Write a run with a T5 1.1 small of random weights that labels every turn with `label`."""
    import jax
    import numpy as np

    from cosmo.engine.checkpoints import lazy, run_checkpoints, streaming
    from cosmo.engine.checkpoints.description import describe
    from cosmo.engine.model import models, t5
    from cosmo.tasks import vocabularies

    kept = folder / run_checkpoints.VOCABULARY
    kept.write_bytes(pathlib.Path(vocabulary_path).read_bytes())
    vocabulary = vocabularies.load(kept)
    # As gin/models/t5_1_1_small.gin.
    network = t5.T5Config(
        vocab_size=32128,
        emb_dim=512,
        num_heads=6,
        num_encoder_layers=8,
        num_decoder_layers=8,
        head_dim=64,
        mlp_dim=1024,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
        dtype="float32",
    )
    model = models.EncoderDecoderModel(network)
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> Any:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        return (0.05 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, models.abstract_params(model))
    # Tokens have one large coordinate, so that logits hardly depend on what was read. They are
    # high for tokens of the label, and low for those of others and for EOS, which ends texts.
    params["token_embedder"][:, 0] = 1000.0
    logits_V = params["decoder"]["logits_dense"][0]
    pieces = {name: set(vocabulary.encode(name)) for name in safety.LABELS}
    others = set().union(*(found for name, found in pieces.items() if name != label))
    logits_V[list(others | {vocabulary.eos_id})] = -3.0
    logits_V[list(pieces[label])] = 1.0
    lazy_params = jax.tree.map(lazy.from_array, params)
    description = describe(model, vocabulary)
    streaming.write_checkpoint(str(folder), 1, {"params": lazy_params}, description)
    (folder / "config.gin").write_text("TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 128}\n")


def scripted_server(sentences: int) -> Any:
    """Return an application that streams `sentences`, one an event, as fast as they are taken."""
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    from cosmo.engine.web import sse

    async def events() -> AsyncIterator[bytes]:
        for number in range(sentences + 1):
            ends = number == sentences
            choice = {"index": 0, "delta": {} if ends else {"content": SENTENCE}}
            choice["finish_reason"] = "stop" if ends else None
            yield sse.event({"id": "bench", "choices": [choice]})
        yield sse.DONE

    async def chat(request: Any) -> Any:
        await request.body()
        return StreamingResponse(events(), media_type=sse.MEDIA_TYPE)

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


@contextlib.contextmanager
def guard_process(
    upstream: str, args: argparse.Namespace, label: str, folder: pathlib.Path
) -> Iterator[tuple[str, float]]:
    """Start the verb in a process of its own; yield its URL and the seconds it took to be ready."""
    vocabulary = args.vocabulary or next(p for p in VOCABULARIES if pathlib.Path(p).exists())
    write_canary(folder, vocabulary, label)
    (folder / "policy.toml").write_text(POLICY)
    command = [sys.executable, "-m", "canary", "guard", f"--upstream={upstream}", "--port=0"]
    command += [f"--canary={folder}", f"--policy={folder}/policy.toml", "--quiet"]
    command += [f"--audit={folder}/audit.jsonl", f"--max_new_tokens={args.rot_tokens}"]
    command += ["--max_queue=1024"] + ([f"--dtype={args.dtype}"] if args.dtype else [])
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError("the guard did not start; its error is above")
        yield line.split()[-1], time.monotonic() - began
    finally:
        process.terminate()
        process.wait()


def request_body(rng: random.Random, turns: int, words: int) -> dict[str, Any]:
    """Return a request with a dialogue of its own, so that no label is shared."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[n % 2], "content": " ".join(rng.choices(WORDS, k=words))}
        for n in range(turns)
    ]
    return {"model": "m", "stream": True, "messages": messages}


async def first_character(client: Any, url: str, body: dict[str, Any], label: str | None) -> float:
    """Return the seconds from a request to its first character; read the answer to its end.

    Raises UserError if the answer has no character, or is not marked with the turn's `label`.
    """
    began, found, marked = time.perf_counter(), None, label is None
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if found is None and '"content": "I would' in line:
                found = time.perf_counter() - began
            marked = marked or f'"label": "{label}"' in line
    if found is None:
        raise UserError(f"status {answer.status_code}: an answer without a character")
    if not marked:
        raise UserError(f"a turn was not labelled {label}: the Canary's weights are not as meant")
    return found


async def times(
    url: str, clients: int, requests: int, args: argparse.Namespace, label: str | None = None
) -> list[float]:
    """Return the times of `requests` requests of each of `clients` clients, which ask in turn."""
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    rng = random.Random(args.seed)

    async def one(client: Any) -> list[float]:
        bodies = [request_body(rng, args.turns, args.words) for _ in range(requests)]
        return [await first_character(client, url, body, label) for body in bodies]

    async with httpx2.AsyncClient(limits=limits, timeout=300, trust_env=False) as client:
        found = await asyncio.gather(*(one(client) for _ in range(clients)))
    return [seconds for times in found for seconds in times]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each label and number of clients: added milliseconds, p50 and p95."""
    from cosmo.engine.web import run

    rows = []
    with run.background(scripted_server(args.sentences)) as upstream:
        for name, label in LABELS.items():
            with (
                tempfile.TemporaryDirectory() as folder,
                guard_process(upstream, args, label, pathlib.Path(folder)) as (guarded, ready),
            ):
                for clients in args.clients:
                    found = added(upstream, guarded, clients, label, args)
                    rows.append({"turns": name, "clients": clients, **found, "ready_s": ready})
    return rows


def added(
    upstream: str, guarded: str, clients: int, label: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the times that so many clients wait longer for the guard."""
    each = max(1, args.requests // clients)
    asyncio.run(times(guarded, clients, 1, args, label))  # connections, caches
    direct, through, spent = [], [], 0.0
    for _ in range(args.rounds):
        direct += asyncio.run(times(upstream, clients, each, args))
        began = time.monotonic()
        through += asyncio.run(times(guarded, clients, each, args, label))
        spent += time.monotonic() - began
    base = statistics.median(direct)
    more = sorted(1000 * (seconds - base) for seconds in through)
    return {
        "requests": len(more),
        "direct_p50_ms": 1000 * base,
        "added_p50_ms": statistics.median(more),
        "added_p95_ms": more[int(0.95 * (len(more) - 1))],
        # The turn's, and one of each sentence.
        "labels_per_s": len(more) * (1 + args.sentences) / spent,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_flags(
        parser,
        """
--clients LIST:ints  clients at once, such as 1,64
--requests N=200    of all clients, a round
--rounds N=2        direct and guarded, in turn
--turns N=3         of a dialogue
--words N=20        of a turn
--sentences N=4     of an answer
--rot_tokens N=32   of the rules of thumb of a turn that needs caution
--vocabulary FILE   T5's, if not in ../shared
--dtype float32|bfloat16  of Canary's products
--seed N=0          of the dialogues
""",
    )
    args = parser.parse_args(argv)
    args.clients = args.clients or (1, 64)
    rows = measure(args)
    head = ["turns", "clients", "requests", "direct p50 ms", "added p50 ms", "added p95 ms"]
    head += ["labels/s", "ready after s"]
    cells = [
        [f"{value:,.1f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(text_table([head, *cells]))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.guarded(main))
