"""Read the prompts of the drafts from `prosocial_prompts.toml`.

| stage | asks for | fields |
| --- | --- | --- |
| utterance | the situation in the first person | situation |
| question | the inquisitive speaker's next line | dialogue |
| reason | the problematic speaker's next line | dialogue |
| rule | a rule of thumb | situation |
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from cosmo.engine.base.errors import UserError
from data_pipeline.co3.prompts import Prompts, book, try_stages

DEFAULT = Path(__file__).with_name("prosocial_prompts.toml")
FIELDS = {
    "utterance": ("situation",),
    "question": ("dialogue",),
    "reason": ("dialogue",),
    "rule": ("situation",),
}


def load(path: str | Path | None = None) -> Prompts:
    """Return the prompts of a file, by default those of the package. Raises UserError."""
    file = Path(path or DEFAULT)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        if missing := [name for name in ("sampling", *FIELDS) if name not in table]:
            raise ValueError(f"no [{missing[0]}]. Copy {DEFAULT.name} and change its words.")
        made = book(table, file)
        # Now, because a mistake in a rare prompt would end a run after hours of calls.
        try_stages(made, file, FIELDS, DEFAULT)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}", setting="prompts") from error
    return made


def dialogue(turns: list[str] | tuple[str, ...]) -> str:
    """Return the dialogue so far as lines of A, who speaks first, and Q."""
    return "\n".join(f"{'AQ'[number % 2]}: {turn}" for number, turn in enumerate(turns))
