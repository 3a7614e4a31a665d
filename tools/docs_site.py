"""Hooks of mkdocs: pages made from code and notebooks, links into the repository, no other host.

mkdocs.yml names this file. It runs in the environment of `make docs`, which has no JAX.
"""

import base64
import json
import os
import pathlib
import posixpath
import re
import subprocess

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages of the repository's root that the website shows too.
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "WORKSPACE.md")
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")
# Addresses that a page would load as it opens; links that a reader may follow are none.
_ADDRESS = r"""=["']?(?:https?:)?//[^"'> ]+"""
_FOREIGN = re.compile(
    rf"<(?:script|img|iframe|source)[^>]*\ssrc{_ADDRESS}"
    rf"""|<link[^>]*rel=["']?(?:stylesheet|preconnect|preload|icon)[^>]*href{_ADDRESS}"""
)


def on_files(files, config):
    """Add the generated pages, the project's pages, and the source files that pages link to."""
    python = os.environ.get("PROJECT_PYTHON", ".venv/bin/python")
    command = [python, "-m", "tools.docs_reference"]
    made = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for name, text in json.loads(made.stdout).items():
        files.append(File.generated(config, name, content=text))
    for name in PROJECT:
        text = (ROOT / name).read_text()
        files.append(File.generated(config, f"project/{name}", content=text))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page, images = notebook_page(path.stem, json.loads(path.read_text()))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, image in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=image))
    for page in list(files.documentation_pages()):
        for _, target, _ in _LINK.findall(page.content_string):
            _add_source(files, config, _in_repository(page.src_uri, target))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links that leave docs/: to the page or the copy of the file on the website."""
    here = page.file.src_uri

    def rewritten(link: re.Match) -> str:
        place = _on_site(_in_repository(here, link[2]))
        if place is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(place, posixpath.dirname(here))}{link[3] or ''})"

    return _LINK.sub(rewritten, markdown)


def on_post_build(config):
    """Refuse a page that would load something from another host."""
    for path in sorted(pathlib.Path(config.site_dir).rglob("*.html")):
        foreign = _FOREIGN.search(path.read_text())
        if foreign:
            raise PluginError(f"{path} loads from another host: {foreign[0]}")


def notebook_page(name: str, notebook: dict) -> tuple[str, dict[str, bytes]]:
    """Return (Markdown, {file name: image}) of a notebook.

    An image's alternative text is the cell's metadata "alt".
    """
    # Not mkdocs-jupyter: its pages load scripts from other hosts.
    parts, images = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced("python", source))
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(_fenced("text", "".join(output["text"])))
            elif "image/png" in output["data"]:
                file = f"{name}-{len(images) + 1}.png"
                images[file] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![{cell['metadata']['alt']}]({file})")
            else:
                parts.append(_fenced("text", "".join(output["data"]["text/plain"])))
    # HTML, because links to a notebook are rewritten to its page.
    parts.append(f'<a href="{name}.ipynb" download>Download the notebook</a>')
    return "\n\n".join([*parts, ""]), images


def _fenced(language: str, text: str) -> str:
    """Return a code block; its fence is longer than any in the text."""
    return f"````{language}\n{text.rstrip()}\n````"


def _in_repository(page: str, target: str) -> str | None:
    """Return the path from the repository's root that a page's link means, None for an address."""
    if ":" in target:
        return None
    root = page.startswith("project/")  # this page stands at the root, all others in docs/
    folder = "" if root else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, target))


def _on_site(path: str | None) -> str | None:
    """Return where the website has a file of the repository; None: mkdocs knows or refuses it."""
    if path is None:
        return None
    if path.startswith("docs/"):
        place = path.removeprefix("docs/")
        # The website shows a notebook as a page.
        return re.sub(r"\.ipynb$", ".md", place)
    if path in PROJECT:
        return f"project/{path}"
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.txt" if (ROOT / path).exists() else None


def _add_source(files, config, path: str | None) -> None:
    """Add the file or folder of the repository at `path`, if a page outside of docs/ is meant."""
    place = _on_site(path)
    if place is None or not place.startswith("source/") or place in files.src_uris:
        return
    if (ROOT / path).is_dir():
        below = sorted(p.name for p in (ROOT / path).iterdir() if p.is_file())
        for name in below:
            _add_source(files, config, f"{path}/{name}")
        text = "\n".join([f"# {path}", "", *(f"- [{name}]({name}.txt)" for name in below)])
        files.append(File.generated(config, place, content=text))
    else:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
