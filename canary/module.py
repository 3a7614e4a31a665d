"""Label dialogues in Python: a safety label, and the rules of thumb (RoTs) that apply.

```python
from canary import Canary

canary = Canary.load("/tmp/canary")
chirp = canary.chirp("I want to scare my kids to teach them a lesson.")
print(chirp.label, chirp.probabilities, chirp.rots, chirp.needs_human)
```
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from canary import reading
from cosmo.engine.base import saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import any_checkpoint, infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import families, formatting, safety, vocabularies

LENGTHS = {"inputs": 512, "targets": 128}  # of a checkpoint without settings of its own
HUMAN = "__needs_intervention__"


@dataclasses.dataclass(frozen=True)
class Chirp:
    """Canary's answer to a dialogue's latest turn.

    `probabilities` are those of the five labels (a softmax over their exact log-likelihoods), and
    `label` is the likeliest. `needs_human` is true for `__needs_intervention__`: someone may be in
    danger, and a person should see it. `text` is the model's own text: the label, then the RoTs.
    `rots` are the RoTs split by `safety.split_rots`, which is a guess. There are none where `label`
    is `__casual__`, or where they were not asked for.
    """

    label: str
    probabilities: dict[str, float]
    rots: tuple[str, ...]
    needs_human: bool
    text: str

    @property
    def rot_text(self) -> str:
        """Return `text` after the label."""
        return self.text[len(self.label) :].strip()


@dataclasses.dataclass(frozen=True)
class Canary:
    """An opened model that labels dialogues; made by `load`.

    `style` is the form of labels in its answers (see `cosmo.tasks.safety.label_text`), `separator`
    stands between turns in its inputs.
    """

    session: infer.Session
    style: safety.LabelStyle = "text"
    separator: str = safety.TURN_SEPARATOR

    @classmethod
    def load(
        cls,
        path: str,
        *,
        vocabulary: str | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        label_style: safety.LabelStyle | None = None,
        turn_separator: str | None = None,
        lengths: dict[str, int] | None = None,
        num_partitions: int = 1,
        backend: str | None = None,
    ) -> "Canary":
        """Load a model from a run's MODEL_DIR, one of its checkpoints, or another system's.

        Args:
            path: the checkpoint: ours, a HuggingFace folder, T5X's, or the published Canary, which
                is a ParlAI model. Its format is found out.
            vocabulary: a SentencePiece model, if none is kept with the checkpoint. The published
                Canary needs that of any T5 (`spiece.model`).
            batch_size: dialogues at a time; rounded up to the number of devices.
            dtype: "float32" or "bfloat16"; by default float32 on a CPU, else bfloat16. On a CPU
                bfloat16 is for products with weights alone: with AMX more than twice as fast.
            label_style: "text" or "sentinel"; by default the run's own, or "text".
            turn_separator: by default the run's or the ParlAI model's own, or " // ". The published
                Canary has a space, since T5 reads its newlines as spaces.
            lengths: the most tokens of "inputs" (oldest turns are left out) and "targets" (what is
                written); by default the model's own, or 512 and 128.
            num_partitions: devices that one copy of the model is split over.
            backend: the engine that answers; see `cosmo.load`.

        Raises UserError if there is no checkpoint, or if its vocabulary is unknown.
        """
        settings = Settings.find(
            path,
            label_style=label_style,
            turn_separator=turn_separator,
            vocabulary=vocabulary,
            dtype=dtype,
            lengths=lengths,
            batch_size=batch_size,
            num_partitions=num_partitions,
            backend=backend,
        )
        return settings.open()

    @overload
    def chirp(self, dialogues: str | Sequence[str], **settings: Any) -> Chirp: ...

    @overload
    def chirp(self, dialogues: Iterable[Sequence[str]], **settings: Any) -> list[Chirp]: ...

    def chirp(self, dialogues: Any, *, rots: bool = True, seed: int = 0, **decoding: Any) -> Any:
        r"""Return the label and RoTs of one dialogue, or of many.

        Args:
            dialogues: one of these.
                - A string: ONE dialogue; line breaks, if any, separate its turns.
                - A list of strings: ONE dialogue, its turns, oldest first.
                - A list (or iterator) of lists of strings: a BATCH of dialogues.
                (The published Canary took a list of strings as a batch: give it as
                `[text.split("\\n") for text in texts]`.)

            rots: whether to write RoTs; without them labels come several times as fast.
            seed: of sampling; a sample depends on it and on the dialogue alone.
            decoding: fields of `DecodingConfig`, such as temperature, top_p, beam_size or
                max_new_tokens; greedy without any.

        Returns a Chirp for one dialogue, and for a batch a list of them in its order. Raises
        UserError, which names the place, for an empty turn or anything that is not a dialogue. It
        does so before any is labelled.
        """
        # Everything is checked before anything is labelled: an error must cost no answers.
        one, many = batch_of(dialogues)
        contexts = [self.context(turns) for turns in many]
        found = self.label(contexts, rots=rots, seed=seed, decoding=self.decoding(**decoding))
        return found[0] if one else found

    def chirp_per_turn(
        self,
        dialogues: Iterable[Sequence[str]],
        *,
        rots: bool = True,
        seed: int = 0,
        **decoding: Any,
    ) -> list[list[Chirp]]:
        """Return for each dialogue of a batch the Chirp after its first turn, its second, ..."""
        # Each beginning is encoded anew, because T5's encoder reads in both directions. Shared are:
        # an utterance's tokens, the answers to beginnings that read alike (dialogues that start the
        # same, or lose the same oldest turns), and one encoder pass for label and RoTs.
        _, many = batch_of(list(dialogues))
        contexts = [context for turns in many for context in self.contexts(turns)]
        found = iter(self.label(contexts, rots=rots, seed=seed, decoding=self.decoding(**decoding)))
        return [[next(found) for _ in turns] for turns in many]

    def decoding(self, **settings: Any) -> DecodingConfig:
        """Return settings of generation, greedy by default; UserError for an unknown one."""
        longest = self.session.lengths["targets"]
        return DecodingConfig.from_settings({"max_new_tokens": longest, **settings})

    def context(self, turns: Sequence[str]) -> datasets.Row:
        """Return all of `turns` as the model reads them."""
        *_, last = self.contexts(turns, only_last=True)
        return last

    def contexts(self, turns: Sequence[str], *, only_last: bool = False) -> Iterator[datasets.Row]:
        """Yield each beginning of `turns` as the model reads it.

        The oldest turns are left out, whole, until the rest fits. A last turn that is too long
        alone loses its front.
        """
        # Separators are words of their own, so the tokens of a joined text are those of its parts.
        encode, budget = self.session.vocabulary.encode, self.session.lengths["inputs"] - 1
        apart = encode(self.separator.strip())
        ids = [encode(turn) for turn in turns]
        lengths = [len(apart) + len(turn) for turn in ids]
        for count in range(len(turns) if only_last else 1, len(turns) + 1):
            # Each length counts a separator, and the first turn kept has none: hence more budget.
            first = formatting.first_turn_kept(lengths[:count], budget + len(apart))
            tokens = list(ids[first])
            for turn in ids[first + 1 : count]:
                tokens += apart + turn
            text = safety.context(turns[first:count], self.separator)
            # The text is the row's id, so that its sample is the same wherever it is answered.
            eos = self.session.vocabulary.eos_id
            yield datasets.Row(text, text, (*tokens[max(0, len(tokens) - budget) :], eos))

    def label(self, contexts: Sequence[datasets.Row], **how: Any) -> list[Chirp]:
        """Return the Chirp of each context; equal ones are answered once. `how`: see `answers`."""
        # Beginnings of dialogues are often alike, and a Row is hashed by value.
        rows = list(dict.fromkeys(contexts))
        answers = self.answers(rows, **how)
        found = {row: chirp(answer) for row, answer in zip(rows, answers, strict=True)}
        return [found[row] for row in contexts]

    def answers(
        self,
        rows: Sequence[datasets.Row],
        *,
        rots: bool,
        decoding: DecodingConfig,
        seed: int = 0,
        on_batch: infer.OnBatch = lambda counts: None,
    ) -> list[infer.Answer]:
        """Return the engine's answer to each context, from one pass of the encoder.

        Labels are scored and, with `rots`, RoTs are generated after the likeliest one. `on_batch`
        is called after every batch, as by `infer.answer`.
        """
        if rots:
            continues = [safety.needs_rots(label) for label in safety.LABELS]
            work = infer.choosing_then_generating(
                self.session, self.choices, decoding, seed, continues
            )
        else:
            work = infer.choosing(self.session, self.choices)
        return infer.answer(self.session, rows, work, on_batch)

    @property
    def choices(self) -> list[list[int]]:
        """Return the tokens of each label, in the order of `safety.LABELS`."""
        # Without EOS, because RoTs may follow: an answer is scored for beginning with the label.
        encode = self.session.vocabulary.encode
        return [encode(safety.label_text(label, self.style)) for label in safety.LABELS]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a Canary that is not loaded yet."""

    session: infer.SessionConfig
    style: safety.LabelStyle
    separator: str

    @classmethod
    def find(
        cls,
        path: str,
        *,
        label_style: safety.LabelStyle | None = None,
        turn_separator: str | None = None,
        **session: Any,
    ) -> "Settings":
        """Return the settings of a checkpoint; see `Canary.load`. Raises UserError."""
        config, saved = any_checkpoint.session_config(
            path, vocabularies.load, usual_lengths=LENGTHS, **session
        )
        _check_task(path, saved)
        # The caller's value, then the run's own, then the default.
        style = label_style or saved.macro("LABEL_STYLE", safety.LabelStyle, "text")
        usual = safety.TURN_SEPARATOR
        if delimiter := saved.text_options.get("delimiter"):
            # T5's vocabulary reads any white space as one space: a newline is ParlAI's default.
            usual = delimiter if delimiter.strip() else safety.PUBLISHED_TURN_SEPARATOR
        separator = turn_separator or saved.macro("TURN_SEPARATOR", str, usual)
        formatting.Separators(turn=separator)  # raises for a separator that cannot be one
        # Two pieces where the vocabulary has sentinels as user-defined symbols: SentencePiece puts
        # its mark of a word's start before them. Training asks for one, T5's own.
        safety.check_labels(config.vocabulary, style, max_sentinel_pieces=2)
        return cls(config, style, separator)

    def open(self) -> Canary:
        """Load the model."""
        return self.with_session(self.session.open()[0])

    def with_session(self, session: infer.Session) -> Canary:
        """Return a Canary over the session that `self.session.open()` returned."""
        return Canary(session, self.style, self.separator)


