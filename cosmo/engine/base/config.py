"""Read settings with gin: files, overrides and a run's saved values, with errors in one line.

The one module that imports gin. Gin files use dynamic registration, so they bind plain classes and
functions; macros (MODEL_DIR, TRAIN_STEPS, ...) are what people override.
"""

import difflib
import functools
import importlib
import inspect
import logging
import pathlib
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

import gin
from cosmo.engine.base import annotations, saved_settings
from cosmo.engine.base.errors import UserError, shortened, shown
from gin import config as gin_internals

# The package: gin files are named from here (gin/runs/train.gin).
ROOT = pathlib.Path(__file__).resolve().parents[2]

_MACRO_DEFINITION = re.compile(r"^([A-Za-z_]\w*)\s*=(?!=)", re.M)
_MACRO_REFERENCE = re.compile(r"%([A-Za-z_][\w.]*)")
_STRING = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_IMPORT = re.compile(r"^(?:from|import)\s.+$", re.M)
_INCLUDE = re.compile(r"^include\s+['\"]([^'\"]+)['\"]", re.M)
# gin's two forms of a binding: `scope/module.Name.parameter = value`, and a block of them.
_BOUND = re.compile(r"([\w./]+\.[\w.]+)\.(\w+)\s*=(?!=)")
_BLOCK = re.compile(r"([\w./]+\.\w+):\s*$")
_INSIDE = re.compile(r"\s+(\w+)\s*=(?!=)")
_REFERENCE = re.compile(r"@([\w./]+)")
_UNBOUND = object()
_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {}  # the bindings of the run file alone

log = logging.getLogger(__name__)


def load(
    run_file: str,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Iterable[str] = (),
    saved: saved_settings.Saved | None = None,
    own_code: Mapping[str, str] = {},
) -> None:
    """Parse `run_file` (the verb's defaults), then the user's files, then the overrides, in order.

    `saved`, the settings of a run, come after the run file. They are bound as values, never parsed.
    `own_code` has for code that a run may name, "@blenderbot.BlenderbotConfig()", the gin file of
    this project that binds it. The file comes before `saved`.
    Raises UserError, one line, for a missing file, an unknown name, or a value of the wrong type.
    Raises it too for a macro that is unknown, undefined, or still has to be given.
    """
    # gin's bindings belong to the process: a second command in it (a test, a notebook) starts anew.
    gin.clear_config()
    gin_internals._LOCATION_PREFIXES[:] = [""]  # gin would keep those of earlier loads
    user_paths = [pathlib.Path(p) for p in search_paths]
    # gin itself passes over a folder that is missing.
    for path in user_paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder", setting="gin_search_paths")
    # The working folder, then the user's paths, then the project: gin looks in this order too.
    paths = [*user_paths, ROOT]
    for path in paths:
        gin.add_config_file_search_path(str(path))
    texts: dict[str, str] = {}
    _read(run_file, paths, texts)
    used = saved.code.values() if saved is not None else ()
    own_files = [file for code, file in own_code.items() if code in used]
    for file in (*own_files, *gin_files):
        _read(str(file), paths, texts)
    # Before parsing, because gin binds any macro: a misspelled override would change nothing.
    _check_macros(texts, bindings)
    _parse(lambda: _parse_file(run_file, paths), run_file, texts)
    # Between the run file and the user's files, so that `run_files` finds what differs.
    _DEFAULTS.clear()
    _DEFAULTS.update((key, dict(given)) for key, given in gin_internals._CONFIG.items())
    for file in own_files:
        _parse(lambda file=file: _parse_file(file, paths), file, texts)
    if saved is not None:
        _bind_saved(saved, {binding.split(" = ", 1)[0] for binding in bindings}, own_code)
    for file in map(str, gin_files):
        _parse(lambda file=file: _parse_file(file, paths), file, texts)
    # Overrides may name whatever the files import.
    imports = "\n".join(dict.fromkeys(_IMPORT.findall("".join(texts.values()))))
    for binding in bindings:
        where = shortened(f"--gin.{binding.replace(' = ', '=', 1)}")
        text = f"{imports}\n{binding}\n"
        _parse(lambda text=text: gin.parse_config(text), where, texts, binding)
    _check_references()
    # Not gin.finalize: it would demand the required macros of every verb, not of this one.
    _check_required(run_file)
    _check_types()


def _bind_saved(
    saved: saved_settings.Saved, given: Iterable[str], own_code: Collection[str]
) -> None:
    """Bind a run's settings as plain values, as far as the run file of this verb has the names.

    Settings of other verbs are left out. Raises UserError if one that this verb needs is code, and
    is neither this project's `own_code` nor among those `given` on the command line.
    """
    bound = gin_internals._CONFIG
    # Saved names are short (t5.T5Config.emb_dim); gin's keys have the whole module.
    selectors = {_short(selector): selector for _, selector in bound if selector != "gin.macro"}

    def split(name: str) -> tuple[str, str | None, str]:
        place, _, parameter = name.rpartition(".")
        scope, _, short = place.rpartition("/")
        return scope, selectors.get(short), parameter

    for name, what in saved.code.items():
        needed = (name, "gin.macro") in bound or split(name)[1] is not None
        if needed and name not in given and what not in own_code:
            raise UserError(
                f"{name} of this run is {what}, which is code and is not run from a folder: give "
                "--gin_file=FILE, the file that the run was trained with (or its own config.gin, "
                "if you trust whoever made it)"
            )
    # Only macros of this verb's own run file: others would be bound, and used by nothing.
    for name, value in saved.taken().items():
        if (name, "gin.macro") in bound:
            bound[name, "gin.macro"]["value"] = value
    for name, value in saved.parameters.items():
        scope, selector, parameter = split(name)
        if selector is not None and parameter in _parameters(selector):
            place = bound.setdefault((scope, selector), {})
            # A macro that gives this value stays, so that the command line can change it.
            if _resolved(name, place.get(parameter, _UNBOUND))[1] != value:
                place[parameter] = value
    # A run of another version may have saved macros that no verb has any more.
    everything = {*_references(_run_files()), *_MACRO_DEFINITION.findall(_run_files())}
    unknown = sorted(saved.macros.keys() - everything)
    if unknown:
        log.warning("%s: unknown and ignored: %s", saved.path, ", ".join(unknown))


def run_files() -> dict[str, str]:
    """Return what a run leaves beside its checkpoints: {file name: content}.

    config.gin repeats the run. settings.json has its plain values for other verbs (see
    `saved_settings`): every macro of the run file, and the parameters that differ from it.
    """
    macros: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    code: dict[str, str] = {}
    for (scope, selector), given in gin_internals._CONFIG.items():
        is_macro = selector == "gin.macro"
        if is_macro and (scope, selector) not in _DEFAULTS:
            continue  # the user's own: what it stands for is resolved where it is used
        for parameter, value in given.items():
            place = "/".join([*filter(None, [scope]), _short(selector)])
            name = scope if is_macro else f"{place}.{parameter}"
            _, plain = _resolved(name, value)
            default = _DEFAULTS.get((scope, selector), {}).get(parameter, _UNBOUND)
            differs = _identity(value) != _identity(default)
            if plain is _UNBOUND or not saved_settings.is_plain(plain):
                # A value that still has to be given is no code: the verb that needs it asks for it.
                if differs and "gin.REQUIRED" not in repr(value):
                    code[name] = repr(value)
            elif is_macro:
                macros[name] = plain
            elif differs:
                parameters[name] = plain
    return {
        saved_settings.GIN_FILE: operative_config(),
        saved_settings.FILE: saved_settings.text(macros, parameters, code),
    }


def _short(selector: str) -> str:
    """Return a selector as people write it: module and name, "t5.T5Config"."""
    return ".".join(selector.split(".")[-2:])


def _identity(value: Any) -> Any:
    """Return a bound value to compare with another: a reference by its name, not by its result."""
    if isinstance(value, gin_internals.ConfigurableReference):
        return "reference", value.config_key, value.evaluate
    return value


