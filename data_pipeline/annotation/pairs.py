"""Make the items of a task: contexts sampled by seed, from files, corpora or models.

Which records are drawn depends on the seed and their ids alone, not on the order of a file. A is
shown as A to about half of the judges: `assignment.order` tosses the coin.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.tasks import conversations, readers, safety
from cosmo.tasks.files import resolve
from cosmo.tasks.recognize import PROSOCIAL, looks_like
from cosmo.tasks.record_files import read_records
from data_pipeline.annotation.model_judge import conversation, prompts
from data_pipeline.annotation.pages import Page
from data_pipeline.annotation.task_files import Item, sides
from data_pipeline.calls.requests import Rejected, Request, Sampling, Stage

RECORDS = 'records {"turns": [...]}'
# Marks between turns in the inputs of our formats: Cosmo's, Canary's, Prost's.
TURN_MARKS = ("<turn>", " // ", "\n")
_SEPARATOR = "<sep>"
_ROLE = re.compile(r"Imagine you are .+ and speak to .+")  # no part of what a judge needs
Drop = Counter  # reason -> records left out


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A dialogue or context: `speakers` (left, right) only where the two do not alternate."""

    id: str
    turns: tuple[str, ...]
    speakers: tuple[str, ...] = ()
    narrative: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def sample(
    ids: Iterable[str], count: int | None, seed: int, dropped: Drop | None = None
) -> list[str]:
    """Return `count` ids (None: all) by a seeded hash of each, in the order of the hashes.

    Raises UserError if there are fewer; it names what was `dropped` before.
    """
    ordered = sorted(set(ids), key=lambda name: (fraction_bits(seed, "sample", name), name))
    if count is not None and len(ordered) < count:
        raise UserError(
            f"only {len(ordered)} of {count} items can be drawn{left_out(dropped)}: give fewer, "
            "or more records",
            setting="items",
        )
    return ordered[:count]


def left_out(dropped: Drop | None) -> str:
    """Return what was left out, in brackets, to stand in an error."""
    reasons = ", ".join(f"{number} x {reason}" for reason, number in (dropped or {}).items())
    return f" (left out: {reasons})" if reasons else ""


def read_dialogues(path: Any, split: str = "test", dropped: Drop | None = None) -> list[Dialogue]:
    """Return the dialogues of a corpus, recognised by its looks; DataError if it is unknown.

    Names of speakers are left out: they would show which corpus a dialogue is from. A dialogue of
    three speakers is left out and counted.
    """
    dropped = Counter() if dropped is None else dropped
    place = resolve(path)
    files = [place]
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
    kind = next((found for file in files if (found := looks_like(file))), None)
    if kind == "SODA":
        return list(_soda(readers.read_soda(path, split), dropped))
    if kind in PROSOCIAL:
        return [
            Dialogue(
                d.id, tuple(text for turn in d.turns for text in (turn.context, turn.response))
            )
            for d in readers.read_prosocial(path, split)
        ]
    if kind == RECORDS:
        return list(read_contexts(path).values())
    if kind not in _CONVERSATIONS:
        raise DataError.at(
            path, None, "not a corpus of dialogues", got=kind or "nothing known",
            expected=", ".join(["SODA", *PROSOCIAL, *_CONVERSATIONS, RECORDS]),
            remedy="Correct the path.",
        )  # fmt: skip
    return [Dialogue(c.id, c.turns) for c in _CONVERSATIONS[kind](path, split)]


_CONVERSATIONS: dict[str, Callable[..., Iterable[conversations.Conversation]]] = {
    "DailyDialog": conversations.read_dailydialog,
    "EmpatheticDialogues": conversations.read_empathetic,
    "BlendedSkillTalk": conversations.read_blended,
    "Topical-Chat": conversations.read_topical_chat,
    "PersonaChat": conversations.read_persona_chat,
    "Wizard of Wikipedia": conversations.read_wizard,
}


def _soda(dialogues: Iterable[Any], dropped: Drop) -> Iterable[Dialogue]:
    for one in dialogues:
        names = list(dict.fromkeys(one.speakers))
        if len(names) > 2:
            dropped["more than two speakers"] += 1
            continue
        speakers = tuple("left" if name == names[0] else "right" for name in one.speakers)
        if speakers == sides(one.dialogue):
            speakers = ()
        yield Dialogue(one.id, one.dialogue, speakers, one.narrative)


def _rows(path: Any) -> Iterable[tuple[Any, dict[str, Any]]]:
    for place, row in read_records(resolve(path)):
        if not isinstance(row, dict):
            raise place.error("not an object", shown(row), "one JSON object a line")
        yield place, row


def _id(row: Mapping[str, Any], place: Any, seen: Mapping[str, Any], default: str) -> str:
    name = row.get("id", default)
    if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
        raise place.error("field 'id' is no id", shown(name), "a text or a number")
    name = str(name).strip()
    if name in seen:
        raise place.error("an id twice", shown(name), "a different id in each record")
    return name


