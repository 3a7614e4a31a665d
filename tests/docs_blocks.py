"""Read the code blocks of README.md, CONTRIBUTING.md and docs/, with the marks before them.

A mark is an HTML comment on the line before a block of sh, console or python:

  <!-- run -->                     tests/test_docs.py runs it
  <!-- run: with run, canary -->   the same, with these models at /tmp/run and /tmp/canary
  <!-- not run: REASON -->

A `console` block has commands after `$ ` and their output, which is compared; `...` in it stands
for anything. The blocks of one page run in order, in one folder and one Python namespace.
"""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[1]
LANGUAGES = ("sh", "console", "python", "text", "json", "bibtex", "toml")
RUNNABLE = ("sh", "console", "python")
_FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"run(?:: with (?P<models>[\w, ]+))?|not run: (?P<reason>.+)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block: its page and line, its language, its text, the mark before it."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return self.mark.startswith("run")

    @property
    def models(self) -> list[str]:
        """The names of the models that it needs below /tmp."""
        found = _MARK.fullmatch(self.mark)
        return re.split(r",\s*", found["models"]) if found and found["models"] else []

    @property
    def is_marked(self) -> bool:
        """Whether its mark has one of the forms above."""
        return bool(_MARK.fullmatch(self.mark))

    def commands(self) -> list[tuple[str, str]]:
        """Return [(command, its output)] of a block of sh (output "") or console."""
        if self.language == "sh":
            return [(self.text, "")]
        parts = re.split(r"^\$ ", self.text.replace("\\\n", ""), flags=re.MULTILINE)[1:]
        return [tuple(part.partition("\n")[::2]) for part in parts]


def pages() -> list[pathlib.Path]:
    """Return the Markdown files whose blocks are tested."""
    own = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*own, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[Block]:
    """Return all code blocks, page by page."""
    found = []
    for path in pages():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        for fence in _FENCE.finditer(text):
            line = text[: fence.start(2)].count("\n") + 1
            found.append(Block(name, line, fence[2], fence[3], fence[1] or ""))
    return found


def python_commands(text: str) -> list[list[str]]:
    """Return the words of each `python -m` command in shell text."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quoted text of several lines
            continue
        while words:
            # A command ends where the shell would begin another one.
            end = next((n for n, word in enumerate(words) if word in ("&", "&&", "|", ";")), None)
            command, words = words[:end], words[end + 1 :] if end is not None else []
            while command and re.match(r"\w+=", command[0]):  # a variable before the command
                command = command[1:]
            if command[:2] == ["python", "-m"]:
                found.append([word for word in command[2:] if word != "..."])
    return found


def inline_commands(page: pathlib.Path) -> list[list[str]]:
    """Return the words of each whole `python -m` command within a page's sentences."""
    prose = _FENCE.sub("", page.read_text())
    return [
        words
        for code in re.findall(r"`(python -m [^`]+)`", prose)
        for words in python_commands(code)
    ]
