"""Trackers beside metrics.jsonl. Oracle: stand-ins with the functions that both packages have."""

import importlib.machinery
import math
import sys
import types

import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.train.metric_files import MetricWriter
from cosmo.engine.train.trackers import TrackerConfig


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    """A stand-in module: it keeps the arguments of `init`, and what the run logs."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.started, module.logged, module.finished = [], [], 0

    class Run:
        def log(self, metrics, step):
            module.logged.append((step, metrics))

        def finish(self):
            module.finished += 1

    def init(**given):
        module.started.append(given)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_tracker_gets_the_metrics_of_the_file(package, tmp_path):
    """Oracle: the lines of metrics.jsonl by hand; what is not finite is left out."""
    tracker = TrackerConfig(package.__name__, "p").open(str(tmp_path), {"BATCH_SIZE": 8})
    writer = MetricWriter(str(tmp_path), tracker=tracker)
    writer.write(1, {"train/loss": 2.5, "train/norm": math.nan})
    writer.write(2, {"train/loss": 2.0})
    writer.close()
    writer.close()
    assert package.logged == [(1, {"train/loss": 2.5}), (2, {"train/loss": 2.0})]
    assert package.finished == 1
    (given,) = package.started
    assert given["project"] == "p" and given["config"] == {"BATCH_SIZE": 8}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_every_start_continues_the_same_run(package, tmp_path):
    """Oracle: both starts have one name; another folder has another."""
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        TrackerConfig(package.__name__).open(str(folder), {})
    first, second, other = (given["name"] for given in package.started)
    assert first == second and first.startswith("a-") and other.startswith("b-")
    assert {given["resume"] for given in package.started} == {"allow"}


def test_a_tracker_that_does_not_start_is_one_error(package, tmp_path):
    """Oracle: the reason of the package, and a remedy, in a UserError of the macro."""

    def init(**given):
        raise RuntimeError("api_key not configured")

    package.init = init
    with pytest.raises(UserError, match=r"did not start \(api_key not .*give None") as error:
        TrackerConfig(package.__name__).open(str(tmp_path), {})
    assert error.value.settings == ("TRACKER",)


def test_no_tracker_is_the_default(tmp_path):
    """Oracle: no file is written, nothing is imported."""
    TrackerConfig().check()
    assert TrackerConfig().open(str(tmp_path), {}) is None
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_or_missing_tracker_is_refused(monkeypatch):
    """Oracle: the names of both packages; the command that installs one."""
    with pytest.raises(UserError, match="'mlflow' is unknown; give 'wandb', 'trackio' or None"):
        TrackerConfig("mlflow").check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cosmo-dialogue\[wandb\]'"):
        TrackerConfig("wandb").check()
