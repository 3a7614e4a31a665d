"""Ask a language model with and without rules of thumb (RoTs): `python -m tools.steer`.

The study of figures 5 and 6 of Kim et al. 2022 (section 6.2). Contexts that Canary labels as not
casual are drawn by seed, --items of them. A model behind OpenAI's API answers each with the paper's
prompt alone, with the RoTs of Canary, and with those of another drawn context. It writes to
--output:
  contexts.jsonl          {id, turns, label, rots, random_rots, random_from}
  without.jsonl, canary.jsonl, random.jsonl   {id, prediction}, for `annotate pairs` and `show`
  task_canary.jsonl       without against canary, for `annotate judge`, `export` and `report`
  task_random.jsonl       canary against random
  calls/                  the journal: the same command resumes, and pays for no answer twice

Figure 6 compares two models: run this for each, then `annotate pairs --preset=PD-steer`.

Choices of ours, which the paper leaves open: the last context of a dialogue is taken. A chat model
gets the prompt as a message. Answers have at most 120 tokens, at temperature 0.9 and top-p 0.95.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from canary import prompts
from cosmo.engine.base import command_line, durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError, shown
from cosmo.tasks import readers
from cosmo.tasks.files import resolve
from cosmo.tasks.record_files import read_records
from data_pipeline.annotation import pages, pairs
from data_pipeline.annotation.ask import ask_all
from data_pipeline.annotation.task_files import Task, write_task
from data_pipeline.calls import flags
from data_pipeline.calls.requests import Rejected, Request, Sampling, Stage

log = logging.getLogger("data_pipeline")

PRESET = "PD-steer"
SPEAKER = "Speaker 2:"
SAMPLING = Sampling(
    max_tokens=120, frequency_penalty=0.0, presence_penalty=0.0, stop=("\nSpeaker ",)
)
SYSTEM = "Write the next turn of Speaker 2: one to three sentences, and nothing else."
# Arm of the study -> what its row in tables is called.
ARMS = {"without": "{model}", "canary": "{model} with Canary", "random": "{model} with random RoTs"}


@dataclasses.dataclass(frozen=True)
class Steered:
    """A context, Canary's label and RoTs, and the RoTs of the context `random_from`."""

    id: str
    turns: tuple[str, ...]
    label: str
    rots: tuple[str, ...]
    random_rots: tuple[str, ...] = ()
    random_from: str = ""


def last_contexts(path: Any, split: str) -> list[pairs.Dialogue]:
    """Return the last context of each dialogue of ProsocialDialog; ids as in `canary eval`."""
    found = []
    for dialogue in readers.read_prosocial(path, split):
        texts = [text for turn in dialogue.turns for text in (turn.context, turn.response)]
        number = len(dialogue.turns) - 1
        found.append(pairs.Dialogue(f"{dialogue.id}-{number}", tuple(texts[:-1])))
    return found


