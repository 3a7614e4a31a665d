"""Draw pseudo-random bits for one record, the same in every process and order."""

import hashlib


def fraction_bits(seed: int, what: str, record_id: str) -> int:
    """Return 64 pseudo-random bits that depend on seed, purpose and record alone."""
    # A hash, not a generator: no draw depends on the records before it.
    digest = hashlib.blake2b(f"{seed}/{what}/{record_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