def _check_task(path: str, saved: saved_settings.Saved) -> None:
    """Raise UserError if the run learnt a task of ours that has no labels."""
    # Nobody would notice otherwise, because any model gives the five labels some likelihood.
    name = saved.macro("MIXTURE_OR_TASK_NAME", str)
    # A module of the user's own may have tasks with labels.
    if name is None or saved.macros.get(saved_settings.MODULE) or name in families.LABEL_NAMES:
        return
    raise UserError(
        f"checkpoint {path} writes no safety labels: its run learnt the task {name!r} (its "
        f"settings, MIXTURE_OR_TASK_NAME), expected one of {', '.join(families.LABEL_NAMES)}. "
        "Give a checkpoint of such a run: gin/canary/canary_tiny.gin or canary.gin trains one"
    )


def chirp(answer: infer.Answer) -> Chirp:
    """Return an answer of `Canary.answers` as a Chirp."""
    scores = label_scores(answer)
    most = max(scores)  # subtracted, because exp of a log-likelihood underflows
    parts = [math.exp(score - most) for score in scores]
    probabilities = dict(zip(safety.LABELS, (p / sum(parts) for p in parts), strict=True))
    # Where RoTs were generated, the device has chosen, and they follow its choice.
    label = safety.LABELS[scores.index(most) if answer.choice is None else answer.choice]
    text = answer.predictions[0].strip() if answer.predictions else ""
    rots = safety.split_rots(text)
    return Chirp(label, probabilities, rots, label == HUMAN, f"{label} {text}".strip())


