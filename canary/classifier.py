"""Choose one of a task's words for each text: a T5 of ours, or a classifier of transformers.

The tasks are ToxiChat's stance and offence, and GoEmotions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from canary.module import Canary
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import any_checkpoint, infer
from cosmo.tasks import goemotions, safety, toxichat, vocabularies
from cosmo.tasks.files import resolve

LENGTHS = {"inputs": 512, "targets": 8}  # of a checkpoint without settings of its own
WORDS = {**toxichat.WORDS, goemotions.TASK: goemotions.LABELS}
# Further tasks and mixtures whose models choose from the same words.
_ALIKE = {toxichat.OFFENSE: ("sbic_offense", "offense")}
_RECIPES = {
    toxichat.STANCE: "toxichat_stance.gin",
    toxichat.OFFENSE: "offense.gin",
    goemotions.TASK: "goemotions.gin",
}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A T5 that chooses one of a task's words; made by `load`."""

    model: Canary  # its session, and how it joins turns; its labels are not used
    words: tuple[str, ...]

    def words_of(
        self,
        dialogues: Iterable[Sequence[str]],
        on_batch: infer.OnBatch = lambda counts: None,
    ) -> list[str]:
        """Return the likeliest word of each dialogue, by exact scores of all words."""
        contexts = [self.model.context(turns) for turns in dialogues]
        # Equal dialogues are asked about once: a Row's id is its text.
        rows: list[datasets.Row] = list(dict.fromkeys(contexts))
        vocabulary = self.model.session.vocabulary
        # With EOS: a word that begins another one must not get its likelihood.
        choices = [(*vocabulary.encode(word), vocabulary.eos_id) for word in self.words]
        work = infer.choosing(self.model.session, choices)
        answers = infer.answer(self.model.session, rows, work, on_batch)
        found = {
            row: self.words[answer.scores.index(max(answer.scores))]
            for row, answer in zip(rows, answers, strict=True)
        }
        return [found[row] for row in contexts]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A text-classification pipeline of transformers; made by `load`."""

    run: Callable[[list[str]], list[dict[str, Any]]]
    words: dict[str, str]  # its label -> the task's word
    separator: str  # between turns

    def words_of(
        self,
        dialogues: Iterable[Sequence[str]],
        on_batch: infer.OnBatch = lambda counts: None,
    ) -> list[str]:
        """Return the word of the likeliest label of each dialogue."""
        texts = [self.separator.join(turns) for turns in dialogues]
        if not texts:
            return []
        return [self.words[one["label"]] for one in self.run(texts)]


def load(path: str, task: str, **session: Any) -> Classifier | Pipeline:
    """Load a checkpoint of `task`, or a folder of transformers with a sequence classifier.

    `session` are settings of ours, which transformers does not take. Raises UserError for a
    checkpoint that learnt another task, and for a classifier with other labels.
    """
    if labels := _labels(path):
        return _pipeline(path, task, labels)
    config, saved = any_checkpoint.session_config(
        path, vocabularies.load, usual_lengths=LENGTHS, **session
    )
    learnt = saved.macro("MIXTURE_OR_TASK_NAME", str)
    if learnt not in (None, task, *_ALIKE.get(task, ())):
        raise UserError(
            f"checkpoint {path} learnt the task {learnt!r}, expected {task!r}: "
            f"gin/canary/{_RECIPES[task]} trains one"
        )
    separator = saved.macro("TURN_SEPARATOR", str, safety.TURN_SEPARATOR)
    return Classifier(Canary(config.open()[0], separator=separator), WORDS[task])


def _labels(path: str) -> list[str]:
    """Return the labels of a sequence classifier of transformers; [] for another checkpoint."""
    file = resolve(path) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:  # another loader names the fault
        return []
    names = found.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return []
    return [str(label) for label in (found.get("id2label") or {}).values()] or ["LABEL_0"]


def _pipeline(path: str, task: str, labels: Sequence[str]) -> Pipeline:
    words = {label: label.strip().lower() for label in labels}
    if unknown := [label for label, word in words.items() if word not in WORDS[task]]:
        raise UserError(
            f"the classifier {path} has a label {unknown[0]!r}, expected the words "
            f"{', '.join(WORDS[task])}: name its labels so in id2label of its config.json"
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path} is a classifier of transformers, which is not installed: "
            "pip install 'cosmo-dialogue[hf]'"
        ) from error
    # From the left, because the last turn is what is judged.
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, truncation_side="left")
    run = transformers.pipeline(
        "text-classification", model=path, tokenizer=tokenizer, truncation=True
    )
    separator = tokenizer.sep_token or tokenizer.eos_token or "\n"
    return Pipeline(run, words, separator)
