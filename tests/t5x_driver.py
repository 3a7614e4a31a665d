"""Reads gin files as T5X's scripts do, over stubs with upstream's signatures; prints what is built.

A process of its own: gin's registry is global, and T5X's files call this module `__main__`.
`python tests/t5x_driver.py train|evaluate|infer FILE... -- BINDING...`
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
import sys
import types

import gin

HERE = pathlib.Path(__file__).resolve().parent
SIGNATURES = json.loads((HERE / "golden/t5x_signatures.json").read_text())["configurables"]


def recorder(name, signature):
    """A function of that signature that returns the arguments it was given, and its name."""

    def record(*args, **kwargs):
        return {"called": name, **signature.bind(*args, **kwargs).arguments}

    record.__signature__ = signature
    record.__name__ = record.__qualname__ = name.rpartition(".")[2]
    record.__module__ = name.rpartition(".")[0]
    return record


def upstream_signature(entry):
    """Keyword parameters; the optional ones have some default."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for names, default in (("required", inspect.Parameter.empty), ("optional", None))
        for name in entry[names]
    ]
    return inspect.Signature(parameters)


def install_stubs():
    """Stub modules for T5X and SeqIO, and recorders in place of what would load TensorFlow."""
    for name, entry in SIGNATURES.items():
        module_name, _, attribute = name.rpartition(".")
        parts = module_name.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = []
                if i > 1:
                    setattr(
                        sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[package]
                    )
        setattr(sys.modules[module_name], attribute, recorder(name, upstream_signature(entry)))
    for name in ("cosmo.tasks.mixtures.use", "cosmo.tasks.vocabularies.seqio_vocabulary"):
        module_name, _, attribute = name.rpartition(".")
        module = importlib.import_module(module_name)
        real = getattr(module, attribute)
        setattr(module, attribute, recorder(name, inspect.signature(real)))


def plain(value):
    """A built value as JSON; a function that T5X is to call is called as T5X would."""
    if callable(value):
        inner = inspect.unwrap(value)
        name = f"{inner.__module__}.{inner.__name__}"
        runtime = SIGNATURES[name].get("runtime", ())
        return plain(value(**dict.fromkeys(runtime, "at run time")))
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def queried(name):
    """The value that gin has for a parameter, as T5X's script asks for it: an error if unbound."""
    value = gin.query_parameter(name)
    return value.scoped_configurable_fn() if hasattr(value, "scoped_configurable_fn") else value


def main():
    """What t5x.train, t5x.eval and t5x.infer do with their flags (t5x/gin_utils.py)."""
    script, *rest = sys.argv[1:]
    split = rest.index("--")
    sys.path.insert(0, ".")
    install_stubs()
    call = gin.configurable(getattr(sys.modules["__main__"], script))
    gin.add_config_file_search_path(".")
    gin.parse_config_files_and_bindings(
        rest[:split], rest[split + 1 :], skip_unknown=False, finalize_config=True
    )
    for name in SIGNATURES[f"__main__.{script}"].get("queried", ()):
        queried(name)
    json.dump(plain(call()), sys.stdout)


if __name__ == "__main__":
    main()
