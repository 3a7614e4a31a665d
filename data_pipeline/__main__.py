"""The command line: `python -m data_pipeline VERB --help`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys

from data_pipeline.errors import UserError

VERBS = {
    "co3": "triples to SODA: ask a language model, filter, write records",
    "postprocess": "filters, names and statistics alone, in many processes or by Apache Beam",
    "merge": "the outputs of several --shard=i/n into one",
    "teacher": "a local server that answers CO3's prompts, for trying things out",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    verbs = "\n".join(f"  {name:<12} {text}" for name, text in VERBS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{__doc__}\n\n{verbs}\n\nA first run, without a bill:\n"
            "  python -m data_pipeline teacher --port=8765 &\n"
            "  python -m data_pipeline co3 --triples=triples.jsonl --output=/tmp/soda \\\n"
            "    --base_url=http://127.0.0.1:8765/v1 --model=teacher --limit=100"
        )
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"error: no verb {argv[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"data_pipeline.commands.{argv[0]}").main(argv[1:]) or 0
    except UserError as error:
        if os.environ.get("COSMO_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a disk that is full, a folder that is not ours
        if os.environ.get("COSMO_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser(verb: str, about: str) -> argparse.ArgumentParser:
    """The parser of a verb, whose help begins with `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m data_pipeline {verb}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    sys.exit(main())
