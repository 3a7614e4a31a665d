"""The model that a server answers with: what it reads, how it samples, how its answers are read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cosmo import records
from cosmo.engine.data import datasets
from cosmo.engine.infer import batching, infer
from cosmo.engine.infer.continuous import Sampling
from cosmo.engine.model.decoding import IMPOSSIBLE, DecodingConfig
from cosmo.engine.web.errors import ApiError, wrong
from cosmo.serve import fields, texts
from cosmo.tasks import formatting

# Fields of Prost's own generation that hold for samples too.
_LIMITS = ("min_length", "block_ngram", "context_block_ngram", "banned_ids")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as the model reads it.

    `cut` is whether older text was left out. `own_rots` is whether the model writes rules of thumb
    (RoTs) before its response; `rots` are those that it is given.
    """

    input_ids: tuple[int, ...]
    cut: bool = False
    prefix_ids: tuple[int, ...] = ()
    own_rots: bool = False
    rots: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Served:
    """An opened model under its name. `prost` is its agent if it is a Prost, else None.

    `beams` above 1 are those of the search that was compiled. `backend` is one of
    `ctranslate2_model.BACKENDS`.
    """

    name: str
    session: infer.Session
    separators: formatting.Separators
    prost: Any = None  # canary.prost.agent.Prost
    beams: int = 1
    backend: str = "jax"

    @property
    def max_input_tokens(self) -> int:
        """Return the most tokens that the model reads, the end token included."""
        return self.session.lengths["inputs"]

    @property
    def max_tokens(self) -> int:
        """Return the longest answer."""
        if self.prost is not None:
            return self.prost.generation["max_new_tokens"]
        return self.session.lengths["targets"]

    @property
    def longest_answer(self) -> int:
        """Return the most tokens of an answer with the rules of thumb that it is given."""
        # They may fill what the network has beyond the longest response.
        return self.session.model.network.max_positions or self.max_tokens

    @property
    def takes_seed(self) -> bool:
        """Return whether samples can be drawn again by their seed."""
        return self.backend == "jax"

    @property
    def follows_rots(self) -> bool:
        """Return whether the model follows rules of thumb."""
        return self.prost is not None and self.prost.variant == "rot_and_response"

    def asked(self, dialogue: fields.Dialogue, rots: Sequence[str] | None = None) -> Asked:
        """Return a dialogue as the model reads it. Raises ApiError.

        Oldest turns are left out until the rest fits; a last turn that is too long alone loses its
        front. `rots` are those that the answer follows; None lets a Prost write its own.
        """
        try:
            row = records.row(
                dialogue.record(), self.session.vocabulary, self.max_input_tokens, self.separators
            )
        except (ValueError, RuntimeError) as error:  # SentencePiece's, for broken Unicode
            raise ApiError(400, f"messages: {error}", param="messages") from error
        made = Asked(tuple(row.input_ids), row.cut)
        if not self.follows_rots:
            if rots is not None:
                raise wrong(
                    "rots", f"{self.name} follows no rules of thumb", "unsupported_parameter"
                )
            return made
        if rots is None:
            return dataclasses.replace(made, own_rots=True)
        steered = self.prost.steered(row, rots)
        return dataclasses.replace(made, prefix_ids=steered.row.prefix_ids, rots=steered.rots)

    def prompt(self, prompt: str | Sequence[int]) -> Asked:
        """Return a prompt as the model reads it, the end token added. Raises ApiError if too long.

        Unlike a dialogue it is not cut, because its front may be an instruction.
        """
        vocabulary = self.session.vocabulary
        try:
            ids = list(vocabulary.encode(prompt) if isinstance(prompt, str) else prompt)
        except (ValueError, RuntimeError) as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from error
        if not ids or ids[-1] != vocabulary.eos_id:
            ids.append(vocabulary.eos_id)
        if len(ids) > self.max_input_tokens:
            raise ApiError(
                400,
                f"prompt: {len(ids)} tokens with the end token; {self.name} reads at most "
                f"{self.max_input_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        return Asked(tuple(ids))

    def samplings(self, wanted: fields.Wanted, asked: Asked) -> list[Sampling]:
        """Return how the scheduler draws a request's n samples."""
        settings: dict[str, Any] = {}
        if self.prost is not None:
            own = self.prost.generation
            settings = {name: own[name] for name in _LIMITS if own.get(name)}
            if not asked.own_rots:
                marks = tuple(self.session.vocabulary.marks.values())
                settings["banned_ids"] = (*settings.get("banned_ids", ()), *marks)
        room = min(wanted.max_tokens, self.longest_answer - len(asked.prefix_ids))
        if settings.get("min_length", 0) >= room:
            settings["min_length"] = 0  # a shorter answer is asked for
        made = Sampling(
            max_new_tokens=room,
            temperature=wanted.temperature,
            # Greedy choice has nothing to cut.
            top_p=wanted.top_p if wanted.temperature else 1.0,
            top_k=wanted.top_k if wanted.temperature else 0,
            seed=wanted.seed,
            top_logprobs=wanted.logprobs or 0,
            prefix_ids=asked.prefix_ids,
            **settings,
        )
        return [made] * wanted.n

    def writer(self, asked: Asked, stops: Sequence[str]) -> texts.Writer:
        """Return the writer of one answer's text."""
        kind = texts.ProstWriter if asked.own_rots else texts.Writer
        return kind(self.session.vocabulary, stops)

    def search(self, asked: Asked) -> list[list[int]]:
        """Return the token ids of the best answers that beams find, the best first.

        Call it on the thread that calls the devices.
        """
        shards = self.session.layout.mesh.shape["data"]
        session = dataclasses.replace(self.session, batch_size=shards, bucketed=False)
        work = infer.generation(session, self._search_settings(asked.own_rots))
        row = datasets.Row("", "", asked.input_ids, prefix_ids=asked.prefix_ids)
        (group,) = batching.groups(
            [row], shards, session.lengths, targets=False, bucketed=False, prefixes=True
        )
        decoded = work.start(group)
        tokens_NT, scores_N = np.asarray(decoded.tokens)[0], np.asarray(decoded.scores)[0]
        real_N = scores_N > IMPOSSIBLE / 10
        real_N[0] = True
        eos, found = session.vocabulary.eos_id, []
        for ids in tokens_NT[real_N].tolist():
            kept = [id for id in ids if id != 0]
            found.append(kept[: kept.index(eos) + 1] if eos in kept else kept)
        return found

    def searches(self) -> list[Asked]:
        """Return one request for each program that `search` needs."""
        end = (self.session.vocabulary.eos_id,)
        made = [Asked(end, own_rots=self.follows_rots)]
        if self.follows_rots:
            room, token = self.prost.rots_room(), min(self.session.vocabulary.marks.values())
            lengths = [*range(0, room, batching.PREFIX_STEP), room]
            made += [Asked(end, prefix_ids=(token,) * length) for length in lengths]
        return made

    def _search_settings(self, own_rots: bool) -> DecodingConfig:
        if self.prost is None:
            return DecodingConfig(beam_size=self.beams, max_new_tokens=self.max_tokens)
        found = self.prost.decoding(beam_size=self.beams, temperature=0.0, top_p=1.0, top_k=0)
        return found if own_rots else self.prost.without_rots(found)
