"""Write checksums of a checkpoint's files before it counts as finished; compare them before use.

Neither TensorStore nor a file system notices every flipped bit. A checkpoint's folder therefore
holds a manifest of each process that wrote it: {"processes": N, "files": {path: [bytes, crc32]},
"step": S, "run": ID}. CRC-32 finds all damage of up to 32 bits in a row, and of other damage misses
one in 4 billion. Step and run show whether a checkpoint was renamed or comes from another run.
"""

import concurrent.futures
import json
import logging
import os
import zlib
from collections.abc import Iterable

from etils import epath

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError

log = logging.getLogger(__name__)

# Written by each process for its own files, before Orbax's rename: a checkpoint has all of them, or
# does not count as finished.
MANIFEST = "checksums.{}.json"  # of process {}
RUN_ID = "run_id"  # a file beside `checkpoints/`: the run that the checkpoints belong to
PARTIAL = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not finished
PIECE_BYTES = 8 * 2**20  # read at once, in each of THREADS
THREADS = min(16, 2 * (os.cpu_count() or 1))


def checksum(path: epath.PathLike) -> tuple[int, int]:
    """Return (bytes, CRC-32) of a file, read in pieces. Raises OSError."""
    # CRC-32, because it is fast and the standard library has it: 1.5 GiB/s on 2 shared cores.
    size = crc = 0
    with epath.Path(path).open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            size += len(piece)
            crc = zlib.crc32(piece, crc)  # releases Python's lock, so threads share the work
    return size, crc


def write_manifest(
    folder: epath.PathLike,
    step: int,
    run: str | None = None,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write the manifest of the files in the `folder` of a checkpoint of `step` and `run`.

    It lists the files that `process` wrote: those below a folder *.process_I are process I's, all
    others are the first's. Raises OSError or UserError if files cannot be read or the manifest
    cannot be written.
    """
    folder = epath.Path(folder)
    names = [n for n in _files(folder) if _owner(n, processes) == process]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: checksum(folder / name), names)
        # Other processes come here while the folders of items still have Orbax's temporary names.
        files = dict(zip((n.replace(PARTIAL, "") for n in names), sums, strict=True))
    # Only what is on the disk may be renamed to a checkpoint, for which older ones are deleted.
    durable.sync_tree(folder)
    text = json.dumps({"processes": processes, "step": step, "run": run, "files": files})
    write_atomic(folder / MANIFEST.format(process), text)


def find_damage(folder: epath.PathLike, part: int = 0, parts: int = 1) -> str | None:
    """Return the first damage found in the checkpoint in `folder`, or None.

    Reads part `part` of `parts` of the files. A checkpoint under another step's name or among those
    of another run counts as damaged: training from it would repeat or leave out steps. A checkpoint
    without any manifest (of an older version, or copied without it) has no known damage; see
    `has_manifest`.
    """
    folder = epath.Path(folder).resolve()
    if not has_manifest(folder):
        return None
    expected: dict[str, tuple[int, int]] = {}
    here = read_run_id(folder.parent.parent)
    process, processes = 0, 1
    while process < processes:
        name = MANIFEST.format(process)
        try:
            manifest = json.loads((folder / name).read_text())
            processes = int(manifest["processes"])
            expected |= {n: (int(size), int(crc)) for n, (size, crc) in manifest["files"].items()}
            # Manifests of older versions have neither.
            step, run = manifest.get("step"), manifest.get("run")
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return f"{name} is no manifest of ours: it is damaged"
        if step is not None and folder.name.isdigit() and int(folder.name) != step:
            return f"it is the checkpoint of step {step} under another step's name"
        if run is not None and here is not None and run != here:
            return f"it belongs to another run: to {run}, and this run is {here}"
        process += 1
    # By size: the largest files take longest, so the parts share them first.
    names = sorted(expected, key=lambda name: (-expected[name][0], name))[part::parts]
    size = sum(expected[name][0] for name in names)
    if size > 2**30:
        log.info("comparing checksums of %s, %.1f GiB", folder, size / 2**30)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda name: _difference(folder, name, *expected[name]), names):
            if found:
                pool.shutdown(wait=False, cancel_futures=True)
                return found
    return None


def read_run_id(model_dir: epath.PathLike) -> str | None:
    """Return the identity of the run in `model_dir`, None if it has none."""
    try:
        return (epath.Path(model_dir) / RUN_ID).read_text().strip() or None
    except OSError:
        return None


def run_of(folder: epath.PathLike) -> str | None:
    """Return the run that the checkpoint in `folder` belongs to, None if it names none."""
    return _first_manifest(folder).get("run")


def step_of(folder: epath.PathLike) -> int | None:
    """Return the step that the checkpoint in `folder` was saved at, None if it names none."""
    step = _first_manifest(folder).get("step")
    return step if isinstance(step, int) and step >= 0 else None


def _first_manifest(folder: epath.PathLike) -> dict[str, object]:
    """Return the first process's manifest, empty if it cannot be read."""
    try:
        manifest = json.loads((epath.Path(folder) / MANIFEST.format(0)).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def has_manifest(folder: epath.PathLike) -> bool:
    """Return whether any process's manifest is in `folder`."""
    return any(p.name.startswith("checksums.") for p in epath.Path(folder).iterdir())


def _difference(folder: epath.Path, name: str, size: int, crc: int) -> str | None:
    path = folder / name
    try:
        length = path.stat().length
        if length != size:
            return f"{name} has {length} bytes, {size} were written"
        if checksum(path)[1] != crc:
            return f"{name} has another checksum than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError:  # half a character, or a null byte
        return f"{name!r} is no name of a file: its manifest is damaged"
    return None


def _unreadable(path: epath.Path, error: OSError) -> UserError:
    # Not damage: a network file system that fails for a moment must not cost a checkpoint.
    return UserError(f"{path} cannot be read now: {error.strerror or error}; try again")


def _files(folder: epath.Path) -> Iterable[str]:
    """Return paths of all files below `folder`, sorted, without manifests and unfinished files."""
    found, todo = [], [""]
    while todo:
        below = todo.pop()
        for path in (folder / below).iterdir():
            name = f"{below}/{path.name}".lstrip("/")
            if path.is_dir():
                todo.append(name)
            # Orbax rewrites _CHECKPOINT_METADATA after the rename, with the time.
            elif not path.name.startswith(("checksums.", ".", "_CHECKPOINT_METADATA")):
                found.append(name)
    return sorted(found)


def _owner(name: str, processes: int) -> int:
    """Return the process that wrote the file `name`."""
    for part in name.split("/")[:-1]:
        stem, _, number = part.rpartition(".process_")
        if stem and number.isdigit() and int(number) < processes:
            return int(number)
    return 0