def _resolved(name: str, value: Any) -> tuple[str, Any]:
    """Follow macros to the value that they stand for: (the last macro's name, the plain value).

    The value is _UNBOUND where it is, or holds, a reference to code, or a macro without a value.
    """
    seen: set[str] = set()
    while isinstance(value, gin_internals.ConfigurableReference):
        macro = value.scopes[-1] if value.scopes else ""
        given = gin_internals._CONFIG.get((macro, "gin.macro"))
        if value.selector != "gin.macro" or given is None or macro in seen:
            return name, _UNBOUND
        seen.add(macro)
        name, value = macro, given["value"]
    if isinstance(value, Mapping):
        inner = {key: _resolved(name, one)[1] for key, one in value.items()}
        return name, _UNBOUND if _UNBOUND in inner.values() else inner
    if isinstance(value, tuple | list):
        parts = [_resolved(name, one)[1] for one in value]
        return name, _UNBOUND if _UNBOUND in parts else type(value)(parts)
    return name, value


def _last_reference(value: Any) -> Any:
    """Return the reference to a class or function, not to a call of it, behind `value`, or None."""
    while isinstance(value, gin_internals.ConfigurableReference) and value.selector == "gin.macro":
        value = gin_internals._CONFIG[value.scopes[-1], "gin.macro"]["value"]
    is_reference = isinstance(value, gin_internals.ConfigurableReference)
    return value if is_reference and not value.evaluate else None


def _check_types() -> None:
    """Raise UserError for the first plain value that its parameter's annotation does not allow."""
    for (scope, selector), given in gin_internals._CONFIG.items():
        wanted = _annotations(selector)
        for parameter, value in given.items():
            if parameter not in wanted:
                continue
            place = "/".join([*filter(None, [scope]), _short(selector)])
            name, plain = _resolved(f"{place}.{parameter}", value)
            if plain is _UNBOUND:
                # A reference without () is a class or a function, which is not a plain value.
                target = _last_reference(value)
                if target is None or not annotations.is_plain(wanted[parameter]):
                    continue
                plain = target
            if not annotations.fits(plain, wanted[parameter]):
                raise UserError(
                    f"{name}={shown(plain)}; give {annotations.words(wanted[parameter])}",
                    setting=name,
                )


def _annotations(selector: str) -> dict[str, Any]:
    """Return the annotated types of a configurable's parameters; {} if they cannot be evaluated."""
    target = gin_internals._REGISTRY.get_match(selector)
    if target is None or selector == "gin.macro":
        return {}
    function = inspect.unwrap(target.wrapped)
    function = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that only type checkers import
        return {}


def call(function: Callable[..., Any], **given: Any) -> Any:
    """Call `function` with the arguments that gin holds for it, and those `given`, which win."""
    try:
        return gin.get_configurable(function)(**given)
    except UserError as error:
        # gin appends to the text where the call stood, which does not help to change a setting.
        raise UserError(error.message, setting=error.settings) from error


def registration(function: Callable[..., str]) -> Callable[[], str]:
    """Return the call of `function` with the arguments that gin holds for it, as plain data.

    gin's own wrapper of a function cannot be sent to another process, such as the one that reads
    the data.
    """
    return functools.partial(inspect.unwrap(function), **gin.get_bindings(function))


def query(name: str) -> Any:
    """Return the value of a macro, that of another macro where it refers to one."""
    value = gin.query_parameter(f"%{name}")
    _, plain = _resolved(name, value)
    return value if plain is _UNBOUND else plain


def operative_config() -> str:
    """Return all bindings in use so far, as a gin file that repeats the run."""
    # Bindings that are referred to but not called are added: training from a cache calls no task,
    # but evaluation of the run does. gin writes what a macro builds in a scope of the macro's name
    # (`MODEL/t5.T5Config.emb_dim`), which would win over an override of the plain name: the scope
    # is left out.
    _add_references()
    text = gin.operative_config_str()
    macros = "|".join(set(_MACRO_DEFINITION.findall(text)))
    return re.sub(rf"^({macros})/", "", text, flags=re.M) if macros else text


def _add_references() -> None:
    """Put the bindings that operative ones refer to among the operative ones."""
    operative, bound = gin_internals._OPERATIVE_CONFIG, gin_internals._CONFIG
    # Until nothing is added, because an added binding may refer to others.
    size = -1
    while size != len(operative):
        size = len(operative)
        for reference in list(gin_internals.iterate_references(operative)):
            selector = reference.configurable.selector
            for scope in {"", "/".join(reference.scopes)}:
                if (scope, selector) in bound and (scope, selector) not in operative:
                    operative[scope, selector] = dict(bound[scope, selector])


