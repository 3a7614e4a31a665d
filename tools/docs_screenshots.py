"""Take pictures of README.md and of pages of the website, in light colours, dark, and on a phone.

    make docs
    python -m tools.docs_screenshots --out=runs/screenshots

Needs the extra `dev` and Chromium, which the operating system installs. README.md is drawn by
markdown-it with GitHub's rules for tables, not by GitHub itself.
"""

import argparse
import pathlib
import tempfile

from markdown_it import MarkdownIt
from playwright.sync_api import Browser, sync_playwright

from cosmo.engine.base.errors import UserError
from tools.page_screenshots import launch, new_page

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("index", "guard", "notebooks/quickstart")
# Name -> colours, width, height, pixels a point.
SCREENS = {
    "light": ("light", 1280, 1600, 1),
    "dark": ("dark", 1280, 1600, 1),
    "phone": ("light", 390, 844, 2),
}
STYLE = """\
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 0 auto; padding: 16px }
img { max-width: 100% }
pre { overflow-x: auto; padding: 12px; background: light-dark(#f6f8fa, #161b22) }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #8888; padding: 4px 10px }
"""


def readme_page() -> str:
    """Return README.md as a page whose pictures are those of the repository."""
    body = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(
        (ROOT / "README.md").read_text()
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f'<!doctype html>{head}<base href="{ROOT.as_uri()}/"><style>{STYLE}</style>{body}'


def take(browser: Browser, pages: dict[str, str], folder: pathlib.Path) -> list[pathlib.Path]:
    """Take the first screen of each page {name: address}, on each of SCREENS; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for screen, (colours, width, height, scale) in SCREENS.items():
        page = new_page(browser, colours, width, height, scale)
        for name, address in pages.items():
            page.goto(address)
            files.append(folder / f"{name}-{screen}.png")
            page.screenshot(path=files[-1])
        page.context.close()
    return files


def main() -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=pathlib.Path, default=ROOT / "site", help="of `make docs`")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the pictures")
    args = parser.parse_args()
    if not (args.site / "index.html").is_file():
        raise UserError(f"{args.site} is not a website: run `make docs` first", setting="site")
    pages = {
        name.replace("/", "-"): (args.site.resolve() / f"{name}.html").as_uri() for name in PAGES
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        readme = pathlib.Path(folder) / "readme.html"
        readme.write_text(readme_page())
        for file in take(launch(playwright), {"readme": readme.as_uri(), **pages}, args.out):
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
