"""Ask a language model for keywords of SODA's narratives: `python -m tools.keywords`.

Table 3 of Kim et al. 2023: ChatGPT gave the keywords there (footnote 10). For each relation --items
narratives are drawn by seed. A model behind OpenAI's API names up to five keywords of each. The
table has the most frequent ones of each relation, beside the paper's. It writes to --output:
  keywords.jsonl   {id, relation, keywords}
  keywords.json    {relation: {narratives, keywords}}, counts of each keyword
  calls/           the journal: the same command resumes, and pays for no answer twice

Choices of ours, which the paper leaves open: the prompt, five keywords a narrative, temperature 0,
and a keyword counts once for each narrative.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import command_line, durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.base.tables import text_table
from cosmo.tasks.files import files_for_split
from cosmo.tasks.paper_tables import SODA
from cosmo.tasks.record_files import read_records
from data_pipeline.annotation import pairs
from data_pipeline.annotation.ask import ask_all
from data_pipeline.calls import flags
from data_pipeline.calls.requests import Rejected, Request, Sampling, Stage

log = logging.getLogger("data_pipeline")

MAX_KEYWORDS = 5  # of a narrative
MAX_WORDS = 3  # of a keyword: more are a sentence
SHOWN = 10  # keywords of a relation in the table, as in the paper's
SAMPLING = Sampling(max_tokens=60, temperature=0.0, frequency_penalty=0.0, presence_penalty=0.0)
PROMPT = (
    "Name up to five keywords for the topics and feelings of this text. Write them on one line, in "
    "lower case, with commas between them, and write nothing else.\n\nText: {narrative}\nKeywords:"
)
_COLUMNS = ("relation", "narrative")
_EDGES = " \t.;:!*-\"'`[]()"


def narratives(path: Any, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield (id, relation, narrative) of SODA's rows. Raises DataError for a row without them."""
    number = 0
    for file in files_for_split(path, split):
        for place, row in read_records(file, _COLUMNS):
            for field in _COLUMNS:
                value = row.get(field) if isinstance(row, Mapping) else None
                if not isinstance(value, str) or not value.strip():
                    problem = f"field {field!r} is no text"
                    raise place.error(problem, shown(value), "a row of SODA as published")
            yield f"soda-{split}-{number}", row["relation"], " ".join(row["narrative"].split())
            number += 1


def drawn(
    found: Iterator[tuple[str, str, str]], count: int, seed: int
) -> dict[str, tuple[str, str]]:
    """Return {id: (relation, narrative)} of at most `count` rows of each relation, by seed."""
    by_relation: dict[str, dict[str, str]] = {}
    for name, relation, text in found:
        by_relation.setdefault(relation, {})[name] = text
    return {
        name: (relation, texts[name])
        for relation, texts in sorted(by_relation.items())
        for name in pairs.sample(texts, min(count, len(texts)), seed)
    }


def parsed(answer: str) -> list[str]:
    """Return the keywords of an answer: at most MAX_KEYWORDS different ones, in lower case."""
    first = answer.strip().removeprefix("Keywords:")
    made = []
    for part in re.split(r"[,\n]", first):
        word = re.sub(r"^\d+[.)]", "", part.strip(_EDGES)).strip(_EDGES).lower()
        if word and len(word.split()) <= MAX_WORDS:
            made.append(word)
    return list(dict.fromkeys(made))[:MAX_KEYWORDS]


def stage(name: str, narrative: str) -> Stage:
    """Return the keywords of a narrative, or Rejected for an answer without any."""
    text = PROMPT.format(narrative=narrative)
    response = yield Request(
        record_id=name,
        stage="keywords",
        attempt=0,
        prompt=text,
        messages=(("user", text),),
        sampling=SAMPLING,
    )
    found = parsed(response.text)
    if response.fault or not found:
        return Rejected(name, "keywords", response.fault or "no keywords", {})
    return found


def counted(
    asked: Mapping[str, tuple[str, str]], found: Mapping[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Return {relation: {narratives, keywords: {keyword: narratives that have it}}}."""
    made: dict[str, dict[str, Any]] = {}
    for name, words in found.items():
        one = made.setdefault(asked[name][0], {"narratives": 0, "keywords": Counter()})
        one["narratives"] += 1
        one["keywords"].update(words)
    for one in made.values():
        # Equal counts go by alphabet, so that the order of answers changes nothing.
        ordered = sorted(one["keywords"].items(), key=lambda pair: (-pair[1], pair[0]))
        one["keywords"] = dict(ordered)
    return dict(sorted(made.items()))


def table(made: Mapping[str, Mapping[str, Any]]) -> str:
    """Return table 3's keywords, ours and the paper's."""
    rows = [["", "narratives", "keywords"]]
    for relation, one in made.items():
        words = ", ".join(list(one["keywords"])[:SHOWN])
        rows.append([relation, f"{one['narratives']:,}", words])
        if relation in SODA["relations"]:
            rows.append(["  paper", "-", SODA["relations"][relation][1]])
    return text_table(rows, left=(0, 2)) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Ask the model, print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.keywords",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_flags(
        parser,
        """
what is read:
--input PATH!  SODA, or soda.jsonl of `data_pipeline co3`
--split NAME=train  of a folder
--output FOLDER!  where the files go
--items N=200  narratives of each relation, at most
--seed N=0  of the sample
--quiet  print no table
""",
    )
    flags.add_server(parser.add_argument_group("server"))
    flags.add_limits(parser.add_argument_group("limits"))
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    return command_line.guarded(
        lambda: run(args), lambda name: f"--{name}" if hasattr(args, name) else None
    )


def run(args: argparse.Namespace) -> int:
    """Ask the model, write the files; return the exit code."""
    flags.check(args, least={"items": 1})
    chosen = drawn(narratives(args.input, args.split), args.items, args.seed)
    folder = Path(args.output)
    durable.make_folder(folder)
    stages = {name: functools.partial(stage, name, text) for name, (_, text) in chosen.items()}
    asked = ask_all(
        stages, flags.server(args), flags.allowance(args), folder / "calls", args.form, args.tries
    )
    if asked.stopped:
        return asked.exit_code
    for name, one in asked.rejected.items():
        log.warning("no keywords of %s: %s", name, one.reason)
    if not asked.results:
        raise UserError(f"the model named no keywords of any of {len(chosen):,} narratives")
    found = {name: asked.results[name] for name in chosen if name in asked.results}
    lines = [
        {"id": name, "relation": chosen[name][0], "keywords": words}
        for name, words in found.items()
    ]
    made = counted(chosen, found)
    write_atomic(folder / "keywords.jsonl", json_lines.lines(lines))
    write_atomic(folder / "keywords.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    if not args.quiet:
        print(table(made), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
