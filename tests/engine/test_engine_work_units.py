"""The store of resumable work units: what is done, what is refused, what is removed.

The kill tests of its two users, test_engine_jobs.py and test_engine_cache.py, stop it at every
write.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.work_units import MAX_WRITE_SECONDS, WorkUnits


@pytest.fixture(params=["pathlib", "etils"])
def units(request, tmp_path):
    """A store that is prepared, of either kind of path."""
    folder = tmp_path if request.param == "pathlib" else epath.Path(tmp_path)
    found = WorkUnits("OUT", folder / ".work")
    found.prepare()
    return found


def test_a_unit_is_done_when_its_result_and_its_note_are_there(units, tmp_path):
    """Property: both or nothing, whatever goes wrong in between; no partial file stays."""
    result = units.folder.parent / "result"

    def fail():
        with units.finishing(3, result) as (partial, note):
            partial.write_text("half")
            note["rows"] = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert units.note(3) is None and not result.exists()
    with units.finishing(3, result) as (partial, note):
        partial.write_text("whole")
        note["rows"] = 7
        assert not result.exists()
    assert units.note(3) == {"rows": 7} and result.read_text() == "whole"
    assert [path.name for path in (tmp_path / ".work").iterdir()] == ["done-00003.json"]


@pytest.mark.parametrize(
    ("kept", "given", "said"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "begun with a.b=1, this command has 2"),
        ({"a": 1}, {"a": 1, "new": "x"}, "begun with new=None, this command has 'x'"),
        ({"a": 1, "old": 3}, {"a": 1}, "begun with old=3, this command has None"),
        (
            {"a": list("abcd")},
            {"a": list("aecd")},
            r"begun with a=\['b'\], this command has \['e'\]",
        ),
        ({"a": [1, 2]}, {"a": [2, 1]}, r"begun with a=\[1, 2\], this command has \[2, 1\]"),
    ],
)
def test_other_settings_are_refused(units, kept, given, said):
    """Oracle: by hand. The first setting that differs, both values, and the remedy."""
    units.begin({"settings": kept})
    units.begin({"settings": kept})
    with pytest.raises(UserError, match=f"OUT was {said}") as caught:
        units.read_plan(given)
    assert caught.value.settings == ("output", "overwrite")
    with pytest.raises(UserError, match=said):
        units.begin({"settings": given})
    assert units.read_plan(kept) == {"settings": kept}


def test_tuples_are_what_json_makes_of_them(units):
    """Property: settings that were not changed are accepted after their way through JSON."""
    settings = {"a": (1, 2), "b": {"c": ()}}
    units.begin({"settings": settings})
    assert units.read_plan(settings) == json.loads(json.dumps({"settings": settings}))


def test_removing_leaves_what_is_not_ours(units, tmp_path):
    """Oracle: the files that stay."""
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "result").write_text("")
    units.begin({"settings": {}})
    units.remove([units.folder.parent / "result", units.folder.parent / "never-written"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_a_damaged_plan_names_the_remedy(units):
    """Oracle: the file's name and the setting."""
    units.plan_path.write_text('{"sett')
    with pytest.raises(UserError, match=r"plan.json is damaged") as caught:
        units.read_plan()
    assert caught.value.settings == ("overwrite",)


WRITER = """
import pathlib, sys, time
from cosmo.engine.base.work_units import WorkUnits
units = WorkUnits("OUT", pathlib.Path(sys.argv[1]))
with units.replacing(units.folder.parent / "result") as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_only_files_that_nobody_writes_any_more_are_removed(units, tmp_path):
    """Oracle: a writer that lives keeps its file; the same writer after a kill does not."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(units.folder)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "writing\n"
        (units.folder / "partial-older").write_text("of a process that was killed")
        with units.replacing(tmp_path / "mine") as mine:
            units.remove_partial_files()
            names = {path.name for path in units.folder.glob("partial-*")}
            assert len(names) == 2 and mine.name in names and "partial-older" not in names
            mine.write_text("whole")
        writer.kill()
    units.remove_partial_files()
    assert not list(units.folder.iterdir()) and not (tmp_path / "result").exists()
    assert (tmp_path / "mine").read_text() == "whole"


def test_age_decides_where_there_are_no_locks(units, monkeypatch):
    """Oracle: by hand, with a lock that the file system refuses."""
    import fcntl

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name, age in (("partial-young", 0), ("partial-old", MAX_WRITE_SECONDS + 60)):
        (units.folder / name).write_text("")
        os.utime(units.folder / name, (time.time() - age, time.time() - age))
    units.remove_partial_files()
    assert [path.name for path in units.folder.iterdir()] == ["partial-young"]
