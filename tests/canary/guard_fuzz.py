"""Streams of any form, cut anywhere, whose every character can be told apart.

Each character of a model's text is another one of Unicode, so a leak shows whatever field, key or
log-probability it hides in.
"""

import dataclasses
import json
import random

from canary.guard.upstream import UpstreamError
from tests.canary import guard_doubles as doubles
from tests.canary.guard_doubles import CASUAL, CAUTION, EVENTS, Script

BAD = "\u2620"  # in a sentence that must not pass
COMMON = set(" .!?\n\"'()" + "\u2026\u3002") | set(map(chr, range(128)))


def characters(rng: random.Random):
    """Yield characters that are all different: Chinese, Korean, and of the astral planes."""
    pools = [range(0x4E00, 0x9F00), range(0xAC00, 0xD700), range(0x20000, 0x2A000)]
    for number in range(rng.randrange(2000), 10_000):
        yield from (chr(pool[number]) for pool in pools if number < len(pool))


@dataclasses.dataclass
class Stream:
    """What one stream is made of."""

    form: str
    count: int  # of choices
    texts: dict  # (choice, field) -> the text of the model
    calls: dict  # choice -> [(name, arguments)]
    pieces: list  # for a Script
    whole: bool  # ends with [DONE]
    hidden: set  # characters of fields that nobody judges


def sentence(rng, fresh, bad):
    length = rng.choice([1, 3, 20, 40, 60, 90]) if rng.random() < 0.97 else 500
    words = []
    while length > 0:
        size = min(length, rng.randint(1, 12))
        words.append("".join(next(fresh) for _ in range(size)))
        length -= size
    text = rng.choice([" ", "", "  "]).join(words)
    if bad:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + BAD + text[place:]
    return text + rng.choice([". ", "! ", "...\n", "?\n\n", '." ', "", " ", "\u3002", ".\u2026  "])


def make(seed: int) -> Stream:
    """Return the stream of a seed."""
    rng = random.Random(seed)
    fresh = characters(rng)
    form = rng.choice(["chat", "chat", "completion"])
    count = rng.choice([1, 1, 2, 3])
    texts, calls, moves = {}, {}, []
    bad_share = rng.choice([0.0, 0.0, 0.2])
    fields = (
        ["text"]
        if form == "completion"
        else ["reasoning_content", "reasoning", "content", "refusal"]
    )
    for choice in range(count):
        order = []
        for field in fields:
            if form == "chat" and rng.random() < (0.1 if field == "content" else 0.8):
                continue
            parts = [
                sentence(rng, fresh, rng.random() < bad_share) for _ in range(rng.randint(0, 4))
            ]
            text = "".join(parts)
            texts[choice, field] = text
            order += [(choice, field, piece) for piece in cut(rng, text)]
        if form == "chat" and rng.random() < 0.3:
            made = []
            for number in range(rng.randint(1, 3)):
                bad = BAD if rng.random() < bad_share else ""
                name = "".join(next(fresh) for _ in range(3))
                value = "".join(next(fresh) for _ in range(9)) + bad
                arguments = json.dumps({"a": [value, 1.5]}, ensure_ascii=rng.random() < 0.5)
                made.append((name, arguments))
                order.append((choice, "call", (number, {"name": name})))
                order += [
                    (choice, "call", (number, {"arguments": piece}))
                    for piece in cut(rng, arguments)
                ]
            calls[choice] = made
        order.append((choice, "finish", rng.choice(["stop", "length", None, next(fresh)])))
        moves.append(order)
    events, hidden = [], set()
    while any(moves):
        order = rng.choice([one for one in moves if one])
        events.append(event(rng, fresh, hidden, form, *order.pop(0)))
    if rng.random() < 0.3:
        usage = {"total_tokens": 3, "prompt_tokens": secret(fresh, hidden)}
        usage[secret(fresh, hidden)] = 4
        events.append({"choices": [], "usage": usage})
    ending = rng.choice(["done", "done", "done", "end", "cut", "error", "late"])
    data = wire(rng, fresh, hidden, events, ending == "done")
    pieces = chunks(rng, data)
    if ending == "error":
        failure = {"error": {"message": "boom", "code": 500}}
        pieces.append(f"data: {json.dumps(failure)}\n\n".encode())
    if ending in ("cut", "late"):
        pieces = pieces[: rng.randint(0, len(pieces))]
        code = "upstream_cut" if ending == "cut" else "upstream_timeout"
        pieces.append(UpstreamError(502, "it broke", code))
    return Stream(form, count, texts, calls, pieces, ending == "done", hidden)


def secret(fresh, hidden) -> str:
    found = "".join(next(fresh) for _ in range(3))
    hidden.update(found)
    return found


def cut(rng, text: str) -> list[str]:
    """Cut a text anywhere, between the halves of a surrogate pair too."""
    halves = text.encode("utf-16-le", "surrogatepass")
    units = [
        halves[n : n + 2].decode("utf-16-le", "surrogatepass") for n in range(0, len(halves), 2)
    ]
    # In single characters where it is short: each costs an event.
    pieces, most = [], rng.choice([1 if len(text) < 60 else 8, 3, 10, 80, 2000])
    while units:
        size = rng.randint(1, most)
        piece, units = "".join(units[:size]), units[size:]
        # Whole pairs as one character; a half at either end stays half.
        pieces.append(
            piece.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            if not halved(piece)
            else piece
        )
    return pieces


