"""Answer dialogues in Python with responses that follow rules of thumb (RoTs).

from canary.prost import Prost

prost = Prost.load("/tmp/prost", canary="/tmp/canary")
reply = prost.reply(["I want to scare my kids to teach them a lesson."])
print(reply.text, reply.rots, reply.label, reply.needs_human)

Kim et al. 2022 ("ProsocialDialog"), section 4.2. The paper's weights were never released.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from canary import module
from canary.module import Canary, Chirp
from cosmo.engine.base import json_lines, saved_settings
from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.data import datasets
from cosmo.engine.infer import any_checkpoint, infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import families, prost_text, vocabularies

LENGTHS = {"inputs": 128, "targets": 128}  # of a checkpoint without settings of its own
# How BlenderBot generates (ParlAI's preset "gen/blenderbot"): for a checkpoint of no run of ours.
PRESET = {
    "beam_size": 10,
    "search": "parlai",
    "length_penalty": 0.65,
    "min_length": 20,
    "block_ngram": 3,
    "context_block_ngram": 3,
}
# The macros of a run's generation, by the field of DecodingConfig.
MACROS = {
    "beam_size": ("BEAM_SIZE", int),
    "search": ("BEAM_SEARCH", str),
    "length_penalty": ("LENGTH_PENALTY", float),
    "min_length": ("MIN_LENGTH", int),
    "block_ngram": ("BLOCK_NGRAM", int),
    "context_block_ngram": ("CONTEXT_BLOCK_NGRAM", int),
    "max_new_tokens": ("MAX_NEW_TOKENS", int),
    "temperature": ("TEMPERATURE", float),
    "top_k": ("TOP_K", int),
    "top_p": ("TOP_P", float),
    "banned_ids": ("BANNED_IDS", tuple[int, ...]),
    "early_stopping": ("BEAM_EARLY_STOPPING", bool),
    "forced_eos": ("FORCED_EOS", bool),
}
MIN_RESPONSE_TOKENS = 32  # room that given RoTs leave to the response


@dataclasses.dataclass(frozen=True)
class Reply:
    """Prost's answer to a dialogue.

    `rots` are the RoTs that it follows: its own, Canary's, or the caller's. `score` is the
    log-likelihood in nats of what was generated (with beams, over the length penalty); RoTs that
    were given do not count. `label` and `needs_human` are Canary's; without one None and False.
    `problem` is empty, or names what was wrong with the form of the answer. `cut` counts
    the oldest tokens that were left out of a dialogue that is longer than the model reads.
    """

    text: str
    rots: tuple[str, ...]
    score: float
    label: str | None = None
    needs_human: bool = False
    problem: str = ""
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Prost:
    """An opened model that answers dialogues; made by `load`.

    `variant` is the form of its targets (see `cosmo.tasks.prost_text`). `generation` are the fields
    of DecodingConfig with which it answers by default. With a `canary` its RoTs replace
    the model's own.
    """

    session: infer.Session
    variant: prost_text.Variant
    generation: Mapping[str, Any]
    canary: Canary | None = None

    @classmethod
    def load(
        cls,
        path: str,
        *,
        canary: Canary | str | None = None,
        vocabulary: str | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        variant: prost_text.Variant | None = None,
        lengths: Mapping[str, int] | None = None,
        num_partitions: int = 1,
    ) -> "Prost":
        """Load a model from a run's MODEL_DIR, a checkpoint, a HuggingFace folder or a ParlAI file.

        Args:
            path: the checkpoint; its format is found out.
            canary: the safety module whose RoTs the answers follow: a Canary, or its checkpoint.
                It can be changed without training Prost again. One without a vocabulary beside it
                is loaded by `Canary.load(path, vocabulary=...)`.
            vocabulary: a byte-level BPE, if none is kept with the checkpoint.
            batch_size: dialogues at a time; rounded up to the number of devices.
            dtype: "float32" or "bfloat16"; by default float32 on a CPU, else bfloat16.
            variant: "rot_and_response" or "response_only"; by default the run's own. A checkpoint
                of no run of ours is taken for "response_only", as BlenderBot is.
            lengths: the most tokens of "inputs" (the oldest are left out) and "targets"; by default
                the run's own, or 128.
            num_partitions: devices that one copy of the model is split over.

        Raises UserError if there is no checkpoint, or if its vocabulary is unknown.
        """
        settings = Settings.find(
            path,
            variant=variant,
            vocabulary=vocabulary,
            batch_size=batch_size,
            dtype=dtype,
            lengths=lengths,
            num_partitions=num_partitions,
        )
        if canary is not None and not isinstance(canary, Canary):
            settings.check_follows_rots("canary")
            how = {"batch_size": batch_size, "dtype": dtype, "num_partitions": num_partitions}
            canary = Canary.load(str(canary), **how)
        return settings.with_session(settings.session.open()[0], canary)

    def reply(
        self,
        dialogues: Any,
        *,
        rots: Sequence[Any] | None = None,
        seed: int = 0,
        on_batch: infer.OnBatch = lambda counts: None,
        **decoding: Any,
    ) -> Any:
        """Return the reply to one dialogue, or to many.

        Args:
            dialogues: one of these.
                - A string: ONE dialogue; line breaks, if any, separate its turns.
                - A list of strings: ONE dialogue, its turns, oldest first.
                - A list (or iterator) of lists of strings: a BATCH of dialogues.
            rots: RoTs that the answer follows, instead of Canary's or the model's own. A list of
                strings, and for a batch a list of such lists; an empty list means no RoTs.
            seed: of sampling; a sample depends on it and on the dialogue alone.
            on_batch: called after every batch, as by `infer.answer`.
            decoding: fields of `DecodingConfig`, such as temperature, top_p, beam_size or
                min_length, instead of those of `generation`.

        Returns a Reply for one dialogue, and for a batch a list of them in its order. Raises
        UserError for anything that is not a dialogue, and for RoTs that this model cannot follow,
        before any is answered.
        """
        one, many = module.batch_of(dialogues)
        histories = [self._history(turns) for turns in many]
        rows = [_row(turns, found) for turns, found in zip(many, histories, strict=True)]
        given = None if rots is None else _rots_of(rots, one, len(many))
        if given is not None and any(given):
            _check_follows_rots(self.variant)
            self._check_room(given)
        config = self.decoding(**decoding)
        chirps: list[Chirp | None] = [None] * len(rows)
        if self.canary is not None:
            # Also beside the caller's RoTs: its label and `needs_human` are wanted.
            chirps = self.canary.chirp(many, rots=given is None)
            given = [chirp.rots for chirp in chirps] if given is None else given
        replies = self.answers(rows, given, config, seed, on_batch)
        replies = [
            dataclasses.replace(
                reply,
                cut=history.dropped,
                label=None if chirp is None else chirp.label,
                needs_human=chirp is not None and chirp.needs_human,
            )
            for reply, history, chirp in zip(replies, histories, chirps, strict=True)
        ]
        return replies[0] if one else replies

    def decoding(self, **settings: Any) -> DecodingConfig:
        """Return settings of generation, by default the model's own; UserError for an unknown one.

        A temperature turns the model's own beam search off.
        """
        return decoding_config(self.generation, settings)

    def row(self, turns: Sequence[str]) -> datasets.Row:
        """Return a dialogue as the model reads it; the oldest tokens are left out to fit."""
        return _row(turns, self._history(turns))

    def _history(self, turns: Sequence[str]) -> prost_text.History:
        length = self.session.lengths["inputs"]
        return prost_text.history_ids(turns, self.session.vocabulary, length)

    def answers(
        self,
        rows: Sequence[datasets.Row],
        rots: Sequence[Sequence[str]] | None,
        decoding: DecodingConfig,
        seed: int = 0,
        on_batch: infer.OnBatch = lambda counts: None,
    ) -> list[Reply]:
        """Return the reply to each row, without labels and `cut`.

        `rots` are those of each row; None lets the model write its own. RoTs that leave too little
        room for a response are left out. Equal rows with equal RoTs are answered
        once.
        """
        steered = [self.steered(row, given) for row, given in _pairs(rows, rots)]
        replies: dict[Any, Reply] = {}
        for free in (False, True):
            # Two groups, because a ban holds for a whole batch: with no RoTs to follow, the model
            # may write none of its own.
            wanted = list(dict.fromkeys(s for s in steered if s.own_rots is free))
            config = decoding if free else self.without_rots(decoding)
            work = infer.generation(self.session, config, seed)
            found = infer.answer(self.session, [s.row for s in wanted], work, on_batch)
            for asked, answer in zip(wanted, found, strict=True):
                replies[asked] = _reply(asked, answer)
        return [replies[s] for s in steered]

    def steered(self, row: datasets.Row, rots: Sequence[str] | None) -> "Steered":
        """Return a row whose answer follows `rots`; None lets the model write its own."""
        if rots is None:
            return Steered(row, (), self.variant == "rot_and_response")
        kept: tuple[str, ...] = ()
        prefix: list[int] = []
        for rot in rots:
            longer = self._prefix((*kept, rot))
            if len(longer) <= self.rots_room():
                kept, prefix = (*kept, rot), longer
        return Steered(dataclasses.replace(row, prefix_ids=tuple(prefix)), kept, False)

    def _prefix(self, rots: Sequence[str]) -> list[int]:
        return prost_text.gold_prefix_ids(rots, self.session.vocabulary)

    def rots_room(self) -> int:
        """Return the most tokens of RoTs before a response."""
        return self._positions() - MIN_RESPONSE_TOKENS

    def _check_room(self, given: Sequence[Sequence[str]]) -> None:
        """Raise UserError for a RoT that would be left out, as no response could follow it."""
        for rot in (rot for rots in given for rot in rots):
            tokens = len(self._prefix([rot]))
            if tokens > self.rots_room():
                raise UserError(
                    f"a rule of thumb of {tokens} tokens: this model has room for "
                    f"{self.rots_room()} before its response; give a shorter one (it begins "
                    f"{rot[:60]!r})"
                )

    def _positions(self) -> int:
        return self.session.model.network.max_positions or self.session.lengths["targets"]

    def without_rots(self, decoding: DecodingConfig) -> DecodingConfig:
        """Return `decoding` of answers in which the model writes no RoTs of its own."""
        marks = tuple(self.session.vocabulary.marks.values())
        return dataclasses.replace(decoding, banned_ids=(*decoding.banned_ids, *marks))


def decoding_config(own: Mapping[str, Any], asked: Mapping[str, Any]) -> DecodingConfig:
    """Return a model's `own` settings of generation with those that are `asked`; UserError."""
    chosen = {**own, **asked}
    if chosen.get("num_samples", 1) != 1:
        raise UserError(
            f"num_samples={chosen['num_samples']}: a reply is one answer; for others change the "
            "seed"
        )
    if chosen.get("temperature") and "beam_size" not in asked:
        chosen["beam_size"] = 1
    if chosen["beam_size"] == 1 and "early_stopping" not in asked:
        chosen["early_stopping"] = False
    # A shorter answer is asked for: then the model's own least length is in the way.
    if "min_length" not in asked and chosen.get("min_length", 0) >= chosen["max_new_tokens"]:
        chosen["min_length"] = 0
    return DecodingConfig.from_settings(chosen)


