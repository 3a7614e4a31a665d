"""Sample pairs to compare, by seed.

--a and --b are each a file of predictions, a corpus for the page `dialogues`, or MODEL@URL.
Predictions are lines {id, inputs, targets, prediction}, as `cosmo infer` writes them. A model is
asked about the sampled contexts alone (--contexts). A preset has a study's page and numbers.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from data_pipeline.annotation import pages, pairs
from data_pipeline.annotation.ask import ask_all
from data_pipeline.annotation.commands import common
from data_pipeline.calls import flags

log = logging.getLogger("data_pipeline")

FLAGS = """
what is compared:
--a SOURCE!  the first system: predictions, a corpus, or MODEL@URL
--b SOURCE!  the second one
--systems A,B  their names (default: those of files, or the models)
--contexts FILE  lines {id, turns, narrative} (default: the inputs of the predictions)
--turn_mark TEXT  stands between turns in the predictions' inputs (default: <turn>, // or a newline)
--split NAME=test  of corpora
--prompt agent|instructgpt|chatgpt  how models are asked: ours, or by the SODA paper's words
--output FILE!  the task file
which:
--preset NAME  {presets}
--page NAME  {pages}, or a page of your own (.toml; default: the preset's)
--items N:int  how many (default: the preset's)
--min_turns N=1  of a context or dialogue
--labels FILE  lines {id, label} of `canary label`: contexts that are casual are left out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate pairs`."""
    parser.description = __doc__
    compared = [name for name in pages.names() if "options" in pages.load(name).shows]
    table = FLAGS.replace("{presets}", ", ".join(pages.presets()))
    add_flags(parser, table.replace("{pages}", ", ".join(compared)) + common.STUDY_FLAGS)
    group = parser.add_argument_group("models")
    flags.add_calls(group)
    flags.add_limits(group)


def run_pairs(args: argparse.Namespace) -> int:
    """Write the task file; return the exit code."""
    flags.check(args, (), {"items": 1, "min_turns": 1, "judges_per_item": 1})
    preset = _preset(args.preset)
    if args.prompt and not (_model(args.a) or _model(args.b)):
        raise UserError("no model is asked: leave it out, or give MODEL@URL", setting="prompt")
    name = args.page or (preset and preset.page)
    if not name:
        raise UserError("give --preset or --page")
    page = pages.load(name, preset.questions if preset and preset.page == name else ())
    if "options" not in page.shows:
        raise UserError(f"--page={name} compares nothing: use `annotate make`")
    if preset and preset.not_casual and not args.labels:
        raise UserError(
            f"--preset={args.preset} takes contexts that are not casual: give --labels, which "
            "`canary label` writes"
        )
    count = args.items if args.items is not None else preset.items if preset else None
    judges = args.judges_per_item or (preset.judges_per_item if preset else 3)
    dropped: Counter = Counter()
    if "context" in page.shows:
        items, code = _responses(args, count, dropped)
        if code:
            return code
    else:
        items = _dialogues(args, count, dropped)
    task = common.study(
        args, page, items, judges_per_item=judges, systems=_systems(args), preset=args.preset or "",
        made_by={"a": _shown(args.a), "b": _shown(args.b), "min_turns": args.min_turns,
                 "labels": args.labels, "contexts": args.contexts, "left_out": dict(dropped),
                 **({"prompt": args.prompt} if args.prompt else {})},
    )  # fmt: skip
    common.write(Path(args.output), task, dropped, args.quiet)
    return 0


def _preset(name: str | None) -> pages.Preset | None:
    if name is not None and name not in pages.presets():
        raise UserError(f"--preset={name}: give one of {', '.join(pages.presets())}")
    return pages.presets()[name] if name else None


def _model(source: str) -> tuple[str, str] | None:
    """Return (model, address) of MODEL@URL, None for a path."""
    model, at, url = source.partition("@")
    return (model, url) if at and url.lower().startswith(("http://", "https://")) else None


def _shown(source: str) -> str:
    found = _model(source)
    # An address may hold a secret.
    return f"model {found[0]}" if found else source


def _systems(args: argparse.Namespace) -> tuple[str, ...]:
    if args.systems:
        names = tuple(name.strip() for name in args.systems.split(","))
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            raise UserError(f"--systems={args.systems}: give two different names, A,B")
        return names
    names = tuple(
        found[0] if (found := _model(source)) else Path(source).stem or source
        for source in (args.a, args.b)
    )
    if names[0] == names[1]:
        raise UserError(f"both systems would be named {names[0]!r}: give --systems=A,B")
    return names


def _responses(args: argparse.Namespace, count: int | None, dropped: Counter) -> tuple[list, int]:
    """Return the items of responses, and an exit code if the calls to a model stopped early."""
    if args.a == args.b and not _model(args.a):
        raise UserError(f"--a and --b are one file, {args.a}: give two systems' predictions")
    files = {source: pairs.read_predictions(source)
             for source in (args.a, args.b) if not _model(source)}  # fmt: skip
    contexts = pairs.contexts_of(files, args.contexts, args.turn_mark)
    labels = pairs.read_labels(args.labels) if args.labels else None
    kept = {d.id: d for d in pairs.filtered(contexts, args.min_turns, None, labels, dropped)}
    usable = set(kept)
    if len(files) == 2:
        # Before the sample, so that it keeps its size. A model's responses are not known yet.
        texts = [{k: p.prediction for k, p in files[s].items()} for s in (args.a, args.b)]
        usable = {i.id for i in pairs.response_items(list(kept.values()), texts, dropped)}
    drawn = [kept[name] for name in pairs.sample(usable, count, args.seed, dropped)]
    answers: list[Mapping[str, str]] = []
    for letter, source in (("a", args.a), ("b", args.b)):
        if source in files:
            answers.append({name: p.prediction for name, p in files[source].items()})
            continue
        model, url = _model(source)
        stage = pairs.agent_stage
        if args.prompt not in (None, "agent"):
            stage = functools.partial(pairs.paper_stage, name=args.prompt)
        journal = Path(f"{args.output}.calls") / letter
        asked = ask_all(
            {one.id: functools.partial(stage, one) for one in drawn},
            flags.server(args, url, model), flags.allowance(args), journal, args.form, args.tries,
        )  # fmt: skip
        if asked.stopped:
            return [], asked.exit_code
        for one in asked.rejected.values():
            log.warning("%s gave no response to %s: %s", model, one.id, one.reason)
        answers.append(asked.results)
    return pairs.response_items(drawn, answers, dropped if len(files) < 2 else Counter()), 0


def _dialogues(args: argparse.Namespace, count: int | None, dropped: Counter) -> list:
    drawn = []
    for number, path in enumerate((args.a, args.b)):
        if _model(path):
            raise UserError(f"a corpus is needed for the page dialogues, not a model: {path}")
        found = pairs.read_dialogues(path, args.split, dropped)
        by_id = {one.id: one for one in pairs.filtered(found, args.min_turns, dropped=dropped)}
        # Each corpus has a draw of its own, else equal ids would always meet.
        names = pairs.sample(by_id, count, 2 * args.seed + number, dropped)
        drawn.append([by_id[name] for name in names])
    size = min(map(len, drawn))
    return pairs.dialogue_items(drawn[0][:size], drawn[1][:size])