def read_contexts(path: Any) -> dict[str, Dialogue]:
    """Return the records {id, turns, narrative?} of a file by id; DataError for a bad one."""
    found: dict[str, Dialogue] = {}
    for place, row in _rows(path):
        name = _id(row, place, found, str(len(found)))
        found[name] = Dialogue(
            name, _turns(row.get("turns"), place), narrative=_text(row, "narrative", place)
        )
    return found


def _turns(value: Any, place: Any) -> tuple[str, ...]:
    good = isinstance(value, list) and value
    if not good or not all(isinstance(t, str) and t.strip() for t in value):
        raise place.error("field 'turns' is no dialogue", shown(value), "a list of utterances")
    return tuple(turn.strip() for turn in value)


def _text(row: Mapping[str, Any], name: str, place: Any) -> str:
    value = row.get(name) or ""
    if not isinstance(value, str):
        raise place.error(f"field {name!r} is no text", shown(value), "a text")
    return value.strip()


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A line of a file of predictions: our `infer` writes {id, inputs, targets, prediction}."""

    id: str
    prediction: str
    inputs: str = ""
    target: str = ""


def read_predictions(path: Any) -> dict[str, Prediction]:
    """Return predictions by id; DataError for a bad line or an id twice."""
    found: dict[str, Prediction] = {}
    for place, row in _rows(path):
        # Without an id two files could be matched by chance.
        if "id" not in row:
            raise place.error("field 'id' is missing", shown(sorted(row)), "id and prediction")
        name = _id(row, place, found, "")
        if not isinstance(row.get("prediction"), str):
            got = shown(row.get("prediction"))
            raise place.error("field 'prediction' is no text", got, "the model's answer")
        texts = [_text(row, field, place) for field in ("inputs", "targets")]
        found[name] = Prediction(name, row["prediction"].strip(), *texts)
    return found


def context_of(prediction: Prediction, mark: str | None = None) -> Dialogue:
    """Return the context in a prediction's `inputs`; ValueError if it has none.

    `mark` stands between turns; without one the first of TURN_MARKS that occurs does.
    """
    parts = prediction.inputs.split(_SEPARATOR)
    body = parts.pop().strip() if prediction.inputs else ""
    if not body:
        raise ValueError(f"id {prediction.id!r}: no field 'inputs' to take the context from")
    stories = [part.strip() for part in parts if not _ROLE.fullmatch(part.strip())]
    mark = mark or next((m for m in TURN_MARKS if m in body), TURN_MARKS[0])
    turns = tuple(turn.strip() for turn in body.split(mark) if turn.strip())
    return Dialogue(prediction.id, turns, narrative=" ".join(stories))


def read_labels(path: Any) -> dict[str, str]:
    """Return {id: label} of a file that `canary label` wrote."""
    found: dict[str, str] = {}
    for place, row in _rows(path):
        name = _id(row, place, found, "")
        if not isinstance(row.get("label"), str):
            raise place.error("field 'label' is no text", shown(row.get("label")), "a label")
        if row["label"].strip("_") not in {label.strip("_") for label in safety.LABELS}:
            problem = "field 'label' has an unknown value"
            raise place.error(problem, shown(row["label"]), f"one of {', '.join(safety.LABELS)}")
        found[name] = row["label"]
    return found


def filtered(
    dialogues: Iterable[Dialogue],
    min_turns: int = 1,
    max_turns: int | None = None,
    labels: Mapping[str, str] | None = None,
    dropped: Drop | None = None,
) -> list[Dialogue]:
    """Return the dialogues of enough turns whose label, if given, is not casual; count the rest."""
    kept, dropped = [], Counter() if dropped is None else dropped
    for one in dialogues:
        if len(one.turns) < min_turns:
            dropped[f"fewer than {min_turns} turns"] += 1
        elif max_turns is not None and len(one.turns) > max_turns:
            dropped[f"more than {max_turns} turns"] += 1
        elif labels is not None and one.id not in labels:
            dropped["no label"] += 1
        elif labels is not None and labels[one.id].strip("_") == "casual":
            dropped["casual"] += 1
        else:
            kept.append(one)
    return kept


def equal_ids(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the ids that all files share; UserError if one has an id that another lacks."""
    names = list(files)
    for one in names:
        for other in names:
            missing = [name for name in files[one] if name not in files[other]]
            if missing:
                raise UserError(
                    f"{other} lacks {len(missing)} of the {len(files[one])} ids of {one}, such as "
                    f"{shown(missing[0])}: both must answer the same records"
                )
    return list(files[names[0]])


def contexts_of(
    files: Mapping[str, Mapping[str, Prediction]], path: Any = None, mark: str | None = None
) -> list[Dialogue]:
    """Return the contexts of predictions, from the file `path` or their own inputs.

    Without predictions they are all of the file. Raises UserError if ids or contexts are missing.
    """
    ids = equal_ids(files) if files else []
    if not path:
        if not files:
            raise UserError("two models need --contexts, which they answer")
        first = next(iter(files.values()))
        try:
            contexts = [context_of(first[name], mark) for name in ids]
        except ValueError as error:
            raise UserError(f"{error}: give --contexts") from error
        _check_same_contexts(files, contexts, mark)
        return contexts
    known = read_contexts(path)
    missing = [name for name in ids if name not in known]
    if missing:
        raise UserError(f"--contexts={path} lacks {len(missing)} ids, such as {missing[0]!r}")
    return [known[name] for name in ids or known]


