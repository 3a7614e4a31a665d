"""Compare the emotions of corpora by GoEmotions' labels: `python -m tools.emotions`.

Table 4 of Kim et al. 2023 and figure 3 of Kim et al. 2022, by labels of GoEmotions' 27 emotions and
neutral (Demszky et al. 2020). Two steps:

  python -m tools.emotions --corpus=PATH --utterances=FILE     lines {id, text} to label
  python -m tools.emotions --labels FILE FILE ...              lines {id, label}: the tables

--classifier=CKPT labels the utterances of the first step: a run of gin/canary/goemotions.gin, or a
folder of transformers with a sequence classifier of these labels. Any other classifier may label
the file between both steps.

--emotional takes the utterances of table 4: DailyDialog's with an emotion, BlendedSkillTalk's of
dialogues from EmpatheticDialogues, SODA's of xReact triples. --items=10000 draws as many by seed.
Without both, all utterances are written, as for figure 3. Neutral ones are in neither table. A file
of labels is a row, named as the file: DailyDialog.jsonl stands beside the paper's DailyDialog.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import command_line, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.engine.base.tables import text_table
from cosmo.tasks import conversations, readers
from cosmo.tasks.files import files_for_split
from cosmo.tasks.goemotions import EMOTIONS, GROUPS, LABELS, NEUTRAL, TASK
from cosmo.tasks.paper_tables import PROSOCIAL, SODA
from cosmo.tasks.recognize import looks_like
from cosmo.tasks.record_files import read_records
from tools import corpus_files, dataset_stats

COLOURS = {"positive": "#4477aa", "ambiguous": "#bbbbbb", "negative": "#ee8833"}
_EMPATHETIC = "empathetic_dialogues"  # BlendedSkillTalk's name of the corpus


def utterances(path: str) -> Iterator[str]:
    """Yield every utterance of the dialogues under `path`. Raises DataError for a bad record."""
    found = dataset_stats.find(path)
    for one in corpus_files.read(found.files, found.corpus):
        if isinstance(one, DataError):
            raise one
        yield from one.utterances


def emotional_utterances(path: str, split: str) -> Iterator[str]:
    """Yield the utterances that table 4 takes. Raises DataError for another corpus."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    kinds = {kind for file in files if file.is_file() and (kind := looks_like(file))}
    if "DailyDialog" in kinds:
        for one, emotions in conversations.read_dailydialog_emotions(path, split):
            yield from (text for text, kind in zip(one.turns, emotions, strict=True) if kind)
    elif "BlendedSkillTalk" in kinds:
        for file in files_for_split(path, split):
            for where, row in read_records(file):
                one = conversations.blended_conversation(row, where)
                if row.get("context_dataset") == _EMPATHETIC:
                    yield from one.turns
    elif "SODA" in kinds:
        for file in files_for_split(path, split):
            for where, row in read_records(file):
                one = readers.soda_dialogue(row, where, "")
                if row.get("relation") == "xReact":
                    yield from one.dialogue
    else:
        raise DataError.at(
            path, None, "no corpus of table 4", got=", ".join(sorted(kinds)) or "nothing known",
            expected="DailyDialog, BlendedSkillTalk or SODA", remedy="Leave out --emotional.",
        )  # fmt: skip


def drawn(texts: Iterator[str], count: int | None, seed: int) -> list[dict[str, str]]:
    """Return lines {id, text}: all, or `count` by a seeded hash of the ids, in the file's order."""
    numbered = ((str(number), text) for number, text in enumerate(texts))
    if count is not None:
        chosen = heapq.nsmallest(count, numbered, key=lambda one: fraction_bits(seed, "s", one[0]))
        if len(chosen) < count:
            raise UserError(f"only {len(chosen)} of {count} utterances can be drawn: give fewer")
        numbered = iter(sorted(chosen, key=lambda one: int(one[0])))
    return [{"id": name, "text": text} for name, text in numbered]


def labelled(lines: Sequence[Mapping[str, str]], path: str) -> list[dict[str, str]]:
    """Return the lines with the label that a checkpoint gives each text. Raises UserError."""
    from canary import classifier  # loads JAX, which the tables do not need

    model = classifier.load(path, TASK)
    words = model.words_of([(line["text"],) for line in lines])
    return [{**line, "label": word} for line, word in zip(lines, words, strict=True)]


