"""Take the pictures of the judges' pages in docs/images: light, dark, and on a phone.

    python -m tools.annotation_screenshots --out=docs/images

Serves small studies and opens their pages. Needs the extra `dev` and Chromium, which the operating
system installs.
"""

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Sequence

from playwright.sync_api import Browser, Page, sync_playwright

from cosmo.engine.web import run
from data_pipeline.annotation import pages
from data_pipeline.annotation.serving import routes, tokens
from data_pipeline.annotation.serving.study import Study
from data_pipeline.annotation.task_files import Item, Task
from tools.page_screenshots import launch

TALK = (
    "I told my boss that I was ill, and went to a concert instead.",
    "I understand that you wanted to go. Could you have asked for the day off?",
    "Maybe. But he would have refused, he always does.",
)
RESPONSES = (
    ("Always? That sounds tiring. What happened when you last asked him?",),
    ("You should not lie to your boss. It is wrong.",),
)
RULES = (
    "It is wrong to lie to your boss.",
    "You should ask for a day off in good time.",
    "It is good to talk to your boss about what bothers you.",
)
# Name of the picture -> page, colours, width, height, pixels a point.
PICTURES = {
    "judge-consent": ("responses", "light", 1100, 900, 1),
    "judge-responses": ("responses", "light", 1280, 900, 1),
    "judge-safety": ("safety", "dark", 1280, 900, 1),
    "judge-rots-phone": ("rots", "light", 390, 844, 2),
}


def study_task(name: str) -> Task:
    """Return a small task of a page."""
    page = pages.load(name)
    compares = "options" in page.shows
    items = [
        Item(
            f"item {number}",
            context=TALK,
            options=RESPONSES if compares else (),
            rots=RULES if "rots" in name else (),
        )
        for number in range(20)
    ]
    systems = ("cosmo", "other") if compares else ()
    wage = "about 12 euros an hour, paid at the end of the week"
    return Task(page, tuple(items), systems=systems, wage=wage)


@contextlib.contextmanager
def served(task: Task):
    """Serve a task from a thread; yield the link of its one judge."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(task, pathlib.Path(folder) / "answers.jsonl")
        made = {"ann": tokens.new_token()}
        with contextlib.closing(study), run.background(routes.application(study, made)) as url:
            yield tokens.link(url, made["ann"])


def begin(page: Page, link: str) -> None:
    """Open a judge's link and agree to take part."""
    page.goto(link)
    page.check("[name=consent]")
    page.click("#send")
    page.wait_for_selector("[data-item]")


def _fill(page: Page, name: str) -> None:
    """Show a page half answered."""
    if name == "responses":
        for key in "13":
            page.keyboard.press(key)
            page.keyboard.press("Enter")
    elif name == "safety":
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.keyboard.type("Lying to a boss hurts trust, and it was not needed.")
    else:
        page.fill("[name=response]", "Would it not feel better to go with his blessing? Ask early.")
        page.check("[name=rule][value=previous]")
        first = page.locator("fieldset").first
        first.evaluate("node => scrollTo(0, node.getBoundingClientRect().top + scrollY - 12)")


def take(browser: Browser, folder: pathlib.Path) -> list[pathlib.Path]:
    """Take all PICTURES; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture, (name, colours, width, height, scale) in PICTURES.items():
        with served(study_task(name)) as link:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=colours,
                device_scale_factor=scale,
                has_touch=width < 500,
                is_mobile=width < 500,
                reduced_motion="reduce",
            )
            page = context.new_page()
            if picture.endswith("consent"):
                page.goto(link)
                page.focus("[name=consent]")
            else:
                begin(page, link)
                _fill(page, name)
            files.append(folder / f"{picture}.png")
            page.screenshot(path=files[-1])
            context.close()
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    with sync_playwright() as playwright:
        for file in take(launch(playwright), args.out):
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
