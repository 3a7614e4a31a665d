"""Make texts of SBIC, the Social Bias Inference Corpus (Sap et al. 2020): is a post offensive?

Baheti et al. 2021 train their classifier of offence on ToxiChat and SBIC. The corpus comes as
`SBIC.v2.trn.csv`, `.dev.csv` and `.tst.csv`: a row for each annotator and stereotype of a post.
The files `SBIC.v2.agg.*.csv` have a row for each post.

Choices of ours: a post is offensive where the mean of its annotators is 0.5 or more (1 offensive,
0.5 maybe, 0 not). URLs and @names are taken out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from cosmo.engine.base.errors import shown
from cosmo.tasks.files import TABLES, files_for_split, split_file, split_names
from cosmo.tasks.formatting import Example
from cosmo.tasks.recognize import naming_other_corpus
from cosmo.tasks.record_files import read_table, refuse_empty
from cosmo.tasks.toxichat import OFFENSIVE, SAFE

_FILES = {"train": "trn", "validation": "dev", "test": "tst"}
_URL = re.compile(r"(?:https?://|www\.)\S+|\b\w+\.(?:com|org|net)/\S+", re.IGNORECASE)
_NAME = re.compile(r"(?<!\w)(?:RT\s+)?@\w+:?|(?<!\w)(?:USER|\[USER\]|\[URL\])(?!\w)")


def cleaned(post: str) -> str:
    """Return a post as text: entities resolved, URLs, @names and outer quotes taken out."""
    # Twice, because posts hold `&amp;#8220;` too.
    text = html.unescape(html.unescape(post))
    return " ".join(_NAME.sub(" ", _URL.sub(" ", text)).split()).strip('" ')


def sbic_files(path: Any, split: str) -> list[Any]:
    """Return the files of a split by SBIC's own names, or as `files_for_split` finds them."""
    name = _FILES.get(split_names(split)[0], split)
    own = split_file(path, split, (f"SBIC.v2.{name}", f"SBIC.v2.agg.{name}"), TABLES)
    return own or files_for_split(path, split, TABLES)


def offense_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield each post and "offensive" or "safe", in the order of first rows.

    Posts without an answer about offence, and those of only a URL, are left out. Ids are
    `sbic-SPLIT-N`. Raises DataError for a missing path or column, and for a value that is none.
    """
    votes: dict[str, dict[str, float]] = {}
    for file in sbic_files(path, split):
        with naming_other_corpus(file, "SBIC"):
            for place, row in read_table(file, ",", ("post", "offensiveYN")):
                value = row["offensiveYN"].strip()
                if not value:
                    continue
                try:
                    number = float(value)
                except ValueError:
                    number = -1.0
                if not 0 <= number <= 1:
                    raise place.error("column 'offensiveYN'", shown(value), "0 to 1, or nothing")
                # An annotator has a row for each stereotype, and counts once.
                votes.setdefault(row["post"], {})[row.get("WorkerId", "")] = number
    count = 0
    for post, numbers in votes.items():
        text = cleaned(post)
        if any(map(str.isalnum, text)):
            offensive = sum(numbers.values()) / len(numbers) >= 0.5
            word = OFFENSIVE if offensive else SAFE
            yield Example(f"sbic-{split}-{count}", "", "", (text,), word)
            count += 1
    refuse_empty(path, split, count)
