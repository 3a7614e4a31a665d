"""Answer a file of dialogues of any size: the job of `python -m canary.prost infer`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from canary import module, reading
from canary.prost.agent import Prost, Reply, Settings
from cosmo.engine.infer import bulk, infer


@dataclasses.dataclass(frozen=True)
class ReplyJob:
    """A `bulk.BulkRun`: Prost's reply to each dialogue of a file, with Canary's RoTs if given."""

    prost: Settings
    canary: module.Settings | None
    decoding: Mapping[str, Any]
    seed: int = 0

    @property
    def session(self) -> infer.SessionConfig:
        """Return the settings of Prost's session."""
        return self.prost.session

    def settings(self) -> dict[str, Any]:
        """Return what the replies depend on beside session, input and shards, as JSON values."""
        return {
            # In the manifest, so that no run continues an output of another kind of answers.
            "what": "replies",
            "variant": self.prost.variant,
            "decoding": {**self.prost.generation, **self.decoding},
            "seed": self.seed,
            "canary": None if self.canary is None else self._canary(),
        }

    def _canary(self) -> dict[str, Any]:
        found = self.canary
        return {
            "checkpoint": bulk.checkpoint_identity(found.session.checkpoint_path),
            "style": found.style,
            "separator": found.separator,
        }

    def answerer(self, session: infer.Session) -> bulk.Answerer:
        """Return the function from dialogues to lines, one for each dialogue."""
        canary = None if self.canary is None else self.canary.open()
        prost = self.prost.with_session(session, canary)
        warn = reading.equal_ids_warner()

        def lines(dialogues, on_batch):
            # A part whose records were all rejected: `reply` refuses an empty batch.
            if not dialogues:
                return []
            warn(dialogues)
            turns = [dialogue.turns for dialogue in dialogues]
            replies = prost.reply(turns, seed=self.seed, on_batch=on_batch, **self.decoding)
            return [
                {"id": dialogue.id, **line(reply), "num_turns": len(dialogue.turns)}
                for dialogue, reply in zip(dialogues, replies, strict=True)
            ]

        return lines


def line(reply: Reply) -> dict[str, Any]:
    """Return a reply as JSON values: {reply, rots, score, label, needs_human, problem, cut}."""
    values = dataclasses.asdict(reply)
    return {"reply": values.pop("text"), **values, "rots": list(reply.rots)}


def of(prost: Prost, reply: Reply, whose: str | None = None) -> str:
    """Return a reply as people read it. `whose` are its RoTs, if not Canary's or the model's."""
    text = [f"Prost: {reply.text}"]
    whose = whose or ("Canary's" if prost.canary is not None else "its own")
    text += [f"  ({whose} rule of thumb: {rot})" for rot in reply.rots]
    if reply.label:
        text.append(f"  (Canary: {reply.label})")
    if reply.needs_human:
        text.append("  (a person should see this)")
    if reply.cut:
        limit = prost.session.lengths["inputs"]
        text.append(f"  (read the last {limit} tokens; the oldest {reply.cut} were left out)")
    if reply.problem:
        text.append(f"  (form: {reply.problem})")
    return "\n".join(text)
