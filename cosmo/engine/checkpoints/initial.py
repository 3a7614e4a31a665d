"""Start a new run from a checkpoint of any format.

Training imports only `run_checkpoints.StartingPoint`. The gin file binds InitialCheckpoint, so that
the training loop depends on no other system's format.
"""

import dataclasses
import logging
from typing import Any

from cosmo.engine.checkpoints import any_format, run_checkpoints
from cosmo.engine.checkpoints.run_checkpoints import Start, StartingPoint
from cosmo.engine.model.step import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class InitialCheckpoint(StartingPoint):
    """A run's MODEL_DIR or one of its checkpoints, a T5X checkpoint, or a HuggingFace folder.

    Training takes its parameters and its step, and its optimizer state if
    `restore_optimizer_state`. Without a `path` a run starts from fresh parameters.
    """

    path: str | None = None
    restore_optimizer_state: bool = False

    def step(self) -> int:
        """Return the checkpoint's step, 0 without a path. Raises UserError if there is none."""
        # As in T5X, TRAIN_STEPS counts these steps too: Cosmo-3B's 1,210,000 are 1,100,000 of the
        # LM-adapted T5 and 110,000 of its own.
        return any_format.locate(self.path).step if self.path else 0

    def read(
        self, abstract: TrainState, shardings: TrainState, description: dict[str, Any]
    ) -> Start | None:
        """Return the checkpoint's arrays on the devices, None without a path.

        `abstract` has the shapes of this run's state. The optimizer's state is None unless asked
        for. Raises UserError if the checkpoint cannot be read or is of another model, optimizer or
        vocabulary than `abstract` and `description`.
        """
        if not self.path:
            return None
        if self.restore_optimizer_state:
            return self._read_with_optimizer(abstract, shardings, description)
        # Unlike in T5X, the optimizer starts anew unless its state is asked for.
        step, params = any_format.restore_params(
            self.path, abstract.params, shardings.params, description
        )
        log.info("starting from %s, step %d, with a fresh optimizer state", self.path, step)
        # HuggingFace stores no step. Its user would otherwise set TRAIN_STEPS as for T5X's models.
        if step == 0:
            log.info("its steps count from 0: TRAIN_STEPS is what this run trains, and no more")
        return Start(step, params, None)

    def _read_with_optimizer(self, abstract, shardings, description) -> Start:
        folder, step, format = any_format.locate(self.path)
        log.info("starting from %s, step %d, with its optimizer state", self.path, step)
        # One reading of the whole state, as a run that resumes does it.
        if format == "cosmo":
            wanted = run_checkpoints.abstract_like(abstract, shardings)
            with run_checkpoints.manager(folder, read_only=True) as source:
                state = run_checkpoints.restore_state(source, step, wanted, description)
            return Start(step, state.params, state.opt_state)
        # First the part that a HuggingFace folder has not.
        opt_state = any_format.restore_adafactor(
            self.path, abstract.params, abstract.opt_state, shardings.opt_state, description
        )
        _, params = any_format.restore_params(
            self.path, abstract.params, shardings.params, description
        )
        return Start(step, params, opt_state)
