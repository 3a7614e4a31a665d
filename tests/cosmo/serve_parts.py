"""A tiny model for the server's tests, and a scheduler that plays a script."""

import pathlib
import threading
import time
import types

from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.infer.continuous import Finished, QueueFull, Token
from cosmo.engine.model import models
from cosmo.serve.model import Served
from cosmo.tasks import formatting, vocabularies
from tests.tiny_models import save, t5_1_1

VOCABULARY = "tasks/sample/vocabulary.model"


def write_model(folder: pathlib.Path, vocabulary: bool = True) -> pathlib.Path:
    """Save a T5 of random weights as a run."""
    if vocabulary:
        run_checkpoints.copy_vocabulary(str(folder), VOCABULARY)
    known = vocabularies.load(VOCABULARY)
    model = models.EncoderDecoderModel(t5_1_1(known.size))
    save(folder, model, known if vocabulary else None)
    (folder / "config.gin").write_text("TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 24}\n")
    return folder


def scripted_model(name: str = "scripted") -> Served:
    """A model without weights: what the server reads of one."""
    network = types.SimpleNamespace(max_positions=None)
    session = types.SimpleNamespace(
        vocabulary=vocabularies.load(VOCABULARY),
        lengths={"inputs": 64, "targets": 24},
        model=types.SimpleNamespace(network=network),
    )
    return Served(name, session, formatting.Separators())


class Handle:
    def __init__(self, script, count):
        self.script, self.open = script, set(range(count))

    def cancel(self, number=None):
        with self.script.lock:
            gone = self.open if number is None else self.open & {number}
            self.script.active -= len(gone)
            self.open = self.open - gone


class ScriptedScheduler:
    """Answers every input with `text`, a token each `seconds`; from then on as `mode` says.

    `mode`: "stop" ends the answer, "hang" never does, "error" fails it.
    """

    def __init__(self, text="Hello there, my friend.", seconds=0.0, mode="stop", slots=4):
        self.text, self.seconds, self.mode, self.slots = text, seconds, mode, slots
        self.vocabulary = vocabularies.load(VOCABULARY)
        self.lock = threading.Lock()
        self.active = 0
        self.full = False
        self.seen = []
        self.compilations = 0
        self.closed = []

    @property
    def counts(self):
        names = ("active", "queued", "steps", "encoder_batches")
        return types.SimpleNamespace(**dict.fromkeys(names, 0) | {"active": self.active})

    def submit(self, input_ids, samplings, on_event):
        if self.full:
            raise QueueFull("3 requests wait; at most 3 may")
        self.seen.append((tuple(input_ids), list(samplings)))
        with self.lock:
            self.active += len(samplings)
        handle = Handle(self, len(samplings))
        arguments = (handle, samplings, on_event)
        threading.Thread(target=self._play, args=arguments, daemon=True).start()
        return handle

    def _play(self, handle, samplings, on_event):
        ids = [*self.vocabulary.encode(self.text), self.vocabulary.eos_id]
        ids = ids[:-1] if self.mode != "stop" else ids
        most = samplings[0].max_new_tokens
        for place, id in enumerate(ids[:most]):
            time.sleep(self.seconds)
            for number in sorted(handle.open):
                top = ((id, -0.5), (5, -1.5), (6, -2.5))[: samplings[number].top_logprobs]
                on_event(number, Token(id, -0.5 - place, top))
        if self.mode == "hang":
            return
        reason = "length" if len(ids) > most else "stop"
        for number in sorted(handle.open):
            failed = self.mode == "error"
            on_event(number, Finished("error", "secret") if failed else Finished(reason))
        handle.cancel()

    def close(self, drain):
        self.closed.append(drain)
