"""The command line: `python -m cosmo VERB --gin_file=FILE --gin.NAME=VALUE`."""

import argparse
import logging
import os
import pathlib
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
EPILOG = """\
verbs
  train   train, or go on from the latest checkpoint in MODEL_DIR
  eval    measure a checkpoint on validation data; prints a table, writes metrics and predictions
  infer   answer a SeqIO mixture's examples, or the records of --input, as JSON lines
  chat    talk to a checkpoint in the terminal

settings
  --gin_file=FILE         an experiment (gin/cosmo/tiny.gin); may be given several times, later wins
  --gin.NAME=VALUE        override a macro (TRAIN_STEPS) or a parameter (t5.T5Config.emb_dim)
  --gin_search_paths=A,B  folders in which gin files are looked for, after the working folder

Without --gin_file, eval, infer and chat read MODEL_DIR/config.gin, which train leaves there.

examples
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run
  python -m cosmo eval  --gin.MODEL_DIR=/tmp/run
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl --output=answers.jsonl
  python -m cosmo chat  --gin.MODEL_DIR=/tmp/run
"""


def parser() -> argparse.ArgumentParser:
    """The arguments beside --gin.NAME=VALUE."""
    p = argparse.ArgumentParser(
        prog="python -m cosmo",
        description="Train, evaluate and question dialogue models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("verb", choices=["train", "eval", "infer", "chat"], metavar="VERB")
    p.add_argument("--gin_file", action="append", default=[], metavar="FILE")
    p.add_argument("--gin_search_paths", default="", metavar="A,B")
    p.add_argument(
        "--input",
        metavar="FILE",
        help="infer: JSON lines of {narrative, instruction, turns}, all but turns optional; "
        "needs no SeqIO task",
    )
    p.add_argument("--output", metavar="FILE", help="infer --input: where the answers go")
    p.add_argument("--situation", help="chat: the situation, instead of being asked for it")
    p.add_argument("--role", help="chat: the role, instead of being asked for it")
    p.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes: a TPU pod, Slurm, or JAX_COORDINATOR_ADDRESS is set",
    )
    p.add_argument("--quiet", action="store_true", help="log warnings and errors only")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Errors that a user can mend are one line on stderr."""
    from cosmo.engine.errors import UserError
    from tasks.errors import DataError

    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except (UserError, DataError) as error:
        if os.environ.get("COSMO_TRACEBACK"):
            raise
        _wait_for_stderr()
        # Gin appends where the call stood, which is of no use to whoever mends a setting.
        text = str(error).split("\n  In call to configurable")[0]
        print(f"error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _wait_for_stderr()
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        _wait_for_stderr()


def _wait_for_stderr() -> None:
    """Wait until nobody keeps stderr from being seen (see cosmo.engine.data)."""
    data = sys.modules.get("cosmo.engine.data")
    if data is not None:
        with data.STDERR_HELD:
            pass


def _run(argv: list[str]) -> int:
    from cosmo.engine import config

    rest, bindings = config.split_arguments(argv)
    args = parser().parse_args(rest)
    _set_up_logging(args.quiet)
    _set_up_jax(args.distributed)
    from cosmo import commands

    search_paths = [p for p in args.gin_search_paths.split(",") if p]
    gin_files = args.gin_file or commands.saved_config(args.verb, bindings)
    run = "infer" if args.verb == "chat" else args.verb
    config.load(f"gin/runs/{run}.gin", gin_files, bindings, search_paths)
    commands.VERBS[args.verb](args)
    return 0


def _set_up_logging(quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cosmo").setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("tasks").setLevel(logging.WARNING if quiet else logging.INFO)
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

        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: {error}; run on a TPU pod or Slurm, or set JAX_COORDINATOR_ADDRESS"
            ) from error


def _use_huge_pages() -> None:
    """Start again once with memory in huge pages, which only a variable set before start turns on.

    On a CPU it makes training about a tenth and generation about a twentieth faster: buffers of
    hundreds of megabytes, made anew at every step, are no longer mapped 4 KiB at a time.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _use_huge_pages()
    sys.exit(main())
