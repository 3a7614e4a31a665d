"""The command line: `python -m cosmo VERB --gin_file=FILE --gin.NAME=VALUE`."""

import os
import sys

from cosmo.engine.base import terminal
from cosmo.engine.base.errors import UserError
from cosmo.tasks.errors import DataError


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    return terminal.guarded(lambda: _run(arguments), (UserError, DataError))


def _run(argv: list[str]) -> int | None:
    from cosmo import verbs
    from cosmo.engine.base import config

    rest, bindings = config.split_arguments(argv)
    args = verbs.parse(rest)
    args.command_line = argv
    verb = verbs.VERBS[args.verb]
    terminal.set_up_logging(args.quiet)
    if bindings and verb.gin_file is None:
        raise UserError(f"{args.verb} takes no gin settings: leave out --gin.{bindings[0]}")
    if verb.environment is not None:
        os.environ.update(terminal.function(verb.environment)(args))
    terminal.set_up_jax(args.distributed)
    if verb.gin_file is not None and verb.takes_settings(args):
        bindings = [*verb.bindings, *bindings, *verbs.macros(args)]
        search_paths = [path for path in args.gin_search_paths.split(",") if path]
        gin_files = args.gin_file or _saved_settings(args.verb, verb.saved_settings, bindings)
        config.load(verb.gin_file, gin_files, bindings, search_paths)
    return terminal.function(verb.run)(args)


def _saved_settings(verb: str, saved: bool, bindings: list[str]) -> list[str]:
    """MODEL_DIR/config.gin, for a verb that was given no gin file."""
    from etils import epath

    from cosmo.engine.base import config
    from cosmo.engine.checkpoints import run_checkpoints

    if not saved:
        raise UserError(f"{verb} needs --gin_file, such as --gin_file=gin/cosmo/tiny.gin")
    values = dict(binding.split(" = ", 1) for binding in bindings)
    if "MODEL_DIR" not in values:
        raise UserError(f"{verb} needs --gin_file=FILE, or --gin.MODEL_DIR=DIR of a trained run")
    path = epath.Path(values["MODEL_DIR"].strip("'\"")) / "config.gin"
    if not path.exists():
        raise UserError(f"no {path}: give the run's --gin_file, or a MODEL_DIR that train has left")
    vocabulary = config.saved_macros(path).get("VOCABULARY_PATH")
    kept = path.parent / run_checkpoints.VOCABULARY
    gone = vocabulary and not epath.Path(vocabulary).exists()
    if gone and kept.exists() and "VOCABULARY_PATH" not in values:
        bindings.append(f"VOCABULARY_PATH = {str(kept)!r}")  # the run's own copy
    return [str(path)]


if __name__ == "__main__":
    converts = sys.argv[1:2] in (["import"], ["export"])
    terminal.tune_memory(terminal.SMALL_HEAP if converts else terminal.HUGE_PAGES)
    sys.exit(main())
