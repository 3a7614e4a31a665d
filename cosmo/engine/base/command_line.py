"""Run the verbs of cosmo, canary and data_pipeline: flags, settings, logging, exit codes.

Loads nothing heavy, so that help pages and mistakes answer at once. A program is a table of verbs
(`Program`); `main` runs one of them.
"""

import argparse
import ast
import asyncio
import contextlib
import dataclasses
import difflib
import importlib
import io
import logging
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from cosmo.engine.base import silence
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.version import version

HUGE_PAGES = "glibc.malloc.hugetlb=1"
SMALL_HEAP = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.arena_max=2"


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: its help page, its `flags` (a table, see `add_flags`), the function that runs it.

    `run` returns an exit code, or None for 0. `environment` returns variables to set before JAX is
    loaded. A verb that `takes_rest` gets the words after a lone `--` as `args.rest`.

    The name of a verb may be two words ("annotate pairs"): those of one first word are a group.

    A verb with a `gin_file`, which holds its defaults, takes settings: --gin_file and
    --gin.NAME=VALUE. `takes_settings` returns whether it does so with these flags. A verb with
    `saved_settings` reads them from MODEL_DIR where no --gin_file is given. `reads_tasks` returns
    whether it then reads the run's SeqIO tasks. `bindings` come before the user's own.
    """

    help: str
    run: Callable[[argparse.Namespace], int | None]
    description: str = ""
    examples: str = ""
    flags: str = ""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    environment: Callable[[argparse.Namespace], Mapping[str, str]] = lambda args: {}
    takes_rest: bool = False
    gin_file: str | None = None
    takes_settings: Callable[[argparse.Namespace], bool] = lambda args: True
    saved_settings: bool = False
    reads_tasks: Callable[[argparse.Namespace], bool] = lambda args: True
    bindings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A command line: `name` is that of its package, "cosmo".

    `loggers` are logged. `flags` spells settings that have a flag of another name. A program that
    `uses_jax` sets it up first. `load_settings(args, verb, bindings)` runs for verbs with a
    gin_file.
    """

    name: str
    description: str
    verbs: Mapping[str, Verb]
    loggers: tuple[str, ...]
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uses_jax: bool = True
    load_settings: Callable[[argparse.Namespace, Verb, list[str]], None] = lambda *args: None
    epilog: str = ""


