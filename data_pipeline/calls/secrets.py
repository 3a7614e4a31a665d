"""Hide credentials in all output: in addresses, and in the fields added to requests."""

from __future__ import annotations

import json
import re
import urllib.parse
from typing import Any

HIDDEN = "***"
# "tokens" and "token_ids" are amounts and ids where they are no text: max_tokens, stop_token_ids.
_SECRET = re.compile(r"key|secret|passw|credential|authorization|token", re.IGNORECASE)
_COUNTS = re.compile(r"token(?:s|_id|_count|izer)", re.IGNORECASE)
# Parameters of an address that hold no secret.
_SHOWN = frozenset(("api-version", "api_version", "version", "v", "model", "deployment", "region"))
_USER = re.compile(r"^((?:[a-z][a-z0-9+.-]*:)?//)?[^/?#]*@", re.IGNORECASE)


def address(url: str) -> str:
    """Return the URL without user, password, fragment, and the values of its parameters.

    Values of parameters that are known to be no secret are shown.
    """
    url = _USER.sub(lambda match: f"{match[1] or ''}{HIDDEN}@", url)
    url, mark, fragment = url.partition("#")
    # A list of secret names would never be whole: sig, X-Amz-Signature, code, auth, sv, ...
    start, query_mark, query = url.partition("?")
    pairs = (pair.partition("=") for pair in re.split("([&;])", query))
    shown = (
        # Without a name it is a value: "?abc".
        name + equals + (HIDDEN if value and not _is_shown(name) else value)
        if equals or name in ("", "&", ";")
        else HIDDEN
        for name, equals, value in pairs
    )
    return start + query_mark + "".join(shown) + (mark + HIDDEN if fragment else mark)


def _is_shown(name: str) -> bool:
    return urllib.parse.unquote_plus(name).strip().lower() in _SHOWN


def body(text: str) -> str:
    """Return a JSON object with the values of secret fields hidden, at any depth."""
    fields = json.loads(text)
    hidden = _hide(fields)
    return text if hidden == fields else json.dumps(hidden, ensure_ascii=False)


def _hide(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: HIDDEN if _secret(name, v) else _hide(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_hide(item) for item in value]
    return value


def _secret(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or not _SECRET.search(name):
        return False
    return _SECRET.search(_COUNTS.sub("", name)) is not None or _has_text(value)


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_has_text, value)) if isinstance(value, list) else isinstance(value, str)
