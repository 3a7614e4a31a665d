"""Do resumable work: numbered units of one plan, each finished whole or not at all.

A unit is done when its result and its note are in place. A killed command leaves every unit done
or not done, so the same command continues. Several processes may share one store.
"""

import contextlib
import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cosmo.engine.base import atomic, json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import KEPT, explained, is_remote
from cosmo.engine.base.folders import prepare_folder

# A partial file that is older is left behind, where there are no locks: parts take minutes.
MAX_WRITE_SECONDS = 24 * 3600
ITEMS_SHOWN = 3  # of a list that differs, such as the lines of a recipe


@dataclasses.dataclass(frozen=True)
class WorkUnits:
    """The units of work behind an output, which is the name in errors.

    `folder` is a hidden folder beside it, as a path of pathlib or etils. It holds the plan, the
    notes of finished units, and files that are being written.
    """

    output: Any
    folder: Any
    plan_name: str = "plan.json"

    @property
    def plan_path(self) -> Any:
        """The file with the plan: the settings of the work, and how it is divided."""
        return self.folder / self.plan_name

    def prepare(self) -> None:
        """Create the folder. Raise UserError if it cannot be written to, before hours of work."""
        prepare_folder(self.folder, setting="output")

    def read_plan(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Return the plan, or None if there is none yet.

        Raises UserError if the plan is damaged, or if its settings are other than `settings`.
        """
        plan = read_json(self.plan_path)
        if plan is not None and settings is not None:
            self.check_settings(plan["settings"], settings)
        return plan

    def check_settings(self, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise UserError that names the first of `settings` that is not as it was `kept`."""
        # Through JSON, as the kept ones went: tuples become lists.
        old, new = _flat(kept), _flat(json.loads(json.dumps(settings)))
        for name in (*new, *old):  # a setting may be missing on either side
            before, now = old.get(name), new.get(name)
            if before == now:
                continue
            if isinstance(before, list) and isinstance(now, list):
                gone = [item for item in before if item not in now]
                added = [item for item in now if item not in before]
                if gone or added:
                    before, now = gone[:ITEMS_SHOWN], added[:ITEMS_SHOWN]
            raise UserError(
                f"{self.output} was begun with {name}={before!r}, this command has {now!r} (see "
                f"{self.plan_path}); give another output, or overwrite it to start anew",
                setting=("output", "overwrite"),
            )

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write the plan, unless another process has begun work of the same settings."""
        if self.read_plan(plan["settings"]) is None:
            # Indented, because errors send people to this file.
            self.write(self.plan_path, json.dumps(plan, indent=1) + "\n")

    @contextlib.contextmanager
    def replacing(self, path: Any) -> Iterator[Any]:
        """Enter `atomic.replacing` with a partial file in the work folder, locked until the end."""
        # A name of its own, because several processes may finish the same unit at once.
        partial = self.folder / f"partial-{uuid.uuid4().hex}"
        with _locked(partial), atomic.replacing(path, partial, KEPT):
            yield partial

    def write(self, path: Any, content: str | bytes) -> None:
        """Write a whole file, or none and UserError."""
        with self.replacing(path) as partial:
            partial.write_bytes(json_lines.encode(content) if isinstance(content, str) else content)

    @contextlib.contextmanager
    def finishing(self, number: int, path: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield (a path, a note): fill both, and unit `number` is done with its result at `path`.

        The note is JSON, readable with `note`.
        """
        note: dict[str, Any] = {}
        with self.replacing(path) as partial:
            yield partial, note
            # The result is put in place after its note, so that a result means that both exist.
            self.write(self._note_path(number), json.dumps(note))

    def note(self, number: int) -> dict[str, Any] | None:
        """Return the note of unit `number`, or None if it has none yet."""
        return read_json(self._note_path(number))

    def _note_path(self, number: int) -> Any:
        return self.folder / f"done-{number:05d}.json"

    def remove_partial_files(self) -> None:
        """Remove what killed processes have left, and no file that another process writes."""
        with explained(self.folder):
            for path in self.folder.glob("partial-*"):
                if _is_left_behind(path):
                    path.unlink(missing_ok=True)

    def remove(self, results: Iterable[Any] = ()) -> None:
        """Remove `results` and the work folder."""
        with explained(self.folder):
            for path in results:
                path.unlink(missing_ok=True)
            if self.folder.exists():
                # The plan goes last: after a kill it still marks the files as ours.
                for path in self.folder.iterdir():
                    if path.name != self.plan_name:
                        path.unlink(missing_ok=True)
                # A path of etils removes a tree itself, one of pathlib does not.
                getattr(self.folder, "rmtree", lambda: shutil.rmtree(self.folder))()


@contextlib.contextmanager
def _locked(path: Any) -> Iterator[None]:
    """Create a local file and hold a shared lock on it, which ends with the process."""
    if is_remote(path):
        yield
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        with explained(path):
            file = stack.enter_context(open(path, "ab", buffering=0))
        with contextlib.suppress(OSError):  # a file system without locks
            # Shared is enough: `_is_left_behind` tries an exclusive lock, which any holder refuses.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _is_left_behind(path: Any) -> bool:
    """Return whether nobody writes a partial file any more: by its lock, else by its age."""
    try:
        if not is_remote(path):
            import fcntl

            with contextlib.suppress(OSError), open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    return False
        changed = path.stat()
        # etils' stat has `mtime`, pathlib's `st_mtime`.
        seconds = time.time() - (getattr(changed, "mtime", None) or changed.st_mtime)
        return seconds > MAX_WRITE_SECONDS
    except FileNotFoundError:
        return False


def read_json(path: Any) -> Any:
    """Return the value in a JSON file, or None if there is no file. Raises UserError."""
    try:
        return json_lines.value(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); overwrite the output", setting="overwrite"
        ) from error


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names: {"a.b": 1} for {"a": {"b": 1}}."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        full: leaf
        for key, inner in value.items()
        for full, leaf in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }
