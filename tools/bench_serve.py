"""Time `cosmo serve` over real sockets: one client, and many at once.

T5 1.1 small (77M parameters) with random weights, inputs and answers of 64 tokens, greedy, streamed
completions. `--backend=jax ctranslate2` compares engines. With --peer=transformers the same server
answers once more with the same weights, but transformers writes the answers, one request at a time.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

from cosmo.engine.base.command_line import HUGE_PAGES
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table
from cosmo.engine.infer.ctranslate2_model import BACKENDS

INPUT_TOKENS = ANSWER_TOKENS = 64
VOCABULARY = "tasks/sample/vocabulary.model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--peer", choices=["transformers"], help="measure it too")
    parser.add_argument("--rounds", type=int, default=3, help="servers a side, in turn (3)")
    parser.add_argument("--requests", type=int, default=4, help="of each client (4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of our products")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["jax"], help="ours")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32], help="at once (1 32)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Measure every side in turn, and print the table."""
    if args.side:
        serve_transformers(args.weights)
        return
    from tools import bench_sides

    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if args.peer and missing:
        raise UserError(
            f"--peer={args.peer} needs {' and '.join(missing)} here: pip install "
            "'cosmo-dialogue[hf]'"
        )
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    sides = [*args.backend, *([args.peer] if args.peer else [])]
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights"
        network = bench_sides.our_network(argparse.Namespace(dropout_rate=0.0, scan_layers=False))
        bench_sides.write_weights(weights, network, VOCABULARY)
        # Sides in turn, so that a slow minute of a shared machine falls on each of them.
        for number in range(args.rounds):
            for side in sides:
                with server(side, weights, args.dtype, max(args.clients)) as url:
                    for clients in args.clients:
                        result = asyncio.run(measure(url, clients, args.requests))
                        found.setdefault((side, clients), []).append(result)
                        rate = result["tokens/s"]
                        note = f"round {number + 1}: {side}, {clients} clients: {rate:.0f} tokens/s"
                        print(note, file=sys.stderr)
    print(table(found))


