"""The lock of an output folder where the file system refuses: one line, no traceback.

Oracle: the kernel's own error (a folder in the lock's place, /dev/full, a full tmpfs), and the
words by hand.
"""

import os
import subprocess

import pytest

from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import only_writer, prepare_folder


def test_a_lock_that_cannot_be_opened(tmp_path):
    """Oracle: a folder stands where the lock should."""
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=r"cannot write .*\.lock: Is a directory") as caught,
        only_writer(tmp_path),
    ):
        pass
    assert caught.value.settings == ("MODEL_DIR",)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_lock_that_cannot_be_written(tmp_path):
    """Oracle: /dev/full, which refuses to be cut and written."""
    (tmp_path / ".lock").symlink_to("/dev/full")
    said = r"cannot write .*\.lock: .*free some space"
    with pytest.raises(UserError, match=said), only_writer(tmp_path):
        pass


def test_an_error_of_the_work_is_not_one_of_the_lock(tmp_path):
    """Property: the block's own OSError comes through, and the lock is free again."""
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="mine"), only_writer(tmp_path):
            raise FileNotFoundError("mine")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=1m", "size=1m,ro"])
def test_a_full_or_read_only_file_system(tmp_path, capsys, options):
    """Oracle: a tmpfs, filled to the end or mounted read-only. Needs root."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount")
    try:
        if "ro" not in options:
            (tmp_path / "run").mkdir()
            with pytest.raises(OSError, match="No space"):
                (tmp_path / "fill").write_bytes(bytes(2 << 20))

        def begin():
            with only_writer(prepare_folder(str(tmp_path / "run"))):
                return 0

        assert guarded(begin) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert ("Read-only" if "ro" in options else "No space left") in line
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
