"""Plain English in docstrings and comments: a word list, and limits that may only go down.

The rule: verb, object, result; the field's word; at most 25 words a sentence. The limits are what
older files still hold. Lower them with every file that you rewrite; never raise them.
"""

import ast
import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("cosmo", "canary", "tasks", "data_pipeline", "tools")
# Metaphors for what has a word of its own: "return", "raise", "log", "continue", "lies in".
METAPHORS = re.compile(
    r"\b(told|tells?|says?|said|saying|hears?|heard|lives?|lived|whoever|goes on|go on|gone on)\b",
    re.IGNORECASE,
)
# A sentence that begins so names no actor and no verb.
RIDDLES = re.compile(r"(What|Of|Whoever|That|To be|From here|By which)\b")
# Sentences end with a mark or a paragraph; a row of a table or a list stands for itself.
ENDS = re.compile(r"(?<=[.!?])\s+|\n\n|\n(?=[ ]*(?:\||- |[^\n]*\S[ ]{3,}\S))")
MAX_WORDS = 25
MAX_METAPHORS, MAX_RIDDLES, MAX_LONG = 0, 1, 6


def texts(path: pathlib.Path):
    """Yield (line, text) of every docstring and comment of a file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def sentences():
    """Yield ("file:line", sentence) of all product code."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT)
            if name.parts[:2] == ("cosmo", "tasks"):  # a link to tasks
                continue
            for line, text in texts(path):
                for sentence in ENDS.split(text):
                    yield f"{name}:{line}", sentence.strip()


def test_metaphors_riddles_and_long_sentences_become_fewer():
    """Oracle: the word list, and the numbers that older files still hold."""
    found = list(sentences())
    metaphors = [f"{where} {m}" for where, s in found for m in METAPHORS.findall(s)]
    riddles = [f"{where} {s[:40]}" for where, s in found if RIDDLES.match(s)]
    long = [f"{where} {s[:40]}" for where, s in found if len(s.split()) > MAX_WORDS]
    assert len(metaphors) <= MAX_METAPHORS, metaphors
    assert len(riddles) <= MAX_RIDDLES, riddles
    assert len(long) <= MAX_LONG, long