def read_labels(path: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return {id: (label, RoTs)} of the lines that `canary label` writes. Raises DataError."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for place, row in read_records(resolve(path)):
        rots = row.get("rots") if isinstance(row, dict) else None
        good = isinstance(rots, list) and all(isinstance(rot, str) for rot in rots)
        if not good or not isinstance(row.get("label"), str) or row.get("id") is None:
            raise place.error(
                "no label with RoTs", shown(row), "{id, label, rots} of `canary label` with RoTs"
            )
        found[str(row["id"])] = (row["label"], tuple(rot for rot in rots if rot.strip()))
    return found


def drawn(
    contexts: Iterable[pairs.Dialogue],
    labels: dict[str, tuple[str, tuple[str, ...]]],
    count: int,
    seed: int,
    dropped: Counter,
) -> list[Steered]:
    """Return `count` contexts that are not casual, drawn by seed, each with another one's RoTs.

    Raises UserError if there are fewer, or if no other context has other RoTs.
    """
    usable = {}
    for one in contexts:
        label, rots = labels.get(one.id, ("", ()))
        if not label:
            dropped["no label"] += 1
        elif label.strip("_") == "casual":
            dropped["casual"] += 1
        elif not rots:
            dropped["no RoTs"] += 1
        else:
            usable[one.id] = Steered(one.id, one.turns, label, rots)
    chosen = [usable[name] for name in pairs.sample(usable, count, seed)]
    made = []
    for place, one in enumerate(chosen):
        # The next one with other RoTs, in the drawn order, which is random.
        others = (*chosen[place + 1 :], *chosen[:place])
        other = next((two for two in others if two.rots != one.rots), None)
        if other is None:
            raise UserError("all drawn contexts have the same RoTs: draw more", setting="items")
        made.append(dataclasses.replace(one, random_rots=other.rots, random_from=other.id))
    return made


def prompt(one: Steered, arm: str) -> str:
    """Return the paper's prompt of an arm of the study (appendix D.2)."""
    rots = {"without": (), "canary": one.rots, "random": one.random_rots}[arm]
    return prompts.guided(one.turns, rots)


def stage(one: Steered, arm: str, temperature: float) -> Stage:
    """Return the model's answer to one context, or Rejected for an empty one."""
    text = prompt(one, arm)
    response = yield Request(
        record_id=f"{one.id}#{arm}",
        stage="steer",
        attempt=0,
        prompt=text,
        messages=(("system", SYSTEM), ("user", text)),
        sampling=dataclasses.replace(SAMPLING, temperature=temperature),
    )
    answer = response.text.strip().removeprefix(SPEAKER).partition("\nSpeaker ")[0].strip()
    if response.fault or not answer:
        return Rejected(one.id, "steer", response.fault or "an empty answer", {})
    return answer


def task_of(
    chosen: Sequence[Steered],
    answers: Sequence[dict[str, str]],
    systems: tuple[str, str],
    seed: int,
    dropped: Counter,
) -> Task:
    """Return the task that compares two arms. Raises UserError if no pair is left."""
    preset = pages.presets()[PRESET]
    contexts = [pairs.Dialogue(one.id, one.turns, about={"label": one.label}) for one in chosen]
    items = pairs.response_items(contexts, answers, dropped)
    if not items:
        raise UserError(f"no two answers of {systems[0]} and {systems[1]} differ")
    return Task(
        pages.load(preset.page), tuple(items), seed=seed, judges_per_item=preset.judges_per_item,
        systems=systems, preset=PRESET, made_by={"left_out": dict(dropped)},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Ask the model, write the files; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.steer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_flags(
        parser,
        """
what is answered:
--input PATH  ProsocialDialog: the last context of each dialogue
--split NAME=test  of a folder
--contexts FILE  lines {id, turns}, in place of --input
--labels FILE!  what `canary label` made of `canary eval --contexts` (with RoTs)
--output FOLDER!  where the files go
--items N=600  how many contexts
--seed N=0  of the sample and of A and B
--control random|none  whether RoTs of other contexts are asked about (default: random)
--temperature T=0.9  of the answers
--quiet  print no numbers
""",
    )
    flags.add_server(parser.add_argument_group("server"))
    flags.add_limits(parser.add_argument_group("limits"))
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    return command_line.guarded(
        lambda: run(args), lambda name: f"--{name}" if hasattr(args, name) else None
    )


def run(args: argparse.Namespace) -> int:
    """Ask the model, write the files; return the exit code."""
    flags.check(args, least={"items": 2, "temperature": 0})
    if bool(args.input) == bool(args.contexts):
        raise UserError("give --input or --contexts")
    contexts = (
        list(pairs.read_contexts(args.contexts).values())
        if args.contexts
        else last_contexts(args.input, args.split)
    )
    left_out: Counter = Counter()
    chosen = drawn(contexts, read_labels(args.labels), args.items, args.seed, left_out)
    folder = Path(args.output)
    durable.make_folder(folder)
    write_atomic(
        folder / "contexts.jsonl", json_lines.lines([dataclasses.asdict(one) for one in chosen])
    )
    arms = [arm for arm in ARMS if arm != "random" or args.control != "none"]
    stages = {
        f"{one.id}#{arm}": functools.partial(stage, one, arm, args.temperature)
        for one in chosen
        for arm in arms
    }
    asked = ask_all(
        stages, flags.server(args), flags.allowance(args), folder / "calls", args.form, args.tries
    )
    if asked.stopped:
        return asked.exit_code
    for name, one in asked.rejected.items():
        log.warning("no answer to %s: %s", name, one.reason)
    answers = {arm: _answers(chosen, arm, asked.results) for arm in arms}
    for arm, found in answers.items():
        lines = [{"id": name, "prediction": text} for name, text in found.items()]
        write_atomic(folder / f"{arm}.jsonl", json_lines.lines(lines))
    written = []
    for first, second in (("without", "canary"), ("canary", "random")):
        if second not in arms:
            continue
        systems = tuple(ARMS[arm].format(model=args.model) for arm in (first, second))
        dropped: Counter = Counter()
        made = task_of(chosen, (answers[first], answers[second]), systems, args.seed, dropped)
        path = folder / f"task_{second}.jsonl"
        write_task(path, made)
        lost = "".join(f"; left out: {number} x {why}" for why, number in dropped.items())
        written.append(f"{path}: {len(made.items)} pairs of {' and '.join(systems)}{lost}")
    if not args.quiet:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in left_out.items())
        print(f"{len(chosen):,} contexts drawn (left out before: {reasons or 'none'})")
        print("\n".join(written))
    return 0


def _answers(chosen: Sequence[Steered], arm: str, results: dict[str, str]) -> dict[str, str]:
    names = {one.id: f"{one.id}#{arm}" for one in chosen}
    return {name: results[key] for name, key in names.items() if key in results}


if __name__ == "__main__":
    sys.exit(main())
