"""What every command line of this project does around its work: start, complain, stop.

Loads nothing heavy, so that help pages and mistakes answer at once. `python -m cosmo` and
`python -m canary` stand on it.
"""

import argparse
import difflib
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cosmo.engine.base.errors import UserError

HUGE_PAGES = "glibc.malloc.hugetlb=1"
SMALL_HEAP = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.arena_max=2"


def guarded(
    run: Callable[[], int | None], mendable: tuple[type[Exception], ...] = (UserError,)
) -> int:
    """Call `run`; the exit code, 0 if it gives none. `mendable` errors are one line on stderr.

    Of several processes one that fails ends here and now.
    """
    try:
        return run() or 0
    except mendable as error:
        if os.environ.get("COSMO_TRACEBACK"):
            raise
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
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return _leave(130)


def _leave(code: int) -> int:
    """The exit code; but of several processes this one does not wait for the others, which JAX
    would at exit, for minutes: when it is gone they end too."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def function(place: str) -> Callable[..., Any]:
    """The function at "module:name", imported."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def set_up_logging(quiet: bool, names: tuple[str, ...] = ("cosmo", "tasks")) -> None:
    """Notes of the loggers `names` go to stderr with the time; with `quiet` only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING if quiet else logging.INFO)
    # gin looks for an included file in the working folder first, and says so on the root logger.
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    # Orbax, SeqIO and TensorFlow speak through absl: their notes are not for our users.
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def set_up_jax(distributed: bool = False) -> None:
    """Keep compiled programs between runs: a second start need not compile again."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cosmo-jax"))
    if distributed:
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


def tune_memory(settings: str = HUGE_PAGES) -> None:
    """Start again once with glibc's allocator tuned, which only a variable set before start does.

    Huge pages make training on a CPU about a tenth and generation about a twentieth faster: buffers
    of hundreds of megabytes, made anew at every step, are no longer mapped 4 KiB at a time. A
    conversion wants the opposite, SMALL_HEAP: what it has passed on is to leave memory at once.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = settings
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parse(
    top: argparse.ArgumentParser,
    by_verb: Mapping[str, argparse.ArgumentParser],
    arguments: list[str],
) -> argparse.Namespace:
    """The parsed command line; a mistake is one line on stderr and exit code 2."""
    args, unknown = top.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = list(by_verb[args.verb]._option_string_actions)
        near = difflib.get_close_matches(flag, known, 1)
        others = [v for v, sub in by_verb.items() if flag in sub._option_string_actions]
        hint = f"; did you mean {near[0]}?" if near else ""
        hint = f"; it belongs to {' and '.join(others)}" if others else hint
        by_verb[args.verb].error(f"{args.verb} does not know {flag}{hint}")
    return args


def sharding_arguments(group: Any, unit: str, usual_window: str) -> None:
    """Flags of how long work over many `unit`s is cut: shards, and windows between saves."""
    group.add_argument("--num_shards", type=int, default=1, metavar="N", help="output files (1)")
    group.add_argument(
        "--shards",
        metavar="LIST",
        help="the shards that this command takes, such as 0-3 or 2,5 (default: all); several "
        "commands may share one output",
    )
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"{unit} between saves, which is what a kill can cost (default: {usual_window})",
    )