def _find(file: str, paths: Iterable[pathlib.Path]) -> epath.Path:
    if "://" in file and epath.Path(file).exists():
        return epath.Path(file)
    for folder in ("", *paths):
        if (epath.Path(folder) / file).is_file():
            return epath.Path(folder) / file
    looked = ", ".join(str(p) for p in (".", *paths))
    known = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "gin").rglob("*.gin"))]
    raise UserError(f"no gin file {file!r} in {looked}{_hint(file, known)}")


def _parse_file(file: str, paths: Iterable[pathlib.Path]) -> None:
    found = _find(file, paths)
    if "://" in file:
        # gin's own reader opens local files alone.
        gin.parse_config(found.read_text())
    else:
        gin.parse_config_file(str(found))


def _read(file: str, paths: list[pathlib.Path], texts: dict[str, str]) -> None:
    """Add to `texts` a gin file and all that it includes, by name, without comments."""
    if file in texts:
        return
    try:
        text = _find(file, paths).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read gin file {file}: {error}") from error
    # The expressions for macros and bindings would find them in comments too. Lines keep numbers.
    texts[file] = re.sub(r"#.*", "", text)
    for included in _INCLUDE.findall(texts[file]):
        if included == file:
            raise UserError(f"gin file {file} includes itself")
        _read(included, paths, texts)


# Every load checks its macros against these files, which do not change.
@functools.cache
def _run_files() -> str:
    """Return the text of every verb's run file and of its defaults."""
    files = [*(ROOT / "gin/runs").glob("*.gin"), *(ROOT / "gin/defaults").glob("*.gin")]
    return "".join(re.sub(r"#.*", "", file.read_text()) for file in files)


def macros_of(run_file: str) -> set[str]:
    """Return the macros that a verb's run file and its includes set; gin's state is left alone."""
    texts: dict[str, str] = {}
    _read(run_file, [ROOT], texts)
    return set(_MACRO_DEFINITION.findall("".join(texts.values())))


def _references(text: str) -> list[str]:
    """Return the macros that a gin text refers to; a % inside a string is not one."""
    return _MACRO_REFERENCE.findall(_STRING.sub("''", text))


def _check_macros(texts: dict[str, str], bindings: Sequence[str]) -> None:
    """Raise UserError for a macro that is set and used nowhere, or used and set nowhere."""
    given = "\n".join(bindings)
    sources = {**texts, "the command line": given}
    everything = "\n".join(sources.values())
    defined = set(_MACRO_DEFINITION.findall(everything))
    # One experiment file serves every verb: a macro that another verb's run file uses is known.
    known = {*_references(everything), *_references(_run_files())}
    for where in ("the command line", *texts):
        for name in _MACRO_DEFINITION.findall(sources[where]):
            if name not in known:
                raise UserError(f"unknown name {name} in {where}{_hint(name, known)}")
    for where, text in sources.items():
        for name in _references(text):
            if not name.startswith("gin.") and "." not in name and name not in defined:
                raise UserError(
                    f"macro {name} is used in {where} and set nowhere{_hint(name, defined)}; "
                    f"give it with --gin.{name}=VALUE"
                )


def _check_references() -> None:
    """Raise UserError for a macro that refers to itself, or to one that is set nowhere."""
    bound = gin_internals._CONFIG

    def follow(name: str, value: Any, path: tuple[str, ...]) -> None:
        for reference in gin_internals.iterate_references(value):
            if reference.selector != "gin.macro":
                continue
            macro = reference.scopes[-1] if reference.scopes else "gin.macro"
            if macro in path:
                way = " -> ".join([*path[path.index(macro) :], macro])
                raise UserError(f"{macro} refers to itself ({way}); give it a value", setting=macro)
            if "value" not in bound.get((macro, "gin.macro"), {}):
                raise UserError(f"{name} refers to {macro}, which is set nowhere", setting=name)
            follow(macro, bound[macro, "gin.macro"]["value"], (*path, macro))

    for (scope, selector), given in bound.items():
        for parameter, value in given.items():
            name = scope if selector == "gin.macro" else f"{_short(selector)}.{parameter}"
            follow(name, value, (name,))