def table(found: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    """Return a row for each side and number of clients: medians over the rounds."""
    names = ["tokens/s", "first token p50", "first token p95", "answer p50", "answer p95"]
    rows = [["", "clients", *names, "x the first"]]
    for (side, clients), results in found.items():
        median = {name: statistics.median(one[name] for one in results) for name in names}
        first = next(many for one, many in found if one == side)
        alone = statistics.median(one["tokens/s"] for one in found[side, first])
        shown = [f"{median['tokens/s']:,.0f}", *(f"{median[n] * 1000:,.0f} ms" for n in names[1:])]
        rows.append([side, str(clients), *shown, f"{median['tokens/s'] / alone:.2f}"])
    return text_table(rows)


@contextlib.contextmanager
def server(side: str, weights: str, dtype: str | None, slots: int) -> Iterator[str]:
    """Start a side's server; yield its URL."""
    if side in BACKENDS:
        command = [sys.executable, "-m", "cosmo", "serve", f"--model={weights}", "--port=0"]
        command += [f"--max_input_tokens={INPUT_TOKENS}", f"--max_tokens={ANSWER_TOKENS}"]
        command += [f"--slots={slots}", f"--backend={side}", "--quiet", "--deadline=600"]
        command += [f"--dtype={dtype}"] if dtype and side == "jax" else []
    else:
        command = [sys.executable, "-m", "tools.bench", "serve", f"--side={side}"]
        command += [f"--weights={weights}"]
    # Set here, so that the server's process is the one that is started.
    environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.removeprefix("listening on ").strip()
                break
        else:
            raise SystemExit(f"{side}: the server did not start: {' '.join(command)}")
    finally:
        process.terminate()
        process.wait()


def prompts(count: int) -> list[list[int]]:
    """Return inputs of random pieces, all different, with EOS."""
    import numpy as np

    rows = np.random.default_rng(0).integers(3, 1900, (count, INPUT_TOKENS - 1))
    return [[*row, 1] for row in rows.tolist()]


async def measure(url: str, clients: int, requests: int) -> dict[str, float]:
    """Return tokens a second, and percentiles of times in seconds, of clients at once."""
    import httpx2

    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(
        base_url=url, trust_env=False, timeout=600, limits=limits
    ) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        # Not counted: connections are opened, and the machine's caches filled.
        warm = prompts(clients)
        await asyncio.gather(*(ask(client, name, prompt) for prompt in warm))
        todo = iter(prompts(clients * (requests + 1))[clients:])
        firsts, wholes, tokens = [], [], 0

        async def one() -> None:
            nonlocal tokens
            for _ in range(requests):
                first, whole, count = await ask(client, name, next(todo))
                firsts.append(first)
                wholes.append(whole)
                tokens += count

        began = time.monotonic()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.monotonic() - began
    return {
        "tokens/s": tokens / seconds,
        **{f"first token p{p}": percentile(firsts, p) for p in (50, 95)},
        **{f"answer p{p}": percentile(wholes, p) for p in (50, 95)},
    }


async def ask(client: Any, model: str, prompt: Sequence[int]) -> tuple[float, float, int]:
    """Return (seconds to the first token, seconds to the end, tokens) of one answer."""
    from cosmo.engine.web import sse

    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.monotonic()
    first, tokens = None, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for event in sse.parse(answer.aiter_bytes()):
            first = first or time.monotonic() - began
            if event.data != "[DONE]":
                usage = json.loads(event.data).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    if not tokens:
        raise SystemExit("an answer had no tokens")
    return first, time.monotonic() - began, tokens


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def serve_transformers(weights: str) -> None:
    """Serve a HuggingFace folder behind our routes; transformers writes the answers."""
    from cosmo.engine.web import run as web
    from cosmo.serve import api
    from cosmo.serve.model import Served
    from cosmo.tasks import formatting, vocabularies

    session = types.SimpleNamespace(
        vocabulary=vocabularies.load(VOCABULARY),
        lengths={"inputs": INPUT_TOKENS, "targets": ANSWER_TOKENS},
        model=types.SimpleNamespace(network=types.SimpleNamespace(max_positions=None)),
    )
    model = Served("transformers", session, formatting.Separators())
    service = api.Service(
        model, TransformersScheduler(weights), settings=api.Settings(deadline=600.0)
    )
    web.serve(api.application(service), port=0)


class TransformersScheduler:
    """The scheduler's interface over transformers' `generate`: one request at a time, greedy."""

    slots, compilations = 1, 0

    def __init__(self, weights: str):
        import queue

        from transformers import AutoModelForSeq2SeqLM

        self.model = AutoModelForSeq2SeqLM.from_pretrained(weights).eval()
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.counts = types.SimpleNamespace(active=0, queued=0, steps=0, encoder_batches=0)
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, input_ids: Sequence[int], samplings: Sequence[Any], on_event: Any) -> Any:
        """Queue a request of one sample."""
        self.waiting.put((list(input_ids), samplings[0].max_new_tokens, on_event))
        return types.SimpleNamespace(cancel=lambda number=None: None)

    def _run(self) -> None:
        import torch

        from cosmo.engine.infer.continuous import Finished, Token

        class Streamer:
            """Send tokens as transformers writes them; the first is the decoder's start."""

            def __init__(self, on_event: Any):
                self.on_event, self.started = on_event, False

            def put(self, value: Any) -> None:
                """Take the next token."""
                if self.started:
                    self.on_event(0, Token(int(value), 0.0, ()))
                self.started = True

            def end(self) -> None:
                """Take the end, which follows below."""

        while True:
            ids, most, on_event = self.waiting.get()
            self.model.generate(
                torch.tensor([ids]),
                max_new_tokens=most,
                do_sample=False,
                streamer=Streamer(on_event),
            )
            on_event(0, Finished("length"))

    def close(self, drain: bool) -> None:
        """End with the process."""