def _check_same_contexts(
    files: Mapping[str, Mapping[str, Prediction]], contexts: Sequence[Dialogue], mark: str | None
) -> None:
    """Raise UserError if a file answers another last utterance under an id of the first file.

    Earlier ones may differ: a model's input loses its oldest turns where they do not fit.
    """
    for path, found in list(files.items())[1:]:
        for one in contexts:
            if not found[one.id].inputs:
                continue
            last = context_of(found[one.id], mark).turns[-1:]
            if last != one.turns[-1:]:
                raise UserError(
                    f"{path}: id {one.id!r} answers {shown(''.join(last))}, but in "
                    f"{next(iter(files))} it answers {shown(''.join(one.turns[-1:]))}: give "
                    "predictions for the same records, or --contexts if only the form differs"
                )


def response_items(
    contexts: Sequence[Dialogue], answers: Sequence[Mapping[str, str]], dropped: Drop
) -> list[Item]:
    """Return an item for each context with the two systems' responses.

    Equal responses leave nothing to prefer, and an empty one nothing to read: these are left out.
    """
    items = []
    for one in contexts:
        pair = tuple(answer.get(one.id, "") for answer in answers)
        if not all(pair):
            dropped["an empty response"] += 1
        elif pair[0] == pair[1]:
            dropped["equal responses"] += 1
        else:
            items.append(
                Item(
                    one.id,
                    narrative=one.narrative,
                    context=one.turns,
                    speakers=one.speakers,
                    options=tuple((text,) for text in pair),
                    about=one.about,
                )
            )
    return items


def dialogue_items(firsts: Sequence[Dialogue], seconds: Sequence[Dialogue]) -> list[Item]:
    """Return items that pair the dialogues of two corpora, in order."""
    return [
        Item(
            f"{one.id} | {two.id}",
            options=(one.turns, two.turns),
            option_speakers=(one.speakers, two.speakers) if one.speakers or two.speakers else (),
            about={"first": one.id, "second": two.id},
        )
        for one, two in zip(firsts, seconds, strict=True)
    ]


def items_of_dialogues(page: Page, dialogues: Sequence[Dialogue]) -> list[Item]:
    """Return an item for each dialogue, for a page about one dialogue."""
    shows_story = "narrative" in page.shows
    return [
        Item(one.id, narrative=one.narrative if shows_story else "", context=one.turns,
             speakers=one.speakers, about=one.about)
        for one in dialogues
    ]  # fmt: skip


def agent_stage(context: Dialogue) -> Stage:
    """Return a model's next turn of a conversation, or Rejected if it gives none."""
    words = prompts()["agent"]
    names = ("Speaker 1", "Speaker 2")
    last = sides(context.turns, context.speakers)[-1]
    speaker = names[last == "left"]
    parts = [words["narrative"].format(narrative=context.narrative)] if context.narrative else []
    parts.append(conversation(context.turns, names, context.speakers))
    user, system = "\n\n".join(parts), words["system"].format(speaker=speaker)
    response = yield Request(
        record_id=context.id,
        stage="agent",
        attempt=0,
        prompt=f"{system}\n\n{user}\n{speaker}:",
        messages=(("system", system), ("user", user)),
        sampling=Sampling(max_tokens=words["max_tokens"], stop=("\nSpeaker ",)),
    )
    text = response.text.strip().removeprefix(f"{speaker}:").strip()
    if response.fault or not text:
        return Rejected(context.id, "agent", response.fault or "an empty answer", {})
    return text


def paper_stage(context: Dialogue, name: str) -> Stage:
    """Return a model's next turn as `agent_stage`, asked by the prompt `name` of SODA's paper.

    Turns have no names; of the answer the first line counts. Both are choices
    of ours. Raises UserError for a context without narrative, which the prompt shows.
    """
    if not context.narrative:
        raise UserError(
            f"context {shown(context.id)} has no narrative, which the prompt {name!r} shows: add "
            "it to --contexts, or use our own prompt",
            setting="prompt",
        )
    # Contexts alternate, so each line is another speaker's, as the prompts promise.
    lines = "\n".join(" ".join(turn.split()) for turn in context.turns)
    prompt = prompts()["papers"][name].format(narrative=context.narrative, dialogue=lines)
    response = yield Request(
        record_id=context.id,
        stage="agent",
        attempt=0,
        prompt=f"{prompt}\n",
        messages=(("user", prompt),),
        sampling=Sampling(max_tokens=prompts()["agent"]["max_tokens"]),
    )
    text = response.text.strip().partition("\n")[0].strip()
    if response.fault or not text:
        return Rejected(context.id, "agent", response.fault or "an empty answer", {})
    return text
