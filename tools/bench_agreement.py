"""Compare the answers of CTranslate2, float32 and int8, with the engine's in float32, by token.

Answers are greedy, to the beginnings of a file's dialogues. A token is one that the vocabulary
makes of an answer's text. A different token changes all that follow it. So three shares are given:
of equal answers, of tokens before the first difference, and of equal tokens at all places.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.tables import text_table

BASELINE, OTHERS = "jax", ("ctranslate2", "ctranslate2_int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `agreement`."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="a T5 of any format")
    add("--vocabulary", help="if none is kept with the checkpoint")
    add("--input", required=True, help="JSON lines of {turns} or SODA's {dialogue}")
    add("--count", type=int, default=200, help="beginnings of dialogues that are answered (200)")
    add("--new_tokens", type=int, default=64, help="longest answer (64)")
    add("--batch_size", type=int, default=32, help="at a time (32)")


def beginnings(path: str) -> Iterator[list[str]]:
    """Yield each beginning of each dialogue in a file, without the whole dialogue."""
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), start=1):
        row = json.loads(line)
        turns = row.get("turns") or row.get("dialogue")
        if not turns:
            raise UserError(f"{path}:{number}: no turns and no dialogue: give JSON lines with one")
        yield from (turns[:end] for end in range(1, max(len(turns), 2)))


def shares(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the shares, 0 to 1, of what is equal in two lists of answers' token ids."""
    pairs = list(zip(wanted, found, strict=True))
    tokens = sum(max(len(a), len(b)) for a, b in pairs) or 1
    same = [[x == y for x, y in zip(a, b, strict=False)] for a, b in pairs]
    before = sum(len(list(itertools.takewhile(bool, one))) for one in same)
    return {
        "answers": sum(list(a) == list(b) for a, b in pairs) / max(len(pairs), 1),
        "tokens before the first difference": before / tokens,
        "tokens": sum(map(sum, same)) / tokens,
    }


def answers(args: argparse.Namespace, backend: str, contexts: list[list[str]]) -> list[list[int]]:
    """Return the token ids of a backend's answers."""
    import cosmo

    model = cosmo.load(
        args.checkpoint, vocabulary=args.vocabulary, batch_size=args.batch_size, backend=backend
    )
    replies = model.generate(contexts, max_new_tokens=args.new_tokens)
    return [model.session.vocabulary.encode(reply.text) for reply in replies]


def run(args: argparse.Namespace) -> None:
    """Print the shares of each backend."""
    contexts = list(itertools.islice(beginnings(args.input), args.count))
    wanted = answers(args, BASELINE, contexts)
    rows = [["", "answers", "tokens before the first difference", "tokens"]]
    for backend in OTHERS:
        found = shares(wanted, answers(args, backend, contexts))
        rows.append([backend, *(f"{share:.1%}" for share in found.values())])
    tokens = sum(map(len, wanted))
    print(f"equal to {BASELINE} in float32, of {len(contexts)} answers, {tokens} tokens")
    print(text_table(rows, indent=2))