def label_scores(answer: infer.Answer) -> tuple[float, ...]:
    """Return the log-likelihoods (nats) of the labels, in the order of `safety.LABELS`."""
    return answer.scores if answer.choice is None else answer.choice_scores


def batch_of(dialogues: Any) -> tuple[bool, list[tuple[str, ...]]]:
    """Return (whether it is one dialogue, the dialogues' turns); see `Canary.chirp`.

    Raises UserError for anything that is not a dialogue.
    """
    if isinstance(dialogues, str):
        # As the published Canary took one text: a turn a line.
        turns = [line for line in dialogues.splitlines() if line.strip()]
        return True, [turns_of(turns or [dialogues], "the dialogue")]
    if not isinstance(dialogues, Iterable):
        raise UserError(f"got {type(dialogues).__name__}, expected a dialogue or a list of them")
    items = list(dialogues)
    texts = [isinstance(item, str) for item in items]
    if not items:
        raise UserError("got an empty list, expected a dialogue or a list of them")
    if any(texts) and not all(texts):
        raise UserError(
            "got strings and lists in one list: give a list of strings (the turns of one dialogue) "
            "or a list of lists (a batch of dialogues)"
        )
    if all(texts):
        return True, [turns_of(items, "the dialogue")]
    return False, [turns_of(turns, f"dialogue {place}") for place, turns in enumerate(items)]


def turns_of(turns: Any, what: str) -> tuple[str, ...]:
    """Return a dialogue's turns without white space around them; UserError names `what`."""
    try:
        return reading.checked(turns)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
