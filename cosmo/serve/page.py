"""Serve the page at `/`: page.html with a policy that admits its own script and styles alone."""

import base64
import hashlib
import pathlib
import re

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from cosmo.engine.web import page_headers

HTML = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """Return the hash of the one inline element `tag` of the page, as a policy names it."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


POLICY = page_headers.policy(_hash("script"), _hash("style"), ["connect-src 'self'"])
HEADERS = {
    **page_headers.ALWAYS,
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the server has a new page
}


async def page(request: Request) -> Response:
    """Return the page. It holds no secret, so that it needs no API key."""
    return HTMLResponse(HTML, headers=HEADERS)
