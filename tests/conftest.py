"""Settings of all tests: the processor, a compiler that is fast, one compilation cache."""

import fcntl
import gc
import importlib.metadata
import os
import pathlib

import pytest

from tests import warm_process

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Tracing a network makes millions of objects that stay: collecting garbage as often as Python does
# by default takes an eighth of the tests' time.
gc.set_threshold(*warm_process.THRESHOLDS)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# One cache for all tests, worker processes and commands that they start.
cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "cosmo-jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


# For jax.jit(..., compiler_options=...): a test of reference numbers compiles as users do.
DEFAULT_COMPILATION = {"xla_backend_optimization_level": 3}


def fast_compilation() -> list[str]:
    """Return XLA's flags for tests: tiny networks spend their time in the compiler.

    Without LLVM's optimisation and fusion emitters it needs a third of it; the mathematics stays.
    """
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib") < "0.11":  # XLA refuses a flag that it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
        DEFAULT_COMPILATION["xla_cpu_use_fusion_emitters"] = True
    return flags


given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [given, *(flag for flag in fast_compilation() if flag.split("=")[0] not in given)]
).strip()


# The files that take longest, in order. Begun first, they leave no core idle at the end: the tests
# of one file stay in one process, which shares their fixtures.
SLOWEST_FILES = (
    "test_cosmo_cli",
    "test_engine_step",
    "test_cosmo_cache",
    "test_engine_partitioning",
    "test_engine_continuous",
    "test_serve_page",
    "test_run",
    "test_engine_golden",
    "test_engine_t5",
    "test_engine_optimizer",
    "test_engine_integrity",
    "test_engine_decoding_limits",
    "test_engine_decoding",
    "test_interop_t5x",
    "test_engine_blenderbot",
    "test_gin_t5x",
    "test_serve",
    "test_tasks_mixtures",
    "test_interop_blenderbot",
    "test_prost",
    "test_interop_classes",
    "test_engine_packing",
    "test_cosmo_convert",
    "test_annotation_serve",
    "test_canary_cli",
    "test_labeller",
    "test_cold_starts",
    "test_wheel",
)


# One worker process runs all of these: loading TensorFlow takes 10 s of a core.
SEQIO_FILES = (
    "test_engine_cache",
    "test_tasks_beam",
    "test_tasks_cache",
    "test_tasks_canary",
    "test_tasks_mixtures",
    "test_tasks_prost_seqio",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Return the scheduler of `--dist loadfile` that takes SEQIO_FILES for one file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "seqio" if pathlib.PurePath(file).stem in SEQIO_FILES else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of worker processes for `-n auto`: one more than there are cores.

    Two workers on two cores used 83% of them: tests wait for disks, sockets and other processes.
    A worker and its processes take up to 3 GB, so a small memory has fewer.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has not
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores + 1, int(gigabytes / 3)))


def thorough_tests() -> set[str]:
    """Return the files, functions and cases of tests that `make test` leaves out."""
    lines = (ROOT / "tests" / "thorough.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


@pytest.hookimpl(tryfirst=True)  # before pytest drops the tests that -m excludes
def pytest_collection_modifyitems(items):
    """Mark the tests of thorough.txt. Sort by file: SLOWEST_FILES first, others as they were."""
    thorough = thorough_tests()
    for item in items:
        function, file = item.nodeid.partition("[")[0], item.nodeid.partition("::")[0]
        if thorough & {item.nodeid, function, file}:
            item.add_marker(pytest.mark.thorough)
    order = {name: number for number, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: compressed ones differ by the time, and workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """Run every test from the repository's root, as commands are."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)`: a folder that `make(folder)` fills once for all worker processes.

    Tests only read it, since those of another process read it too.
    """

    def folder(name, make) -> pathlib.Path:
        base = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder lies in that of its session
            base = base.parent
        with (base / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = base / name
            if not (base / f"{name}.made").exists():
                made.mkdir()
                make(made)
                (base / f"{name}.made").touch()
        return made

    return folder


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Return the folder of real rows and reference numbers beside the repository, or skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared, which a user's clone does not have")
    return folder
