"""Open a model, compile all that it needs, and serve it until a signal: `python -m cosmo serve`."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import Any

from canary import module
from canary.guard import judging, routes, upstream
from canary.guard.policy import Policy
from canary.guard.settings import GuardConfig
from canary.labeller import Labeller
from canary.prost import agent
from cosmo import dialogue
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.progress import counted
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.infer import any_checkpoint, ctranslate2_model, ctranslate2_scheduler
from cosmo.engine.infer.continuous import Scheduler
from cosmo.engine.web import app, errors, run
from cosmo.serve import api
from cosmo.serve.model import Served
from cosmo.tasks import formatting, vocabularies

log = logging.getLogger("cosmo.serve")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of a server. Times are in seconds.

    `model` and `canary` are checkpoints; `name` is the model's in the API, by default its folder's.
    `max_input_tokens` and `max_tokens` are the longest input and answer, by default the model's
    own; less means fewer programs and less memory. `api_key_env` names the environment variable
    with the key that clients must send. `guard` is for a server with a `canary`. `backend` answers
    for the model (see `any_checkpoint.session_config`); a Canary is always answered by JAX.
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
    backend: str | None = None
    guard: GuardConfig = GuardConfig()

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
        return errors.key_from(self.api_key_env, "api_key_env")


def open_model(config: ServeConfig) -> Served:
    """Return the model to serve. Raises UserError, for a missing vocabulary before any weights."""
    backend = ctranslate2_model.backend_of(config.model, config.backend)
    if backend != "jax":
        _check_ctranslate2(config)
    lengths = {"inputs": config.max_input_tokens, "targets": config.max_tokens}
    how: dict[str, Any] = {
        "lengths": {side: length for side, length in lengths.items() if length is not None},
        "vocabulary": config.vocabulary,
        "dtype": config.dtype,
        "num_partitions": config.num_partitions,
        "batch_size": 1,
        "backend": backend,
    }
    name = config.name or _name_of(config.model)
    found, saved = any_checkpoint.session_config(
        config.model, vocabularies.load, usual_lengths=_usual_lengths, **how
    )
    found = dataclasses.replace(found, ctranslate2_batches=ctranslate2_scheduler.BATCHES)
    if _is_prost(found.vocabulary):
        prost = agent.Settings.of(found, saved).with_session(found.open()[0])
        return Served(name, prost.session, formatting.Separators(), prost, config.beams)
    model = dialogue.opened(found, saved)
    return Served(name, model.session, model.separators, None, config.beams, backend)


def _check_ctranslate2(config: ServeConfig) -> None:
    """Raise UserError for flags that mean nothing to CTranslate2."""
    for name, usual in (("beams", 1), ("num_partitions", 1)):
        if getattr(config, name) != usual:
            raise UserError(
                f"{name}={getattr(config, name)}: a server by CTranslate2 has no such setting; "
                "leave it out, or answer by the backend jax",
                setting=name,
            )


def _is_prost(vocabulary: Vocabulary) -> bool:
    return isinstance(vocabulary, vocabularies.ByteLevelVocabulary)


def _usual_lengths(vocabulary: Vocabulary) -> dict[str, int]:
    return agent.LENGTHS if _is_prost(vocabulary) else dialogue.LENGTHS


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
        how = {"dtype": config.dtype, "num_partitions": config.num_partitions}
        labeller = Labeller(module.Settings.find(config.canary, batch_size=1, **how).open())
        labeller.warm_up(counted(log, "compiling Canary's programs"))
    # Two classes of one interface: JAX's steps are shared, CTranslate2's batches are whole.
    kind = Scheduler if model.backend == "jax" else ctranslate2_scheduler.Scheduler
    scheduler = kind(
        model.session,
        slots=config.slots,
        max_queue=config.max_queue,
        longest_answer=model.longest_answer,
    )
    scheduler.warm_up(counted(log, "compiling the model's programs"))
    if config.beams > 1:
        on_search = counted(log, f"compiling the search with {config.beams} beams")
        for done, asked in enumerate(searches := model.searches(), start=1):
            model.search(asked)
            on_search(done, len(searches))
    log.info("%s is ready after %.1f s", model.name, time.monotonic() - began)
    return api.Service(
        model,
        scheduler,
        labeller=labeller,
        canary_name=_name_of(config.canary) if config.canary else "canary",
        settings=api.Settings(deadline=config.deadline),
    )


def guard_of(rules: Policy, parts: dict[str, Any], service: api.Service) -> routes.Guard:
    """Return a guard in front of the service itself, which needs a Canary.

    `parts` are those of `GuardConfig.parts`.
    """
    assert service.labeller is not None
    judge = judging.Judge(service.labeller, rules, *judging.of_model(service.labeller.canary))
    itself = upstream.AsgiUpstream(api.inner(service))
    return routes.Guard(itself, judge, rules, metrics=service.metrics, **parts)


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; with a Canary, the guarded API stands at /guard/v1.

    Prints the URL once the model answers; until then every answer has status 503. Raises UserError.
    """
    key = config.api_key()
    # All that can be wrong, before the model is loaded.
    rules = config.guard.rules()
    listener = run.listen(config.host, config.port)
    run.warn_if_open(config.host, key)
    try:
        parts = None if config.canary is None else config.guard.parts(rules)
        with run.starting(listener):
            service = open_service(config)
        guard = None if parts is None else guard_of(rules, parts, service)
        made = api.application(
            service,
            api_key=key,
            hosts=app.allowed_hosts(config.host),
            further=guard.routes("/guard/v1") if guard else (),
            around=guard.running if guard else contextlib.nullcontext,
        )
        run.serve(made, listener=listener, on_drain=service.drain, drain_seconds=config.drain)
    finally:
        listener.close()
