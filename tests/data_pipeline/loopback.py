"""A teacher on a real loopback socket, in a thread or in a process, and runs against it."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import urllib.request

from data_pipeline import __main__ as command
from data_pipeline.co3.teacher import server

TRIPLES = [
    ("PersonX goes to the market", "xNeed", "to find a bag"),
    ("PersonX helps PersonY", "xReact", "happy"),
    ("PersonX loses PersonX's key", "xWant", "to look for it"),
    ("PersonX bakes a cake", "xAttr", "patient"),
    ("PersonX calls PersonY", "xIntent", "to be kind"),
    ("PersonX eats ___", "xReact", "full"),
    ("PersonX sings", "oReact", "amused"),
]


def write_triples(path, count: int) -> int:
    """`count` triples, all different; how many of them can be used."""
    usable = 0
    with open(path, "w") as file:
        for number in range(count):
            head, relation, tail = TRIPLES[number % len(TRIPLES)]
            head = f"{head} for the {number}th time" if number >= len(TRIPLES) else head
            usable += "___" not in head and relation != "oReact"
            file.write(json.dumps({"head": head, "relation": relation, "tail": tail}) + "\n")
    return usable


@contextlib.contextmanager
def teacher(texts=None, **manners):
    """(base_url, the Teacher) of one in a thread of this process; `texts` are its prompts."""
    taught = server.Teacher(server.Manners(**manners), texts)
    loop = asyncio.new_event_loop()
    serving = loop.run_until_complete(server.serve(taught, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.sockets[0].getsockname()[1]}/v1", taught
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        serving.close()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


@contextlib.contextmanager
def teacher_process(*flags):
    """base_url of one in a process of its own."""
    arguments = [sys.executable, "-m", "data_pipeline", "teacher", "--port=0", *flags]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[2].rstrip(",")
    finally:
        process.terminate()
        process.wait()


def stats(base_url: str) -> dict:
    """What a teacher was asked so far."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/stats") as answer:
        return json.load(answer)


def flags(triples, output, base_url: str, *more: str) -> list[str]:
    """A co3 command."""
    named = [f"--triples={triples}", f"--output={output}", f"--base_url={base_url}"]
    return ["co3", *named, "--model=teacher", "--quiet", "--no_parquet", "--no_plots", *more]


def co3(triples, output, base_url: str, *more: str) -> int:
    """A run in this process; its exit code."""
    return command.main(flags(triples, output, base_url, *more))


def outputs(folder) -> dict[str, bytes]:
    """The bytes that may depend on nothing but inputs, seed and answers."""
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in ("soda", "rejected")}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