def _check_required(run_file: str) -> None:
    """Raise UserError for values that parameters refer to and that still have to be given."""
    config = gin_internals._CONFIG
    scoped = {
        (selector, parameter)
        for (scope, selector), parameters in config.items()
        for parameter in parameters
        if scope
    }
    missing: dict[str, None] = {}  # ordered, unlike a set
    for (scope, selector), parameters in config.items():
        for parameter, value in parameters.items():
            # A value in a scope, as config.gin has, counts instead of the one without. A macro
            # counts where a parameter refers to it.
            if selector != "gin.macro" and (scope or (selector, parameter) not in scoped):
                missing |= dict.fromkeys(_required(f"{_short(selector)}.{parameter}", value))
    if missing:
        flags = " ".join(f"--gin.{name}=VALUE" for name in missing)
        raise UserError(f"{', '.join(missing)} must be given ({run_file} needs it): {flags}")


def _required(name: str, value: Any) -> Iterator[str]:
    """Yield the names of the macros or the parameter behind `value` that are %gin.REQUIRED."""
    for reference in gin_internals.iterate_references(value):
        place = reference.scopes[-1] if reference.scopes else ""
        if reference.selector == "gin.constant" and place == "gin.REQUIRED":
            yield name
        elif reference.selector == "gin.macro":
            yield from _required(place, gin.query_parameter(f"%{place}"))


def _parse(parse: Callable[[], Any], where: str, texts: Mapping[str, str], binding="") -> None:
    """Run a parser of gin's. Raise its error as one line, with the nearest name for an unknown one.

    `texts` are all gin files by name; `binding` is the override that is parsed.
    """
    try:
        parse()
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # gin raises whatever an import in the file raises
        for place, text in {where: binding}.items() if binding else texts.items():
            for line, name, known in _unknown_names(text, "".join(texts.values())):
                at = place if binding else f"{place}, line {line}"
                raise UserError(f"unknown name {name} in {at}{_hint(name, known)}") from error
        # gin repeats the binding, which may be long.
        reason = " ".join(shortened(word) for word in str(error).split())
        raise UserError(f"{where}: {reason}") from error


def _unknown_names(text: str, everything: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield (line from 1, name, known names) of each name in a gin text that stands for nothing.

    `everything` is the text of all files: their imports are the names that there are.
    """
    # All files: gin lets one use what another has imported.
    modules = _imported(everything)
    names = [_short(str(s)) for s in gin_internals._REGISTRY._selector_map]
    block = None
    for number, line in enumerate(text.splitlines(), 1):
        head = _BLOCK.match(line)
        bound = _BOUND.match(line)
        inside = _INSIDE.match(line) if block else None
        used = _REFERENCE.findall(_STRING.sub("''", line))
        # A block ends with the first line that is not indented.
        block = head[1] if head else block if inside else None
        for name in [*([head[1]] if head else []), *([bound[1]] if bound else []), *used]:
            target = _target(name.rpartition("/")[2], modules)
            if target is None:
                yield number, name, names
            elif bound and name == bound[1] and bound[2] not in (known := _signature(target)):
                yield number, f"{name}.{bound[2]}", [f"{name}.{parameter}" for parameter in known]
        known = _signature(_target(block.rpartition("/")[2], modules)) if inside else []
        if known and inside[1] not in known:
            yield number, f"{block}.{inside[1]}", [f"{block}.{one}" for one in known]


def _imported(text: str) -> dict[str, str]:
    """Return {name: module} of the imports in gin files."""
    found = {}
    for line in _IMPORT.findall(text):
        words = line.split()
        if words[0] == "from":
            found[words[-1]] = f"{words[1]}.{words[3]}"
        else:
            found[words[-1]] = words[1]
    return found


def _target(name: str, modules: Mapping[str, str]) -> Any:
    """Return the class or function of a gin name; None if there is none."""
    try:
        registered = gin_internals._REGISTRY.get_match(name)
    except KeyError:  # several match
        return None
    if registered is not None:
        return registered.wrapped
    for head in sorted(modules, key=len, reverse=True):
        if name.startswith(f"{head}."):
            try:
                found = importlib.import_module(modules[head])
                return functools.reduce(getattr, name.removeprefix(f"{head}.").split("."), found)
            except (ImportError, AttributeError):
                return None
    return None


def _signature(target: Any) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return []


def _parameters(selector: str) -> list[str]:
    target = gin_internals._REGISTRY.get_match(selector)
    return _signature(target.wrapped) if target else []


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


logging.getLogger("gin").setLevel(logging.ERROR)
