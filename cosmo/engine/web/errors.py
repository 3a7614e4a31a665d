"""Define the error of an HTTP API, in OpenAI's shape; loads no server library."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from cosmo.engine.base.errors import UserError

EXTRA = "serve"
_MODULES = ("starlette", "uvicorn", "httpx2", "prometheus_client")


class ApiError(Exception):
    """An error that a client gets: an HTTP status and a body as OpenAI's API has it.

    `param` names the field that is wrong, `code` is a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}


def wrong(param: str, problem: str, code: str | None = "invalid_value") -> ApiError:
    """Return the error of status 400 for the field `param` of a request."""
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


def overloaded(message: str, retry_seconds: int = 1) -> ApiError:
    """Return the error of status 429 for a full queue; the client may try again later."""
    retry = {"retry-after": str(retry_seconds)}
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers=retry)


def unavailable(message: str, retry_seconds: int = 5) -> ApiError:
    """Return the error of status 503, for a server that is starting or stopping."""
    retry = {"retry-after": str(retry_seconds)}
    return ApiError(503, message, "server_error", code="unavailable", headers=retry)


def key_from(name: str | None, setting: str) -> str | None:
    """Return the key in an environment variable, None without a name. Raises UserError."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    # A header holds no other characters for every client.
    if not (key and key.isascii() and key.isprintable()):
        # The value is a secret: the error does not show it.
        raise UserError(
            f"the environment variable {name} holds no key: it must be set, to printable ASCII "
            "characters",
            setting=setting,
        )
    return key


def check_extra(verb: str) -> None:
    """Raise UserError that names the extra if a library of servers is missing."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{verb} needs {', '.join(missing)}: pip install 'cosmo-dialogue[{EXTRA}]'")
