"""Time single labels through `canary.labeller`: what a guard adds to a dialogue's first token.

A T5 1.0 small (60M parameters) of random weights labels texts of 128 and of 512 tokens. A time
begins with the text and ends with the Chirp. Callers ask again as soon as they are answered.
"""

import argparse
import asyncio
import json
import pathlib
import tempfile
import time

from tools import bench_label, bench_rates, bench_sides

CONTEXTS = (128, 512)
CALLERS = (1, 8)
ROT_TOKENS = 16  # random weights end anywhere; a rule of thumb has about so many


def ours(args: argparse.Namespace) -> dict:
    """Return the milliseconds of every label, by data type, context, callers and kind."""
    from canary import Canary
    from canary.labeller import Labeller

    found = {}
    for dtype in args.dtypes.split(","):
        sizes = {"inputs": max(CONTEXTS), "targets": 16}
        canary = Canary.load(args.weights, batch_size=1, lengths=sizes, dtype=dtype)
        decoding = canary.decoding(max_new_tokens=ROT_TOKENS, min_length=ROT_TOKENS - 1)
        labeller = Labeller(canary, decoding=decoding)
        began = time.monotonic()
        labeller.warm_up()
        found[f"{dtype}, warm-up of all shapes"] = [1000 * (time.monotonic() - began)]
        for tokens in CONTEXTS:
            turns = _turns(canary, tokens)
            for callers in CALLERS:
                for rots in (False, True):
                    kind = f"label and {ROT_TOKENS} tokens of RoTs" if rots else "label"
                    name = f"{dtype}, {tokens} tokens, {callers} at once, {kind}"
                    calls = max(
                        1, args.calls // (callers if tokens == CONTEXTS[0] else 2 * callers)
                    )
                    found[name] = asyncio.run(_times(labeller, turns, callers, calls, rots))
        labeller.close()
    return found


async def _times(labeller, turns, callers: int, calls: int, rots: bool) -> list[float]:
    milliseconds = []

    async def caller():
        for _ in range(calls):
            began = time.monotonic()
            await labeller.label(turns, rots=rots)
            milliseconds.append(1000 * (time.monotonic() - began))

    await asyncio.gather(*(caller() for _ in range(callers)))
    return milliseconds


def _turns(canary, tokens: int) -> list[str]:
    """Return turns that are read as exactly so many tokens."""
    turns = ["I want to skip the line at the bakery. "] * (tokens // 16)
    while len(canary.context(turns).input_ids) > tokens:
        turns.pop()
    while len(canary.context([*turns, "why"]).input_ids) <= tokens:
        turns[-1] += " why"
        if len(canary.context(turns).input_ids) == tokens:
            break
    return turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `labeller`."""
    parser.description = __doc__
    bench_rates.add_arguments(parser)
    parser.add_argument("--calls", type=int, default=100, help="labels of each kind (100)")
    parser.add_argument("--dtypes", default="float32", help="such as float32,bfloat16")
    parser.add_argument("--vocabulary", metavar="FILE", help="T5's, if not in ../shared")


def run(args: argparse.Namespace) -> None:
    """Measure and print the table; with --side run in this process."""
    from cosmo.engine.base.tables import text_table

    if args.side:
        print(json.dumps(ours(args)))
        return
    vocabulary = args.vocabulary or next(
        p for p in bench_label.VOCABULARIES if pathlib.Path(p).exists()
    )
    with tempfile.TemporaryDirectory() as folder:
        args.weights = f"{folder}/weights"
        bench_sides.write_weights(args.weights, bench_label.network(), vocabulary)
        flags = (f"--calls={args.calls}", f"--dtypes={args.dtypes}")
        found = bench_rates.run_side("labeller", "ours", args, *flags)
    rows = [["T5 1.0 small, milliseconds", "of", "p50", "p95", "most"]]
    for name, times in found.items():
        order = sorted(times)
        picked = [order[int(share * (len(order) - 1))] for share in (0.5, 0.95, 1.0)]
        rows.append([name, str(len(order)), *(f"{ms:,.0f}" for ms in picked)])
    print(text_table(rows))