def main(program: Program, argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code.

    0: done. 1: an error that the user can put right, one line on stderr. 2: a mistake in the
    command line, or no verb. 130: Ctrl-C. Verbs may return codes of their own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parsed: list[argparse.Namespace] = []  # for errors: which flags the verb has
    return guarded(
        lambda: _run(program, arguments, parsed), lambda name: _flag(program, parsed, name)
    )


def _run(program: Program, argv: list[str], parsed: list[argparse.Namespace]) -> int | None:
    if not argv:
        parser(program)[0].print_help()
        return 2  # nothing was run: a script that forgot its verb has to notice
    arguments, bindings = split_arguments(argv)
    arguments = _joined(program, arguments)
    group = {n: v for n, v in program.verbs.items() if n.startswith(f"{arguments[0]} ")}
    if group:
        asked = set(arguments[1:]) <= {"-h", "--help"}
        if not asked:
            known = ", ".join(group)
            print(f"error: no verb {' '.join(arguments[:2])!r}: {known}", file=sys.stderr)
        else:
            parser(dataclasses.replace(program, verbs=group, epilog=""))[0].print_help()
        return 0 if asked and len(arguments) > 1 else 2
    args = parse(program, arguments)
    parsed.append(args)
    verb = program.verbs[args.verb]
    set_up_logging(args.quiet, program.loggers)
    if bindings and verb.gin_file is None:
        name = bindings[0].partition(" = ")[0]
        raise UserError(f"{args.verb} takes no gin settings: leave out --gin.{name}")
    # Before JAX loads, which reads them once.
    os.environ.update(verb.environment(args))
    # A line with invalid UTF-8 reaches its verb, as such an argument does.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    # Before the settings: gin imports modules, and processes must meet before a device is used.
    if program.uses_jax:
        set_up_jax(args.distributed)
    if verb.gin_file is not None and verb.takes_settings(args):
        # Flags come last, so that they win over files and over --gin.NAME.
        macros = [f"{k} = {v!r}" for k, v in vars(args).items() if k.isupper() and v is not None]
        program.load_settings(args, verb, [*verb.bindings, *bindings, *macros])
    return verb.run(args)


def _joined(program: Program, arguments: list[str]) -> list[str]:
    """Return the arguments with a verb of two words as one of them."""
    two = " ".join(arguments[:2])
    return [two, *arguments[2:]] if two in program.verbs else arguments


def guarded(
    run: Callable[[], int | None], flag: Callable[[str], str | None] = lambda name: None
) -> int:
    """Call `run` and return its exit code, 0 if it gives none. Errors are one line on stderr.

    `flag` spells a setting that an error carries, None to leave it out. COSMO_TRACEBACK=1 raises
    the errors instead. One of several JAX processes that fails exits here.
    """
    try:
        return run() or 0
    except BrokenPipeError:
        # The reader of our output has left, such as `head`. Python would fail again at exit, when
        # it writes what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except (UserError, OSError) as error:
        if os.environ.get("COSMO_TRACEBACK"):
            raise
        # stderr, so that a pipe of results stays clean.
        print(f"error: {spelled(error, flag)}", file=sys.stderr)
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
    except (KeyboardInterrupt, asyncio.CancelledError) as stop:
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return _leave(130)


def spelled(error: Exception, flag: Callable[[str], str | None]) -> str:
    """Return an error's text and, in brackets, the flags of the settings that it carries."""
    text = getattr(error, "message", None) or str(error)
    if isinstance(error, FileExistsError) and error.filename is not None:
        text = f"{error.filename} is a file, not a folder: give another path"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}: correct the path or its permissions"
    # An error's text may have the flag already: it is not repeated.
    names = [flag(name) for name in getattr(error, "settings", ())]
    missing = [name for name in dict.fromkeys(names) if name is not None and name not in text]
    return f"{text} ({', '.join(missing)})" if missing else text


def _flag(program: Program, parsed: list[argparse.Namespace], name: str) -> str | None:
    """Return the flag of a setting: the verb's own, else --gin.NAME if the verb has settings."""
    if not parsed:
        return None
    verb = parsed[0].verb
    # A flag may have a macro's name in small letters.
    wanted = [program.flags.get(name, f"--{name}"), f"--{name.lower()}"]
    # argparse offers no public list of a parser's flags.
    for action in parser(program, [verb])[1][verb]._actions:
        for flag in wanted:
            if flag in action.option_strings:
                return flag
        if action.dest == name and action.option_strings:
            return action.option_strings[-1]
    is_gins = "." in name or name.isupper()
    return f"--gin.{name}" if is_gins and program.verbs[verb].gin_file else None


def _leave(code: int) -> int:
    """Return the exit code. One of several JAX processes exits here instead.

    JAX would wait at exit for the other processes, for minutes. They end when this one is gone.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def imported(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports `module` and calls its function `name`."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (ordinary arguments, gin bindings): `--gin.NAME=value` is the binding `NAME = value`.

    Nothing after a lone `--` is a binding.
    """
    rest, bindings = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            rest += [argument, *queue]
            break
        if not argument.startswith("--gin."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals:
            # Two dashes, because a negative number begins with one.
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{argument} has no value; write {argument}=VALUE")
            value = queue.pop(0)
        bindings.append(f"{name.strip()} = {quote_bare(value)}")
    return rest, bindings


def quote_bare(value: str) -> str:
    """Return a gin value as it is, and anything that gin cannot read as a quoted text."""
    value = value.strip()
    if value.startswith(("@", "%")) or (value[:1] in "[({" and re.search("[@%]", value)):
        return value
    if value.lower() in ("true", "false", "none"):
        return value.capitalize()  # `false` as a text would count as true
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return repr(value)
    return value


class _StandardError(logging.StreamHandler):
    """Write log lines to the current sys.stderr: a progress bar puts its own in place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
        silence.line_logged()


def set_up_logging(quiet: bool, names: tuple[str, ...] = ("cosmo", "tasks")) -> None:
    """Log the loggers `names` to stderr with the time; with `quiet` only their warnings."""
    handler = _StandardError()
    logging.basicConfig(
        # Libraries note at INFO what our users cannot use.
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[handler],
    )
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING if quiet else logging.INFO)
    # gin tries the working folder first for an included file, and logs each miss on the root.
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith("Path not found: "))
    # Orbax, SeqIO and TensorFlow log through absl. Our users cannot use their notes.
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def set_up_jax(distributed: bool = False) -> None:
    """Turn on JAX's compilation cache, and with `distributed` join the other processes."""
    import jax

    # `plan` counts with this share of a GPU's memory (see `chips`); JAX's default is 0.75.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; JAX refuses both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    # A large step compiles for minutes, and the same one is read from here at the next start.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cosmo-jax"))
    if distributed:
        # JAX itself reads JAX_COORDINATOR_ADDRESS. These serve where no cluster gives the rest.
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPUs alone
        try:
            jax.distributed.initialize(**{key: int(value) for key, value in given.items()})
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{error}; run on a TPU pod or Slurm, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
                f"{' and '.join(names.values())} for each process",
                setting="distributed",
            ) from error


