"""Take the pictures of the chat page in docs/images: light, dark, and on a phone.

    python -m tools.page_screenshots --scripted --out=docs/images
    python -m tools.page_screenshots --url=http://127.0.0.1:8000 --out=docs/images

Holds a short dialogue with the server at --url, or with scripted answers. Needs the extra `dev` and
Chromium, which the operating system installs.
"""

import argparse
import contextlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

from cosmo.engine.base.errors import UserError
from tools import page_server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_SANDBOX = "--no-sandbox"  # root has none
ANSWER_MS = 120_000  # a large model on a CPU
BOSS = "I told my boss that I was ill, and went to a concert instead."
ALONE = "Nobody would notice if I was not here any more."
# Name of the picture -> colours, width, height, pixels a point, the guard, the turns.
PICTURES = {
    "page-light": ("light", 1320, 860, 1, "both", (BOSS,)),
    "page-dark": ("dark", 1320, 860, 1, "on", (ALONE,)),
    "page-phone": ("light", 390, 844, 2, "on", (BOSS,)),
}


def chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launch(playwright) -> Browser:
    """Start Chromium without a window. Raises UserError where none is installed."""
    path = chromium()
    if path is None:
        raise UserError(f"no Chromium: none of {', '.join(NAMES)} is installed")
    return playwright.chromium.launch(executable_path=path, args=[NO_SANDBOX])


def say(page: Page, text: str) -> None:
    """Send a turn and wait for the answer and its labels."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_selector("#send", timeout=ANSWER_MS)
    page.wait_for_selector("text=Canary is reading", state="detached", timeout=ANSWER_MS)


def new_page(
    browser: Browser, colours: Literal["light", "dark"], width: int, height: int, scale: float
) -> Page:
    """Return a page of `width` x `height` CSS pixels in a context of its own, without motion."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=colours,
        device_scale_factor=scale,
        reduced_motion="reduce",
    )
    return context.new_page()


def take(browser: Browser, url: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Take all PICTURES of the page at `url`; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (colours, width, height, scale, guard, turns) in PICTURES.items():
        page = new_page(browser, colours, width, height, scale)
        page.goto(url)
        page.wait_for_selector("#guard input:enabled", state="attached")
        page.check(f"#guard input[value={guard}]", force=True)
        for text in turns:
            say(page, text)
        files.append(folder / f"{name}.png")
        page.screenshot(path=files[-1])
        page.context.close()
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--url", help="a running `cosmo serve --canary=...`")
    server.add_argument("--scripted", action="store_true", help="answers that are set")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        script = page_server.Script(seconds_between_words=0.01)
        url = stack.enter_context(page_server.running(script)) if args.scripted else args.url
        browser = launch(stack.enter_context(sync_playwright()))
        for file in take(browser, url, args.out):
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
