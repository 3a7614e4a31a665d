"""SeqIO, imported when it is first needed and not before, and its errors put plainly."""

import contextlib
import os
import re
import sys
import tempfile
import threading

from cosmo.engine.base.errors import UserError


def import_seqio():
    """SeqIO, with TensorFlow kept off the accelerators (JAX needs all of their memory)."""
    if "seqio" not in sys.modules:
        with _without_device_notes():
            try:
                import seqio
                import tensorflow as tf
            except ImportError as error:
                raise UserError(
                    f"reading a SeqIO task needs the extra `seqio` ({error}): "
                    "pip install -e '.[seqio]'"
                ) from error
            tf.config.set_visible_devices([], "GPU")
            tf.constant(0)  # starts its runtime, and what that has to say
    import seqio

    return seqio


# Held while descriptor 2 is set aside: whoever must be heard waits for it.
STDERR_HELD = threading.Lock()


@contextlib.contextmanager
def _without_device_notes():
    """Holds back what TensorFlow's C++ prints on loading about GPUs and oneDNN; all else passes.

    It writes to file descriptor 2 before any log level applies, so the descriptor is set aside.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with STDERR_HELD, tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if not _DEVICE_NOTE.search(line):
                    sys.stderr.write(line)


# TensorFlow's own lines only: another thread may be writing in the meantime.
_DEVICE_NOTE = re.compile(
    r"^WARNING: All log messages before absl::InitializeLog"
    r"|^[IWE]\d{4} .*(oneDNN|cuda|cuInit|TensorRT|cpu_feature_guard)"
)


class plain_errors:  # noqa: N801
    """Turns TensorFlow's report of an error in a Python reader back into that error's one line."""

    _SOURCE = re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception)): (.+?)(?:\nTraceback|\n\n|$)", re.S)

    def __init__(self, name: str, split: str):
        self.what = f"{name!r}, split {split!r}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, UserError | GeneratorExit):
            return False
        if isinstance(error, AssertionError) and "task cache directories" in str(error):
            raise UserError(
                f"reading {self.what}: {error} Write it with seqio_cache_tasks and name its folder "
                "(see WORKSPACE.md), or leave out --gin.USE_CACHED_TASKS"
            ) from error
        if type(error).__module__.startswith("tensorflow"):
            found = self._SOURCE.search(getattr(error, "message", str(error)))
            if found:
                raise UserError(f"reading {self.what}: {found.group(2).strip()}") from error
        return False