def tune_memory(settings: str = HUGE_PAGES) -> None:
    """Restart this process once with glibc's allocator tuned by an environment variable.

    Only a variable that is set before the start works.
    """
    # Huge pages make training on a CPU about 10% and generation about 5% faster: buffers of
    # hundreds of megabytes, new at every step, are no longer mapped 4 KiB at a time. A conversion
    # needs the opposite, SMALL_HEAP: memory goes back to the system as soon as it is freed.
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = settings
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


SETTINGS_HELP = """\
settings:
  --gin.NAME=VALUE      override a macro or a parameter (t5.T5Config.emb_dim); {gin_file}
                        and gin/defaults/ list the macros with their defaults
"""


SETTINGS_FLAGS = """
--gin_search_paths A,B  folders where gin files are looked for too
--distributed           one of several processes: a TPU pod, Slurm, or JAX_COORDINATOR_ADDRESS is
                        set
"""


def parser(
    program: Program, verbs: Collection[str] = ()
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of a program, but for --gin.NAME=VALUE, and the parser of each verb.

    Only the parsers of the `verbs` named get flags, because some verbs import code for theirs.
    """
    top = Parser(
        prog=f"python -m {program.name}",
        description=program.description,
        epilog=f"python -m {program.name} VERB --help shows a verb's flags, defaults and examples."
        + program.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"{program.name} {version()}")
    choices = top.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    by_verb = {}
    for name, verb in program.verbs.items():
        settings = SETTINGS_HELP.format(gin_file=verb.gin_file) + "\n" if verb.gin_file else ""
        examples = f"examples:\n{verb.examples}" if verb.examples else ""
        sub = choices.add_parser(
            name,
            help=verb.help,
            description=textwrap.fill(" ".join(verb.description.split()), 80),
            epilog=settings + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in verbs:
            verb.add_arguments(sub)
            add_flags(sub, verb.flags)
            if verb.gin_file:
                _add_settings(sub, verb)
        # Verbs without settings have neither flag, and the frame reads both.
        sub.set_defaults(distributed=False, rest=[])
        sub.add_argument("--quiet", action="store_true", help="log warnings and errors only")
        by_verb[name] = sub
    return top, by_verb


def _add_settings(parser: argparse.ArgumentParser, verb: Verb) -> None:
    saved = " (default: the settings of the run in MODEL_DIR)" if verb.saved_settings else ""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="an experiment, such as gin/cosmo/tiny.gin; several may be given, later ones win. A "
        f"gin file is code: pass only files that you trust{saved}",
    )
    add_flags(parser, SETTINGS_FLAGS)


def parse(program: Program, arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; a mistake is one line on stderr and exit code 2."""
    top, by_verb = parser(program, arguments[:1])
    verb = program.verbs.get(arguments[0]) if arguments else None
    ours, rest = arguments, []
    # By hand: argparse would take the words after -- for arguments of the verb.
    if verb is not None and verb.takes_rest and "--" in arguments:
        place = arguments.index("--")
        ours, rest = arguments[:place], arguments[place + 1 :]
    args, unknown = top.parse_known_args(ours)
    if unknown:
        by_verb[args.verb].error(_complaint(program, args.verb, unknown[0]))
    args.rest = rest
    return args


def _complaint(program: Program, verb: str, unknown: str) -> str:
    """Return the error for a flag that a verb does not know, with the flag probably meant."""
    # The flags of all verbs are built only where one is wrong: some import code for theirs.
    _, by_verb = parser(program, program.verbs)
    flag, equals, value = unknown.partition("=")
    complaint = f"{verb} does not know {flag}"
    macro = flag.lstrip("-").upper()
    macros = _macros(program.verbs[verb].gin_file) if program.verbs[verb].gin_file else set()
    # MODEL names a network in a gin file; a flag of that name means the folder of a model.
    if macro in ("MODEL", "CHECKPOINT") and "MODEL_DIR" in macros:
        macro = "MODEL_DIR"
    if macro in macros:
        return f"{complaint}; did you mean --gin.{macro}{equals}{value}?"
    others = [v for v, sub in by_verb.items() if flag in sub._option_string_actions]
    if others:
        return f"{complaint}; it belongs to {' and '.join(others)}"
    near = difflib.get_close_matches(flag, list(by_verb[verb]._option_string_actions), 1)
    return f"{complaint}; did you mean {near[0]}?" if near else complaint


def _macros(gin_file: str) -> set[str]:
    from cosmo.engine.base import config  # gin: only where a command line is wrong

    return config.macros_of(gin_file)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as "3,8004"; argparse's error for any other text."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected whole numbers with commas between them, such as 3,8004"
        ) from None


