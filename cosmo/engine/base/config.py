"""T5X's command line over gin: files, `--gin.NAME=value` overrides, and errors a person can use.

The one module that imports gin. Gin files use dynamic registration, so they bind plain classes and
functions; macros (MODEL_DIR, TRAIN_STEPS, ...) are what people override.
"""

import ast
import difflib
import functools
import inspect
import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

import gin
from cosmo.engine.base.errors import UserError
from gin import config as gin_internals

# The package: gin files are named from here (gin/runs/train.gin).
ROOT = pathlib.Path(__file__).resolve().parents[2]

_MACRO_DEFINITION = re.compile(r"^([A-Za-z_]\w*)\s*=(?!=)", re.M)
_MACRO_REFERENCE = re.compile(r"%([A-Za-z_][\w.]*)")
_STRING = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_IMPORT = re.compile(r"^(?:from|import)\s.+$", re.M)
_INCLUDE = re.compile(r"^include\s+['\"]([^'\"]+)['\"]", re.M)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(ordinary arguments, gin bindings): `--gin.NAME=value` becomes the binding `NAME = value`."""
    rest, bindings = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--gin."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{argument} has no value; write {argument}=VALUE")
            value = queue.pop(0)
        bindings.append(f"{name.strip()} = {quote_bare(value)}")
    return rest, bindings


def quote_bare(value: str) -> str:
    """A gin value as it is; anything that gin cannot read is taken for a string and quoted."""
    value = value.strip()
    if value.startswith(("@", "%")) or (value[:1] in "[({" and re.search("[@%]", value)):
        return value
    if value.lower() in ("true", "false", "none"):
        return value.capitalize()  # `false` as a string would count as true
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return repr(value)
    return value


def load(
    run_file: str,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Iterable[str] = (),
) -> None:
    """Parse `run_file` (the verb's defaults), then the user's files, then the overrides, in order.

    Raises UserError, one line, for a missing file, an unknown name, an unknown or undefined macro,
    or a macro that still has to be given.
    """
    gin.clear_config()
    gin_internals._LOCATION_PREFIXES[:] = [""]  # gin would keep those of earlier loads
    user_paths = [pathlib.Path(p) for p in search_paths]
    for path in user_paths:
        if not path.is_dir():
            raise UserError(f"--gin_search_paths: {path} is not a folder")
    # The working folder, then the user's paths, then the project: gin looks in this order too.
    paths = [*user_paths, ROOT]
    for path in paths:
        gin.add_config_file_search_path(str(path))
    texts: dict[str, str] = {}
    _read(run_file, paths, texts)
    needed = _references("".join(texts.values()))
    for file in gin_files:
        _read(str(file), paths, texts)
    _check_macros(texts, bindings)
    for file in (run_file, *gin_files):
        _parse(lambda file=file: _parse_file(str(file), paths), str(file))
    # Overrides may name whatever the files import.
    imports = "\n".join(dict.fromkeys(_IMPORT.findall("".join(texts.values()))))
    for binding in bindings:
        _parse(lambda binding=binding: gin.parse_config(f"{imports}\n{binding}\n"), "", binding)
    # Not gin.finalize: it would want the required macros of every verb, not of this one.
    _check_required(run_file, needed)


def call(function: Callable[..., Any], **given: Any) -> Any:
    """Call `function` with the arguments that gin holds for it, and those `given`, which win."""
    try:
        return gin.get_configurable(function)(**given)
    except (RuntimeError, ValueError, TypeError) as error:
        place = re.search(r"In call to configurable '(\w+)'", str(error))
        if isinstance(error, TypeError) and place and place.group(1) != function.__name__:
            first = str(error).splitlines()[0]
            raise UserError(f"{place.group(1)} has a setting of the wrong type: {first}") from error
        missing = re.search(r"Required bindings for `(.+?)` not provided.*?\[(.*?)\]", str(error))
        if missing:
            name, what = missing.group(1), missing.group(2).replace("'", "")
            raise UserError(f"{name} needs a value for {what} (gin: {name}.{what})") from error
        raise


def registration(function: Callable[..., str]) -> Callable[[], str]:
    """Return the call of `function` with the arguments that gin holds for it, as plain data.

    gin's own wrapper of a function cannot be sent to another process, such as the one that reads
    the data.
    """
    return functools.partial(inspect.unwrap(function), **gin.get_bindings(function))


def query(name: str) -> Any:
    """The value of a macro."""
    return gin.query_parameter(f"%{name}")


def macro_value(name: str) -> Any:
    """What a macro stands for, built: `MODEL` gives the model that it refers to."""
    selector = f"{name}/gin.macro"
    return gin.config.ConfigurableReference(selector, True).__deepcopy__({})


def operative_config() -> str:
    """All bindings in use so far, as a gin file that repeats the run.

    What they refer to is in it, called or not: training from a cache calls no task, but whoever
    evaluates the run does.

    gin writes what a macro builds in a scope of the macro's name (`MODEL/t5.T5Config.emb_dim`),
    which would win over an override of the plain name: the scope is left out.
    """
    _add_references()
    text = gin.operative_config_str()
    macros = "|".join(set(_MACRO_DEFINITION.findall(text)))
    return re.sub(rf"^({macros})/", "", text, flags=re.M) if macros else text


def _add_references() -> None:
    """Put the bindings that operative ones refer to among the operative ones."""
    operative, bound = gin_internals._OPERATIVE_CONFIG, gin_internals._CONFIG
    size = -1
    while size != len(operative):
        size = len(operative)
        for reference in list(gin_internals.iterate_references(operative)):
            selector = reference.configurable.selector
            for scope in {"", "/".join(reference.scopes)}:
                if (scope, selector) in bound and (scope, selector) not in operative:
                    operative[scope, selector] = dict(bound[scope, selector])


def saved_macros(path: epath.PathLike) -> dict[str, Any]:
    """The macros of a config.gin that stand for plain values; gin's own state is left alone."""
    return macros_in(epath.Path(path).read_text())


def macros_in(text: str) -> dict[str, Any]:
    """As `saved_macros`, of the text of such a file."""
    found: dict[str, Any] = {}
    text = text.replace("\\\n", "")
    places = [*(match.start() for match in _MACRO_DEFINITION.finditer(text)), len(text)]
    for start, end in itertools.pairwise(places):
        name, _, value = text[start:end].partition("=")
        value = re.split(r"\n\s*\n|\n#", value)[0]
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            continue  # a reference
    return found


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
    texts[file] = re.sub(r"#.*", "", text)
    for included in _INCLUDE.findall(texts[file]):
        if included == file:
            raise UserError(f"gin file {file} includes itself")
        _read(included, paths, texts)


def _run_files() -> str:
    return "".join(re.sub(r"#.*", "", p.read_text()) for p in (ROOT / "gin/runs").glob("*.gin"))


def _references(text: str) -> list[str]:
    """Macros that a gin text refers to; a % inside a string is not one."""
    return _MACRO_REFERENCE.findall(_STRING.sub("''", text))


def _check_macros(texts: dict[str, str], bindings: Sequence[str]) -> None:
    """Every macro set must be used somewhere, every macro used must be set."""
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


def _check_required(run_file: str, needed: Sequence[str]) -> None:
    in_use = _macros_in_use()
    missing = []
    for name in dict.fromkeys(needed):
        if name in in_use and "gin.REQUIRED" in repr(gin.query_parameter(f"%{name}")):
            missing.append(name)
    if missing:
        flags = " ".join(f"--gin.{name}=VALUE" for name in missing)
        raise UserError(f"{', '.join(missing)} must be given ({run_file} needs it): {flags}")


def _macros_in_use() -> set[str]:
    """Macros that parameters refer to; one set in a scope too, as config.gin does, needs none."""
    config = gin_internals._CONFIG
    scoped = {
        (selector, parameter)
        for (scope, selector), parameters in config.items()
        for parameter in parameters
        if scope
    }
    return {
        reference.scopes[-1]
        for (scope, selector), parameters in config.items()
        for parameter, value in parameters.items()
        if scope or (selector, parameter) not in scoped
        for reference in gin_internals.iterate_references(value)
        if reference.selector == "gin.macro"
    }


def _parse(parse: Callable[[], Any], file: str, binding: str = "") -> None:
    """Run a parser of gin's; its errors become one line with a place and the nearest valid name."""
    where = file or f"--gin.{binding.replace(' = ', '=', 1)}"
    try:
        parse()
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # gin raises whatever an import in the file raises
        text = " ".join(str(error).split())
        line = re.search(r"(?:In file|line)[^\d]*?(?:\"([^\"]+)\")?,? line (\d+)", text)
        place = where
        if line and file:
            place = f"{line.group(1) or where}, line {line.group(2)}"
        unknown = re.search(r"No configurable matching (?:reference )?'@?([^'(]+)", text)
        if unknown:
            name = unknown.group(1)
            raise UserError(f"unknown name {name} in {place}{_hint(name, _selectors())}") from error
        unknown = re.search(
            r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text
        )
        if unknown:
            selector, name = unknown.groups()
            known = _parameters(selector)
            raise UserError(
                f"unknown name {selector}.{name} in {place}{_hint(name, known)}"
            ) from error
        raise UserError(f"{place}: {text}") from error


def _selectors() -> list[str]:
    return [str(s) for s in gin_internals._REGISTRY._selector_map]


def _parameters(selector: str) -> list[str]:
    target = gin_internals._REGISTRY.get_match(selector)
    return list(inspect.signature(target.wrapped).parameters) if target else []


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


logging.getLogger("gin").setLevel(logging.ERROR)
