"""Read the answers of journals written before they were a SQLite table, so that none is paid twice.

Such a journal is files shard-*.co3j: frames of a header (magic, length, CRC-32) and a compressed
JSON entry.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("data_pipeline")

_MAGIC = b"\x93CO3"
_HEADER = struct.Struct("<4sII")  # magic, length of the entry in bytes, its CRC-32
# Entries were compressed with this dictionary, so every byte of it is part of the format.
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


def shards(folder: Path) -> list[Path]:
    """Return the files of a former journal, in order."""
    return sorted(folder.glob("shard-*.co3j"))


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the fields of each entry that can be read, oldest first. Damage gets a warning."""
    for path in shards(folder):
        data = path.read_bytes()
        place = len(data) if (found := data.find(_MAGIC)) < 0 else found
        damaged = 0
        while place < len(data):
            body = _body(data, place)
            # After a damaged stretch, continue at the next whole frame.
            after = place + 1 if body is None else place + _HEADER.size + len(body)
            found = data.find(_MAGIC, after)
            following = len(data) if found < 0 else found
            if body is not None:
                text = zlib.decompressobj(zdict=_DICTIONARY).decompress(body)
                yield json.loads(text.decode("utf-8", "surrogatepass"))
            damaged += following - (place if body is None else after)
            place = following
        if damaged:
            log.warning("%s: %d bytes are damaged; their answers are asked again", path, damaged)


def _body(data: bytes, place: int) -> bytes | None:
    """Return the compressed entry of the frame at `place`, or None if no whole one is there."""
    # A kill may have cut the last frame.
    if len(data) < place + _HEADER.size:
        return None
    _, length, checksum = _HEADER.unpack_from(data, place)
    # The magic number may occur inside an entry too, so length and checksum decide.
    body = data[place + _HEADER.size : place + _HEADER.size + length]
    return body if len(body) == length and zlib.crc32(body) == checksum else None