def halved(piece: str) -> bool:
    return "\udc00" <= piece[0] <= "\udfff" or "\ud800" <= piece[-1] <= "\udbff"


def event(rng, fresh, hidden, form, choice, field, value) -> dict:
    """Return the chunk of one step of a choice, with fields that nobody asked for."""
    one = {"index": choice, "finish_reason": None}
    delta = {}
    if field == "call":
        number, function = value
        call = {"index": number, "id": f"call_{number}", "type": "function", "function": function}
        delta["tool_calls"] = [call]
    elif field == "finish":
        one["finish_reason"] = value
    elif form == "completion":
        one["text"] = value
        if rng.random() < 0.3:
            tops = [{secret(fresh, hidden): -3.0}]
            tokens = {"tokens": [value], "token_logprobs": [-0.5], "top_logprobs": tops}
            one["logprobs"] = {**tokens, "text_offset": [0]}
    else:
        delta[field] = value
        if rng.random() < 0.1 and field == "content":
            delta[field] = [{"type": "text", "text": value}]
        if rng.random() < 0.3:
            one["logprobs"] = {field: tokens_of(rng, fresh, hidden, value)}
    if rng.random() < 0.2:
        place = rng.choice([one, delta])
        place[rng.choice(["thinking", "stop_reason", "annotations", "audio"])] = rng.choice(
            [secret(fresh, hidden), [secret(fresh, hidden)], {secret(fresh, hidden): 1}]
        )
    if form == "chat":
        one["delta"] = delta
    chunk = {"id": "c-1", "created": 1, "model": "m", "choices": [one]}
    if rng.random() < 0.1:
        chunk[rng.choice(["id", "object", "model", "note", "provider"])] = secret(fresh, hidden)
    return chunk


def tokens_of(rng, fresh, hidden, text) -> list:
    """Return log-probabilities of a text, some of them of other characters, or in bytes."""
    found = []
    for piece in [text[n : n + 2] for n in range(0, len(text), 2)]:
        data = list(piece.encode("utf-8", "surrogatepass"))
        top = [{"token": secret(fresh, hidden), "logprob": -2.0, "bytes": None}]
        if rng.random() < 0.2 and len(data) > 1:
            for byte in data:  # a token a byte, as byte-level vocabularies have it
                found.append({"token": f"\\x{byte:02x}", "logprob": -1, "bytes": [byte]})
        else:
            found.append({"token": piece, "logprob": -0.1, "bytes": data, "top_logprobs": top})
        if rng.random() < 0.1:
            lie = secret(fresh, hidden)
            found.append({"token": lie, "logprob": 0, "bytes": list(lie.encode())})
    return found


def wire(rng, fresh, hidden, events, done) -> bytes:
    """Return the bytes of events: comments, names, any line ends, JSON over several lines."""
    newline = rng.choice(["\n", "\r\n", "\r"])
    lines = []
    for chunk in events:
        if rng.random() < 0.1:
            lines += [f": {secret(fresh, hidden)}", ""]
        if rng.random() < 0.1:
            lines.append(f"event: {secret(fresh, hidden)}")
        # Halves of pairs can only be written as escapes.
        ascii_only = rng.random() < 0.3 or not encodable(chunk)
        indent = 1 if rng.random() < 0.1 else None
        text = json.dumps(chunk, ensure_ascii=ascii_only, indent=indent)
        lines += [f"data:{rng.choice(['', ' '])}{line}" for line in text.split("\n")]
        lines.append("")
    lines += ["data: [DONE]", ""] if done else []
    mark = rng.choice(["", "", "\ufeff"])
    return (mark + newline.join([*lines, ""])).encode()


def encodable(chunk) -> bool:
    try:
        json.dumps(chunk, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def chunks(rng, data: bytes) -> list[bytes]:
    pieces, most, place = [], rng.choice([1, 7, 100, 5000]), 0
    most = max(most, len(data) // 500)
    while place < len(data):
        size = rng.randint(1, most)
        pieces.append(data[place : place + size])
        place += size
    return pieces


class Recorder(doubles.Labels):
    """Passes what has no BAD, after a while. It keeps the characters that have passed."""

    def __init__(self, seed):
        super().__init__(lambda turns: CAUTION if BAD in turns[-1] else CASUAL, seed=seed)
        self.characters: set[str] = set()

    async def label(self, turns, *, rots):
        found = await super().label(turns, rots=rots)
        if found.label == CASUAL:
            self.characters.update(turns[-1])
        return found


def strings(value):
    """Yield every text in a JSON value, keys and lists of bytes included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        if value and all(type(one) is int for one in value):
            yield bytes(one % 256 for one in value).decode("utf-8", "ignore")
        for inner in value:
            yield from strings(inner)


class Watch:
    """The independent recorder: reads each byte that leaves, and what was judged before it."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.rest, self.leaks, self.values = recorder, b"", [], []

    def __call__(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n\n")
        for block in whole:
            text = block.decode().removeprefix("data: ")
            if text.startswith(":") or text == "[DONE]":
                self.values += [text] if text == "[DONE]" else []
                continue
            value = json.loads(text)
            self.values.append(value)
            self.look(value)

    def look(self, value) -> None:
        found = set("".join(strings(value))) - COMMON - {"\ufffd"}
        self.leaks += sorted(found - self.recorder.characters)


def answer(stream: Stream) -> Script:
    return Script(lambda asked: (200, EVENTS, stream.pieces))
