"""Send a run's metrics to Weights & Biases or Trackio too: TRACKER='wandb' or 'trackio'."""

import dataclasses
import importlib
import importlib.util
import logging
import math
import uuid
from typing import Any

from etils import epath

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote

log = logging.getLogger(__name__)

PACKAGES = ("wandb", "trackio")
TRACKER_ID = "tracker_id"  # a file in MODEL_DIR: every start of a run continues one curve


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """The `name` of a tracker, None for none, and the `project` that shows the run."""

    name: str | None = None
    project: str = "cosmo"

    def check(self) -> None:
        """Raise UserError for an unknown tracker, or one that is not installed."""
        if self.name is None:
            return
        if self.name not in PACKAGES:
            known = ", ".join(map(repr, PACKAGES))
            raise UserError(f"{self.name!r} is unknown; give {known} or None", setting="TRACKER")
        if importlib.util.find_spec(self.name) is None:
            remedy = f"pip install 'cosmo-dialogue[{self.name}]', or give None"
            raise UserError(
                f"the package {self.name} is not installed: {remedy}", setting="TRACKER"
            )

    def open(self, model_dir: str, settings: dict[str, Any]) -> "Tracker | None":
        """Return the tracker of a run, which shows `settings`; None if there is none."""
        if self.name is None:
            return None
        self.check()
        return Tracker(self.name, self.project, model_dir, settings)


class Tracker:
    """A run of Weights & Biases or Trackio, whose functions have the same names."""

    def __init__(self, package: str, project: str, model_dir: str, settings: dict[str, Any]):
        library = importlib.import_module(package)
        folder = epath.Path(model_dir)
        name = f"{folder.name}-{_identity(folder)}"
        given: dict[str, Any] = {"project": project, "name": name, "config": settings}
        if package == "wandb":
            given["id"] = name
            if not is_remote(model_dir):
                given["dir"] = model_dir
        try:
            self._run = library.init(**given, resume="allow")
        # The errors of two libraries, of the network and of a missing login have no common class.
        except Exception as error:
            remedy = "give None to train without it"
            if package == "wandb":
                remedy = f"run `wandb login`, or set WANDB_MODE=offline, or {remedy}"
            problem = f"{package} did not start ({error})"
            raise UserError(f"{problem}: {remedy}", setting="TRACKER") from error
        log.info("metrics go to %s too: project %s, run %s", package, project, name)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step; values that are not finite are left out."""
        self._run.log({k: float(v) for k, v in metrics.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def _identity(folder: epath.Path) -> str:
    """Return the run's part of its name at the tracker, made at the first start."""
    # Not run_id: a run has none before its first checkpoint.
    path = folder / TRACKER_ID
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()
