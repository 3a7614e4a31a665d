"""`python -m cosmo push`: upload a model or a corpus to the HuggingFace hub, with its card."""

import argparse
import pathlib

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

CARD = "README.md"


def run(args: argparse.Namespace) -> None:
    """Upload a folder; of a model without a card, write one first. Print the commit's address."""
    from cosmo.engine.base import hub
    from cosmo.engine.base.atomic import write_atomic

    folder = pathlib.Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder", setting="folder")
    if not (folder / CARD).exists():
        if args.to.startswith(f"{hub.PREFIX}datasets/"):
            raise UserError(f"{folder} has no {CARD}: write a card of the corpus first")
        write_atomic(folder / CARD, model_card(str(folder)))
        print(f"{folder / CARD}: written; complete it, and push again after that")
    print(hub.push(str(folder), args.to, public=args.public))


def model_card(folder: str) -> str:
    """Return a card of the model in `folder`: what its files hold, and blanks for the rest."""
    from cosmo.engine.checkpoints import any_format

    source = any_format.open_source(folder)
    library = "library_name: transformers\n" if source.format == "huggingface" else ""
    return f"""---
language: en
pipeline_tag: text-generation
{library}tags:
- dialogue
---

# {pathlib.Path(folder).resolve().name}

A dialogue model of {source.parameter_count:,} parameters ({type(source.network).__name__}), step
{source.step}, written by cosmo-dialogue.

| | |
| --- | --- |
| training data | to be filled in |
| evaluation | to be filled in |
| license | to be chosen, within the terms of data and starting checkpoint |

The model's answers may be wrong or harmful. People should review them.
"""


VERB = Verb(
    help="upload a model or a corpus, with its card, to the HuggingFace hub",
    description="Upload a folder to the HuggingFace hub: a model (such as export --format=hf "
    "makes) or a corpus (of co3 or prosocial). A repository that does not exist is made, private "
    "unless --public. Of a corpus only records, reports, card and metadata are uploaded, never "
    "its journal or people's answers. A model without README.md gets one.",
    examples="""\
  python -m cosmo push --folder=/tmp/cosmo-hf --to=hf://me/my-cosmo
  python -m cosmo push --folder=/tmp/soda --to=hf://datasets/me/my-soda --public
""",
    run=run,
    flags="""
--folder DIR!  the folder to upload
--to PATH!     hf://OWNER/NAME, or hf://datasets/OWNER/NAME
--public       make a new repository public
""",
)
