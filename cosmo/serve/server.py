"""Open a model, compile all that it needs, and serve it until a signal: `python -m cosmo serve`."""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute

from canary import module
from canary.prost import agent
from cosmo import dialogue
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import any_checkpoint
from cosmo.engine.infer.continuous import Scheduler
from cosmo.engine.web import app, run
from cosmo.serve import api
from cosmo.serve.model import Asked, Served
from cosmo.tasks import formatting, vocabularies

log = logging.getLogger("cosmo.serve")

PROGRESS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of a server. Times are in seconds.

    `model` and `canary` are checkpoints; `name` is the model's in the API, by default its folder's.
    `max_input_tokens` and `max_tokens` are the longest input and answer, by default the model's
    own; less means fewer programs and less memory. `api_key_env` names the environment variable
    with the key that clients must send.
    """

    model: str
    canary: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    slots: int = 32
    max_queue: int = 256
    deadline: float = 120.0
    drain: float = run.DRAIN_SECONDS
    beams: int = 1
    max_input_tokens: int | None = None
    max_tokens: int | None = None
    vocabulary: str | None = None
    dtype: str | None = None
    num_partitions: int = 1

    def __post_init__(self):
        for name in ("max_input_tokens", "max_tokens", "slots", "max_queue"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}; it must be at least 1", setting=name)
        for name in ("deadline", "drain"):
            # NaN is not above 0 either.
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}; it must be above 0", setting=name)
        if self.beams < 1:
            raise UserError(f"beams={self.beams}; it must be at least 1", setting="beams")

    def api_key(self) -> str | None:
        """Return the key that clients must send; None if they need none. Raises UserError."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"the environment variable {self.api_key_env} is empty or not set: it must hold "
                "the key that clients send",
                setting="api_key_env",
            )
        return key


def open_model(config: ServeConfig) -> Served:
    """Return the model to serve. Raises UserError, for a missing vocabulary before any weights."""
    lengths = {"inputs": config.max_input_tokens, "targets": config.max_tokens}
    how: dict[str, Any] = {
        "lengths": {side: length for side, length in lengths.items() if length is not None},
        "vocabulary": config.vocabulary,
        "dtype": config.dtype,
        "num_partitions": config.num_partitions,
        "batch_size": 1,
    }
    name = config.name or _name_of(config.model)
    found, _ = any_checkpoint.session_config(
        config.model, vocabularies.load, usual_lengths=dialogue.LENGTHS, **how
    )
    if isinstance(found.vocabulary, vocabularies.ByteLevelVocabulary):
        prost = agent.Prost.load(config.model, **how)
        return Served(name, prost.session, formatting.Separators(), prost, config.beams)
    model = dialogue.load(config.model, **how)
    return Served(name, model.session, model.separators, None, config.beams)


def _name_of(path: str) -> str:
    """Return the last part of a checkpoint's path that names it: a step or "best" does not."""
    parts = [part for part in str(path).rstrip("/").split("/") if part]
    while len(parts) > 1 and (parts[-1].isdigit() or parts[-1] in ("checkpoints", "best")):
        parts.pop()
    return pathlib.PurePosixPath(parts[-1]).name if parts else "model"


def open_service(config: ServeConfig) -> api.Service:
    """Return a service whose programs are compiled. Raises UserError."""
    began = time.monotonic()
    model = open_model(config)
    labeller = None
    if config.canary is not None:
        from canary.labeller import Labeller

        how = {"dtype": config.dtype, "num_partitions": config.num_partitions}
        labeller = Labeller(module.Settings.find(config.canary, batch_size=8, **how).open())
        labeller.warm_up(_progress("Canary's"))
    scheduler = Scheduler(
        model.session,
        slots=config.slots,
        max_queue=config.max_queue,
        longest_answer=model.longest_answer,
    )
    scheduler.warm_up(_progress("the model's"))
    if config.beams > 1:
        log.info("compiling the search with %d beams", config.beams)
        model.search(Asked((model.session.vocabulary.eos_id,)))
    log.info("%s is ready after %.1f s", model.name, time.monotonic() - began)
    return api.Service(
        model,
        scheduler,
        labeller=labeller,
        canary_name=_name_of(config.canary) if config.canary else "canary",
        settings=api.Settings(deadline=config.deadline),
    )


def _progress(whose: str) -> Callable[[int, int], None]:
    latest = -PROGRESS_SECONDS

    def note(done: int, total: int) -> None:
        nonlocal latest
        if done == total or time.monotonic() - latest >= PROGRESS_SECONDS:
            latest = time.monotonic()
            log.info("compiling %s programs: %d of %d", whose, done, total)

    return note


def serve(
    config: ServeConfig, further: Callable[[api.Service], Sequence[BaseRoute]] = lambda service: ()
) -> None:
    """Serve until SIGTERM or SIGINT. `further` makes routes that stand beside the service's own.

    Prints the URL once the model answers; until then every answer has status 503. Raises UserError.
    """
    key = config.api_key()
    listener = run.listen(config.host, config.port)
    run.warn_if_open(config.host, key)
    try:
        with run.starting(listener):
            service = open_service(config)
        made = api.application(
            service,
            api_key=key,
            hosts=app.allowed_hosts(config.host),
            further=further(service),
        )
        run.serve(made, listener=listener, on_drain=service.drain, drain_seconds=config.drain)
    finally:
        listener.close()