_TYPES = {"int": int, "float": float, "ints": whole_numbers, None: str}
# A row of `add_flags`: flag, name of its value, type, default, mark of a required one, macro, help.
_FLAG = re.compile(
    r"(--\w+)(?: (\S+?)(?::(ints?|float)|=(\S+)|(!))?)?(?: -> (\w+))?  +(\S.*)", re.S
)


def add_flags(parser: argparse.ArgumentParser, table: str) -> None:
    """Add the flags of a table that reads as their help page: `--flag VALUE  help`.

    VALUE names the flag's value, which is text. `N:int` is of that type, `N:ints` is numbers with
    commas between them, `N=1` has a default, which the help then ends with, `FILE!` is required,
    `a|b` is one of these. `VALUE -> MACRO` gives a gin macro. A flag without VALUE is a switch, and
    `--no_x` turns `x` off. At least two spaces stand before the help, and indented lines continue
    it. A line without -- begins a group.
    """
    group: argparse._ActionsContainer = parser
    for row in re.split(r"\n(?=\S)", table.strip()) if table else ():
        if not row.startswith("--"):
            group = parser.add_argument_group(row.strip().rstrip(":"))
            continue
        flag, value, kind, default, required, macro, text = _FLAG.fullmatch(row).groups()
        text = " ".join(text.split()).replace("%", "%%")  # argparse formats help with %
        given: dict[str, Any] = {"dest": macro} if macro else {}
        if value is None and flag.startswith("--no_"):
            given = {"dest": flag.removeprefix("--no_"), "action": "store_false"}
        elif value is None:
            given = {"action": "store_true"}
        else:
            given |= {"choices": value.split("|")} if "|" in value else {"metavar": value}
            given |= {"type": _TYPES[kind], "required": bool(required)}
        if default:
            with contextlib.suppress(ValueError, SyntaxError):  # a text stays what it is
                default = ast.literal_eval(default)
            given |= {"type": type(default), "default": default}
            text = f"{text} ({default})"
        group.add_argument(flag, help=text, **given)


BACKEND_FLAG = """\
--backend jax|ctranslate2|ctranslate2_int8{macro}  the engine that answers (jax, or a CTranslate2
  folder's own); CTranslate2 needs the extra `ct2`, and computes T5 on a CPU
"""


def sharding_flags(unit: str, usual_window: str) -> str:
    """Return the flags that divide long work over many `unit`s: shards, windows between saves."""
    return f"""
--num_shards N=1  output files
--shards LIST  the shards that this command takes, such as 0-3 or 2,5 (default: all); several
  commands may share one output
--window N:int  {unit} between saves, which is what a kill can cost (default: {usual_window})
--overwrite  remove what an earlier run left at --output, and start anew
"""
