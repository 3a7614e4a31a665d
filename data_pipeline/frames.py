"""What a shard of the journal is made of: a first line, then frames, each of one entry.

A frame is a header (magic, length, CRC-32) and a zlib-compressed JSON entry. A damaged stretch is
found by its checksum, and the next whole frame behind it by its magic.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIRST = b"CO3 journal 1\n"
_MAGIC = b"\x93CO3"
HEADER = struct.Struct("<4sII")  # magic, length of what follows, its CRC-32
LONGEST = 1 << 28  # no frame is longer: what claims to be is damage
# What most answers have in common, so that one alone compresses well. It is part of the format.
_DICTIONARY = (
    b'"completion_tokens_details": null, "prompt_tokens_details": null, "system_fingerprint": null,'
    b'"top_logprobs": [{" Yes": -0., " No": -, " Unknown": -, "\\n": -, " I": - "token_logprobs": '
    b'"logprobs": {"tokens": [" Yes"], "text_offset": [ "content": [{"token": "Yes", "logprob": -0.'
    b'"moderation", "results": [{"flagged": false, "category_scores": {"hate": 0.0, "violence": 0.0'
    b', "sexual": 0.0, "harassment": 0.0, "self-harm": 0.0 {"key": "", "id": "", "stage": "head", '
    b'"relation_tail", "narrative", "speaker", "dialogue", "attempt": 0, "kind": "answer", '
    b'"failure", "reason": "", "prompt_tokens": 1, "completion_tokens": 2, "raw": "{\\"id\\": '
    b'\\"cmpl-\\", \\"object\\": \\"text_completion\\", \\"chat.completion\\", \\"created\\": 17, '
    b'\\"model\\": \\"\\", \\"choices\\": [{\\"index\\": 0, \\"text\\": \\" \\", \\"message\\": '
    b'{\\"role\\": \\"assistant\\", \\"content\\": \\"\\"}, \\"logprobs\\": null, '
    b'\\"finish_reason\\": \\"stop\\"}], \\"usage\\": {\\"prompt_tokens\\": 1, '
    b'\\"completion_tokens\\": 1, \\"total_tokens\\": 1}}"}'
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One answer, or one failure to get one (`kind`), as the server gave it (`raw`).

    Of a failure `reason` says what was wrong; it is kept for people and never taken as an answer.
    Its tokens are the most that it may have been billed for.
    """

    key: str
    id: str
    stage: str
    attempt: int
    kind: str
    raw: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


def pack(entry: Entry) -> bytes:
    """An entry as a frame."""
    text = json.dumps(vars(entry), ensure_ascii=False).encode("utf-8", "surrogatepass")
    squeeze = zlib.compressobj(4, zdict=_DICTIONARY)
    body = squeeze.compress(text) + squeeze.flush()
    return HEADER.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def unpack(body: bytes) -> Entry:
    """The entry of a frame's body (without header), which the checksum has shown to be whole."""
    text = zlib.decompressobj(zdict=_DICTIONARY).decompress(body)
    return Entry(**json.loads(text.decode("utf-8", "surrogatepass")))


def frame_at(data: bytes, place: int) -> bytes | None:
    """The body of the frame at `place`, or None if there is no whole one."""
    if len(data) < place + HEADER.size:
        return None
    magic, length, checksum = HEADER.unpack_from(data, place)
    if magic != _MAGIC or length > LONGEST:
        return None
    body = data[place + HEADER.size : place + HEADER.size + length]
    return body if len(body) == length and zlib.crc32(body) == checksum else None


def scan(path: Path, start: int = 0) -> Iterator[tuple[int, int, Entry | None]]:
    """The frames of a shard from `start` on: (begin, end, entry), entry None where it is damaged.

    A damaged stretch at the end of the file is its torn tail.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if start < len(FIRST):
            start = len(FIRST)
            if file.read(len(FIRST)) != FIRST:
                start = _next_frame(file, 0, size)
                yield 0, start, None
        while start < size:
            file.seek(start)
            header = file.read(HEADER.size)
            body = None
            if len(header) == HEADER.size:
                magic, length, checksum = HEADER.unpack(header)
                if magic == _MAGIC and length <= size - start - HEADER.size:
                    body = file.read(length)
                    body = body if zlib.crc32(body) == checksum else None
            end = start + HEADER.size + len(body) if body else _next_frame(file, start + 1, size)
            yield start, end, unpack(body) if body else None
            start = end


def _next_frame(file: Any, start: int, size: int) -> int:
    """Where the next whole frame begins, or the end of the file."""
    step = 1 << 20
    while start < size:
        file.seek(start)
        block = file.read(step + len(_MAGIC) - 1)
        found = block.find(_MAGIC)
        if found < 0:
            start += step
            continue
        start += found
        file.seek(start)
        header = file.read(HEADER.size)
        if len(header) == HEADER.size:
            _, length, _ = HEADER.unpack(header)
            if length <= size - start and frame_at(header + file.read(length), 0) is not None:
                return start
        start += 1
    return size