def read_labels(path: Path) -> Counter[str]:
    """Return how often each label occurs in the lines {id, label} of a file. Raises DataError."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for place, row in read_records(path):
        label = row.get("label") if isinstance(row, Mapping) else None
        if label not in LABELS:
            expected = f"one of {', '.join(LABELS)}"
            raise place.error("field 'label' has an unknown value", shown(label), expected)
        name = str(row.get("id"))
        if name in seen:
            raise place.error("an id twice", shown(name), "a line for each utterance")
        seen.add(name)
        counts[label] += 1
    if not counts:
        raise DataError.at(
            path, None, "no labels", got="an empty file", expected="lines {id, label}",
            remedy="Correct the path.",
        )  # fmt: skip
    return counts


def report(counts: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Return for each corpus the shares of emotions and groups, in percent, as JSON values."""
    made = {}
    for name, found in counts.items():
        labelled = sum(found[emotion] for emotion in EMOTIONS)
        scale = 100 / max(labelled, 1)
        made[name] = {
            "utterances": sum(found.values()),
            "neutral": found[NEUTRAL],
            "emotions": {emotion: scale * found[emotion] for emotion in EMOTIONS},
            "groups": {
                group: scale * sum(found[emotion] for emotion in names)
                for group, names in GROUPS.items()
            },
        }
    return made


def text(made: Mapping[str, Any]) -> str:
    """Return both tables, with the papers' columns and rows."""
    papers = ("DailyDialog", "BlendedSkillTalk", "SODA")
    rows = [["table 4, %", *made, *(f"paper: {name}" for name in papers)]]
    for emotion in EMOTIONS:
        published = SODA["emotions"].get(emotion, ["-"] * len(papers))
        ours = [f"{one['emotions'][emotion]:.2f}" for one in made.values()]
        rows.append([emotion, *ours, *(p if p == "-" else f"{p:.2f}" for p in published)])
    for name in ("utterances", "neutral"):
        rows.append([name, *(f"{one[name]:,}" for one in made.values()), *["-"] * len(papers)])
    groups = [["figure 3, %", *GROUPS]]
    for name, one in made.items():
        groups.append([name, *(f"{one['groups'][group]:.1f}" for group in GROUPS)])
    for name, shares in PROSOCIAL["polarity"].items():
        if name != "columns":
            groups.append([f"paper: {name}", *map(str, shares)])
    return f"{text_table(rows)}\n\n{text_table(groups)}\n"


def plot(made: Mapping[str, Any], output: Path) -> None:
    """Draw the groups of each corpus, ours and the paper's, as in figure 3. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    import matplotlib.pyplot as plt

    bars = {name: [one["groups"][g] for g in GROUPS] for name, one in made.items()}
    columns = PROSOCIAL["polarity"]["columns"]
    for name, shares in PROSOCIAL["polarity"].items():
        if name != "columns":
            bars[f"{name} (paper)"] = [shares[columns.index(group)] for group in GROUPS]
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.42 * len(bars)), layout="constrained")
    for row, shares in enumerate(bars.values()):
        left = 0.0
        for (group, colour), share in zip(COLOURS.items(), shares, strict=True):
            axes.barh(row, share, left=left, color=colour, label=group if row == 0 else None)
            if share >= 4:  # a smaller part has no room for its number
                axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center")
            left += share
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of utterances that are not neutral")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png")
    plt.close(figure)
    write_atomic(output, png.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Write utterances or print the tables; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.emotions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", metavar="PATH", help="a corpus of dialogues")
    parser.add_argument("--utterances", metavar="FILE", type=Path, help="gets {id, text}")
    parser.add_argument("--emotional", action="store_true", help="those that table 4 takes")
    parser.add_argument("--split", default="train", help="with --emotional (%(default)s)")
    parser.add_argument("--items", type=int, metavar="N", help="how many (all)")
    parser.add_argument("--classifier", metavar="CKPT", help="labels the utterances")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--labels", nargs="+", metavar="FILE", type=Path, default=[])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="figure 3 as a PNG")
    args = parser.parse_args(argv)
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Write utterances or print the tables; return the exit code."""
    if bool(args.corpus) != bool(args.utterances) or bool(args.corpus) == bool(args.labels):
        raise UserError("give --corpus and --utterances, or --labels")
    if args.classifier and not args.corpus:
        raise UserError("--classifier labels the utterances of --corpus: give it too")
    if args.items is not None and args.items < 1:
        raise UserError(f"--items={args.items}: give 1 or more")
    if args.corpus:
        found = (
            emotional_utterances(args.corpus, args.split)
            if args.emotional
            else utterances(args.corpus)
        )
        lines = drawn(found, args.items, args.seed)
        if args.classifier:
            lines = labelled(lines, args.classifier)
        write_atomic(args.utterances, json_lines.lines(lines))
        print(f"{args.utterances}: {len(lines):,} utterances")
        return 0
    names = _names(args.labels)
    made = report({name: read_labels(path) for name, path in names.items()})
    if args.plot:
        plot(made, args.plot)
    print(json.dumps(made, indent=1) if args.json else text(made).rstrip("\n"))
    return 0


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    names = {path.stem: path for path in paths}
    if len(names) < len(paths):
        raise UserError("two files of labels have one name: rename one")
    return names


if __name__ == "__main__":
    sys.exit(main())
