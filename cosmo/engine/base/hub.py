"""Download from the HuggingFace hub, and upload: hf://OWNER/NAME, hf://datasets/OWNER/NAME.

A path may end with @REVISION and with a file or folder of the repository. Downloads go to the hub's
own cache, so a second use costs one request. `HF_ENDPOINT` names another server.
"""

import functools
import logging
import os
import pathlib
import re
from typing import Any

from cosmo.engine.base.errors import UserError

PREFIX = "hf://"
_PATH = re.compile(
    r"hf://(?P<kind>datasets/|models/)?(?P<name>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/\s]+))?"
    r"(?:/(?P<inside>.*))?"
)
FORM = "hf://OWNER/NAME, hf://datasets/OWNER/NAME, with @REVISION and /FILE if you like"
# Weights of other libraries. None is read here; PyTorch's are refused even where they are local.
NOT_READ = ("*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.pt", "*.pth", "*.gguf")
# These files lie beside a corpus's folder `data`. Its journal, tasks and people's answers are
# not pushed: they may be private.
CORPUS_FILES = ("README.md", "croissant.json", "report.*", "*.jsonl", "*.jsonl.*", "*.parquet")

_log = logging.getLogger("cosmo")


def is_hub(path: Any) -> bool:
    """Return whether `path` names something on the HuggingFace hub."""
    return str(path).startswith(PREFIX)


def local(path: Any) -> Any:
    """Return the local copy of what a path on the hub names, any other path as it is.

    Raises UserError that names the repository if it cannot be downloaded.
    """
    return download(str(path)) if is_hub(path) else path


@functools.cache  # one download a process: the hub's files must not change while they are read
def download(path: str) -> str:
    """Download what `path` names; return the place of the local copy."""
    found = _PATH.fullmatch(path)
    if found is None:
        raise UserError(f"{path}: expected {FORM}")
    kind, name, revision, inside = found.group("kind", "name", "revision", "inside")
    inside = (inside or "").strip("/")
    hub = import_hub()
    of_model = kind != "datasets/"
    try:
        folder = hub.snapshot_download(
            name,
            repo_type="model" if of_model else "dataset",
            revision=revision,
            allow_patterns=[inside, f"{inside}/*"] if inside else None,
            # A file that is named is wanted, whatever it is.
            ignore_patterns=list(NOT_READ) if of_model and not inside else None,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except Exception as error:  # of the hub, of its HTTP library, of the file system
        raise UserError(
            f"{path}: the hub gives no {'model' if of_model else 'data set'} {name}"
            f"{f' at {revision}' if revision else ''} ({_first_line(error)}); check the name, your "
            "connection, and for a private or gated one your login (hf auth login, or HF_TOKEN)"
        ) from error
    _log.info("%s is revision %s", path, pathlib.Path(folder).name)
    return str(pathlib.Path(folder, inside)) if inside else folder


def push(folder: str, path: str, *, public: bool = False) -> str:
    """Upload a model's or corpus's folder to `path` on the hub; return the address of the commit.

    A repository that does not exist is made, private unless `public`. Raises UserError.
    """
    found = _PATH.fullmatch(path)
    if found is None or found["inside"]:
        raise UserError(f"{path}: expected hf://OWNER/NAME or hf://datasets/OWNER/NAME")
    kind = "dataset" if found["kind"] == "datasets/" else "model"
    hub = import_hub()
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(found["name"], repo_type=kind, private=not public, exist_ok=True)
        return api.upload_folder(
            repo_id=found["name"],
            repo_type=kind,
            folder_path=folder,
            revision=found["revision"],
            allow_patterns=_corpus_files(pathlib.Path(folder)) if kind == "dataset" else None,
            ignore_patterns=[".*", "*.partial", "*.lock"],
            commit_message="Upload by cosmo push",
        ).commit_url
    except Exception as error:  # of the hub, of its HTTP library, of the file system
        raise UserError(
            f"{path}: nothing was uploaded ({_first_line(error)}); check your connection and your "
            "login, which must allow writing (hf auth login, or HF_TOKEN)"
        ) from error


def _corpus_files(folder: pathlib.Path) -> list[str]:
    """Return the names of the files of a corpus that may be published."""
    own = [path for pattern in CORPUS_FILES for path in folder.glob(pattern)]
    found = [*own, *(folder / "data").glob("*")]
    # By name: a pattern of the hub's would match files in other folders too.
    return [str(path.relative_to(folder)) for path in found if path.is_file()]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason'}"


def import_hub() -> Any:
    """Return the module `huggingface_hub`. Raises UserError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "hf:// paths need huggingface_hub: pip install 'cosmo-dialogue[hub]'"
        ) from error
    return huggingface_hub
