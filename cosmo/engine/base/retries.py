"""Decide whether, and after how long, a request to a server is sent again."""

import dataclasses
import email.utils
import random
import time
from typing import Any

RETRYABLE_STATUS = (408, 409, 425, 429)  # the 4xx that another try may pass


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Retry policy: exponential backoff with full jitter."""

    tries: int = 8
    first_seconds: float = 0.5
    max_seconds: float = 30.0

    def wait(self, tried: int, random_source: random.Random) -> float:
        """Return the seconds to wait after `tried` tries."""
        longest = min(self.max_seconds, self.first_seconds * 2 ** (tried - 1))
        return random_source.uniform(0, longest)


def is_retryable(status: int) -> bool:
    """Return whether another try may pass after an answer of this status."""
    return status in RETRYABLE_STATUS or status >= 500


def retry_after(headers: Any, now: float | None = None) -> float | None:
    """Return the seconds to wait by `retry-after-ms` or `Retry-After` (RFC 9110, 10.2.3)."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        given = headers.get("retry-after")
        if not given:
            return None
        try:
            return max(0.0, float(given))
        except ValueError:
            then = email.utils.parsedate_to_datetime(given).timestamp()
            return max(0.0, then - (time.time() if now is None else now))
    except (ValueError, TypeError, OverflowError):
        return None
