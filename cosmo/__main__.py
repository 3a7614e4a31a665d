"""The command line: `python -m cosmo VERB --gin_file=FILE --gin.NAME=VALUE`."""

import argparse
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

HUGE_PAGES = "glibc.malloc.hugetlb=1"
SMALL_HEAP = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.arena_max=2"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    return guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def guarded(run: Callable[[], int | None]) -> int:
    """Call `run`; the exit code, 0 if it gives none.

    Of several processes one that fails ends here and now.
    """
    from cosmo.engine.errors import UserError
    from tasks.errors import DataError

    try:
        return run() or 0
    except (UserError, DataError) as error:
        if os.environ.get("COSMO_TRACEBACK"):
            raise
        _wait_for_stderr()
        # Gin appends where the call stood, which is of no use to whoever mends a setting.
        text = str(error).split("\n  In call to configurable")[0]
        print(f"error: {text}", file=sys.stderr)
        return _leave(1)
    except ImportError as error:
        # Ctrl-C while a library loads: its C++ side makes another error of it.
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        print("interrupted", file=sys.stderr)
        return _leave(130)
    except KeyboardInterrupt as stop:
        _wait_for_stderr()
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return _leave(130)
    finally:
        _wait_for_stderr()


def _leave(code: int) -> int:
    """The exit code; but of several processes this one does not wait for the others, which JAX
    would at exit, for minutes: when it is gone they end too."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _wait_for_stderr() -> None:
    """Wait until nobody keeps stderr from being seen (see cosmo.engine.seqio_bridge)."""
    bridge = sys.modules.get("cosmo.engine.seqio_bridge")
    if bridge is not None:
        with bridge.STDERR_HELD:
            pass


def _run(argv: list[str]) -> int | None:
    from cosmo import verbs
    from cosmo.engine import config
    from cosmo.engine.errors import UserError

    rest, bindings = config.split_arguments(argv)
    args = verbs.parse(rest)
    args.command_line = argv
    verb = verbs.VERBS[args.verb]
    _set_up_logging(args.quiet)
    if bindings and verb.gin_file is None:
        raise UserError(f"{args.verb} takes no gin settings: leave out --gin.{bindings[0]}")
    if verb.environment is not None:
        os.environ.update(_function(verb.environment)(args))
    _set_up_jax(args.distributed)
    if verb.gin_file is not None and verb.takes_settings(args):
        bindings = [*verb.bindings, *bindings, *verbs.macros(args)]
        search_paths = [path for path in args.gin_search_paths.split(",") if path]
        gin_files = args.gin_file or _saved_settings(args.verb, verb.saved_settings, bindings)
        config.load(verb.gin_file, gin_files, bindings, search_paths)
    return _function(verb.run)(args)


def _function(place: str) -> Callable[[argparse.Namespace], Any]:
    """The function at "module:name", imported."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _saved_settings(verb: str, saved: bool, bindings: list[str]) -> list[str]:
    """MODEL_DIR/config.gin, for a verb that was given no gin file."""
    from etils import epath

    from cosmo.engine import checkpoints, config
    from cosmo.engine.errors import UserError

    if not saved:
        raise UserError(f"{verb} needs --gin_file, such as --gin_file=gin/cosmo/tiny.gin")
    values = dict(binding.split(" = ", 1) for binding in bindings)
    if "MODEL_DIR" not in values:
        raise UserError(f"{verb} needs --gin_file=FILE, or --gin.MODEL_DIR=DIR of a trained run")
    path = epath.Path(values["MODEL_DIR"].strip("'\"")) / "config.gin"
    if not path.exists():
        raise UserError(f"no {path}: give the run's --gin_file, or a MODEL_DIR that train has left")
    vocabulary = config.saved_macros(path).get("VOCABULARY_PATH")
    kept = path.parent / checkpoints.VOCABULARY
    gone = vocabulary and not epath.Path(vocabulary).exists()
    if gone and kept.exists() and "VOCABULARY_PATH" not in values:
        bindings.append(f"VOCABULARY_PATH = {str(kept)!r}")  # the run's own copy
    return [str(path)]


def _set_up_logging(quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cosmo").setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("tasks").setLevel(logging.WARNING if quiet else logging.INFO)
    # gin looks for an included file in the working folder first, and says so on the root logger.
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    # Orbax, SeqIO and TensorFlow speak through absl: their notes are not for our users.
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _set_up_jax(distributed: bool) -> None:
    """Keep compiled programs between runs: a second start need not compile again."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cosmo-jax"))
    if distributed:
        from cosmo.engine.errors import UserError

        # JAX itself reads JAX_COORDINATOR_ADDRESS; where no cluster tells, these say the rest.
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPUs alone
        try:
            jax.distributed.initialize(**{key: int(value) for key, value in given.items()})
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: {error}; run on a TPU pod or Slurm, or set "
                f"JAX_COORDINATOR_ADDRESS=HOST:PORT, {' and '.join(names.values())} for each "
                "process"
            ) from error


def _tune_memory() -> None:
    """Start again once with glibc's allocator tuned, which only a variable set before start does.

    Huge pages make training on a CPU about a tenth and generation about a twentieth faster: buffers
    of hundreds of megabytes, made anew at every step, are no longer mapped 4 KiB at a time. A
    conversion wants the opposite: what it has passed on is to leave memory at once.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        converts = sys.argv[1:2] in (["import"], ["export"])
        os.environ["GLIBC_TUNABLES"] = SMALL_HEAP if converts else HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _tune_memory()
    sys.exit(main())