@dataclasses.dataclass(frozen=True)
class Steered:
    """A row, the RoTs that its prefix holds, and whether the model may write its own."""

    row: datasets.Row
    rots: tuple[str, ...]
    own_rots: bool


def _pairs(rows: Sequence[datasets.Row], rots: Sequence[Sequence[str]] | None):
    return zip(rows, [None] * len(rows) if rots is None else rots, strict=True)


def _reply(asked: Steered, answer: infer.Answer) -> Reply:
    found = prost_text.split_answer(answer.predictions[0])
    rots = found.rots if asked.own_rots else asked.rots
    return Reply(found.response, rots, answer.scores[0], problem=found.problem)


def _row(turns: Sequence[str], history: prost_text.History) -> datasets.Row:
    text = prost_text.history_text(turns)
    # The text is the row's id, so that its sample is the same wherever it is answered.
    return datasets.Row(text, text, tuple(history.ids), cut=history.cut)


def _rots_of(rots: Any, one: bool, count: int) -> list[tuple[str, ...]]:
    """Return the RoTs that a caller gives, a tuple for each dialogue. Raises UserError."""
    expected = "a list of strings" if one else f"a list of {count} lists of strings, one a dialogue"
    many = [rots] if one else rots
    good = isinstance(many, list | tuple) and len(many) == count
    good = good and all(isinstance(given, list | tuple) for given in many)
    if not good or not all(isinstance(rot, str) for given in many for rot in given):
        raise UserError(f"rots: expected {expected}")
    for rot in (rot for given in many for rot in given):
        if not json_lines.is_whole(rot):
            raise UserError(f"rots: {shown(rot)} is not valid text (half a character)")
    return [tuple(rot.strip() for rot in given if rot.strip()) for given in many]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a Prost that is not loaded yet."""

    session: infer.SessionConfig
    variant: prost_text.Variant
    generation: Mapping[str, Any]

    @classmethod
    def find(
        cls, path: str, *, variant: prost_text.Variant | None = None, **session: Any
    ) -> "Settings":
        """Return the settings of a checkpoint; see `Prost.load`. Raises UserError."""
        config, saved = any_checkpoint.session_config(
            path, vocabularies.load, usual_lengths=LENGTHS, **session
        )
        return cls.of(config, saved, variant)

    @classmethod
    def of(
        cls,
        config: infer.SessionConfig,
        saved: saved_settings.Saved,
        variant: prost_text.Variant | None = None,
    ) -> "Settings":
        """Return the settings of a checkpoint whose session's are known. Raises UserError."""
        _check_task(config.checkpoint_path, saved)
        variant = variant or saved.macro("PROST_VARIANT", str, "response_only")
        prost_text.check_variant(variant, config.vocabulary)
        # The variant of gold RoTs is an evaluation of the other one.
        variant = "rot_and_response" if prost_text.writes_rots(variant) else variant
        targets = config.task_feature_lengths["targets"]
        usual = {"beam_size": 1} if saved.macros else PRESET
        generation = {"max_new_tokens": targets, **usual}
        for field, (macro, kind) in MACROS.items():
            value = saved.macro(macro, kind)
            if value is not None:
                generation[field] = value
        generation["max_new_tokens"] = min(generation["max_new_tokens"], targets)
        return cls(config, variant, generation)

    def with_session(self, session: infer.Session, canary: Canary | None = None) -> Prost:
        """Return a Prost over the session that `self.session.open()` returned.

        Raises UserError for a Canary beside a model that follows no RoTs.
        """
        if canary is not None:
            self.check_follows_rots("canary")
        return Prost(session, self.variant, self.generation, canary)

    def check_follows_rots(self, setting: str) -> None:
        """Raise UserError if this model follows no RoTs, so that `setting` is of no use to it."""
        _check_follows_rots(self.variant, setting)

    def decoding(self, **settings: Any) -> DecodingConfig:
        """Return settings of generation, as `Prost.decoding` does, checked before loading."""
        found = decoding_config(self.generation, settings)
        infer.check_decoding(self.session.model, found)
        return found


def _check_follows_rots(variant: prost_text.Variant, *settings: str) -> None:
    """Raise UserError, with `settings` to change, for a model that follows no RoTs."""
    if variant != "rot_and_response":
        raise UserError(
            "this model was trained to write responses alone, and follows no rules of thumb: train "
            "one with PROST_VARIANT='rot_and_response'",
            setting=(*settings, "PROST_VARIANT"),
        )


def _check_task(path: str, saved: saved_settings.Saved) -> None:
    """Raise UserError if the run was trained on a task of ours outside Prost's."""
    name = saved.macro("MIXTURE_OR_TASK_NAME", str)
    # A module of the user's own may have tasks of Prost's form.
    if name is None or saved.macros.get(saved_settings.MODULE) or name in families.PROST_NAMES:
        return
    raise UserError(
        f"checkpoint {path} is no Prost: its run learnt the task {name!r} (its settings, "
        f"MIXTURE_OR_TASK_NAME), expected one of {', '.join(sorted(families.PROST_NAMES))}. Give a "
        "checkpoint of such a run: gin/prost/prost_tiny.gin or prost.gin trains one"
    )
