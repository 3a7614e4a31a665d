"""Print the numbers that the papers give of a corpus: `python -m tools.dataset_stats PATH...`.

A PATH is a file, a folder or a glob of one corpus. Known are SODA, ProsocialDialog (the hub's rows
or the direct download), DailyDialog, EmpatheticDialogues, BlendedSkillTalk, Topical-Chat,
PersonaChat, Wizard of Wikipedia, Holl-E, MIC, and lines {"turns": [...]}. Each PATH is a row of one
table, with the papers' row below it (of the whole corpus, or its training set). For ProsocialDialog
it also prints rules of thumb (RoTs) a dialogue and their 3-grams, safety labels by turn,
transitions, the annotators' agreement and sources. `--plot` or `--output` draws them.

Turns are utterances. Words stand between spaces; DailyDialog's punctuation stands apart, and counts
as words. MTLD is the mean over the dialogues in which a word occurs twice, of their words in lower
case, not lemmatized.

A record that cannot be used is counted and its reason shown. A dialogue that lacks rows, at the
edge of a sample for instance, counts for labels and RoTs only. The exit code is 1 if there was no
dialogue at all, or if anything was left out and `--strict` was given.
"""

import argparse
import dataclasses
import glob
import importlib.util
import json
import logging
import pathlib
import sys
from typing import Any

from cosmo.engine.base import command_line
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, UserError
from cosmo.engine.base.progress import Progress
from cosmo.engine.base.tables import text_table
from cosmo.tasks.paper_tables import PROSOCIAL, STATISTICS
from cosmo.tasks.recognize import looks_like
from tools.corpus_files import READERS, read
from tools.corpus_stats import Corpus, all_transitions

# In the order in which `_twice` prefers them.
_ENDINGS = ("jsonl", "json", "ndjson", "parquet", "csv", "txt")
# Files that data_pipeline writes beside its dialogues.
_NO_DIALOGUES = ("rejected.jsonl", "provenance.jsonl", "report.json")


class _Watched:
    """A file that counts the bytes read, from which the time left is estimated."""

    def __init__(self, path: pathlib.Path):
        self.path, self.name, self.parent = path, path.name, path.parent
        # Size and position of the stored bytes: the size of a packed content is not
        # known.
        self.size, self.stream = path.stat().st_size, None

    def open(self, mode: str) -> Any:
        self.stream = self.path.open(mode)
        return self.stream

    def position(self) -> int:
        """Return the bytes read so far."""
        if self.stream is None:
            return 0
        return self.size if self.stream.closed else self.stream.tell()

    def __str__(self) -> str:
        return str(self.path)


def files_of(path: str) -> list[pathlib.Path]:
    """Return the data files of a file, a folder or a glob, by name; DataError if there is none."""
    place = pathlib.Path(path).expanduser()
    if place.is_file():
        return [place]
    names = glob.glob(str(place), recursive=True) if not place.is_dir() else place.rglob("*")
    endings = tuple(f".{e}{gz}" for e in _ENDINGS for gz in ("", ".gz"))
    # Sorted, so that the faults quoted are the same on every machine.
    found = sorted(p for p in map(pathlib.Path, names) if p.is_file())
    # Hidden files are unfinished writes, or belong to the system.
    data = [p for p in found if p.name.endswith(endings) and not p.name.startswith(".")]
    if not data:
        raise DataError.at(
            path,
            None,
            "no data",
            got=f"{len(found)} files" if found or place.exists() else "nothing there",
            expected=f"a file, a folder or a glob of files that end in {', '.join(_ENDINGS)}",
            remedy="Correct the path.",
        )
    return data


@dataclasses.dataclass(frozen=True)
class Found:
    """A PATH and the files found there.

    `files` are of `corpus` (a key of READERS); `left_out` are the others ("FILE: why").
    """

    path: str
    corpus: str
    files: tuple[pathlib.Path, ...]
    not_read: tuple[pathlib.Path, ...]
    left_out: tuple[str, ...] = ()


def find(path: str) -> Found:
    """Return the files of the one corpus that `path` holds; DataError for none or several.

    Files that `data_pipeline` writes beside its dialogues are left out of a folder or a glob. So is
    a file that is there in another format too.
    """
    kinds = {file: looks_like(file) for file in files_of(path)}
    left_out = _twice(kinds)
    # A file that is named alone is read, whatever its name.
    if set(kinds) - {pathlib.Path(path).expanduser()}:
        reason = "no dialogues of the corpus (data_pipeline writes it beside them)"
        left_out |= {file: reason for file in kinds if file.name in _NO_DIALOGUES}
    if len(left_out) < len(kinds):
        kinds = {file: kind for file, kind in kinds.items() if file not in left_out}
    else:  # asked for nothing else
        left_out = {}
    known = sorted({kind for kind in kinds.values() if kind in READERS})
    if len(known) != 1:
        raise DataError.at(
            path,
            None,
            "several corpora" if known else "not a corpus of dialogues",
            got="; ".join(f"{file.name}: {kind or _unknown(file)}" for file, kind in kinds.items()),
            expected=f"files of one of {', '.join(READERS)}",
            remedy="Give each corpus as a path of its own." if known else "Correct the path.",
        )
    ours, others = (
        tuple(file for file, kind in kinds.items() if (kind == known[0]) is wanted)
        for wanted in (True, False)
    )
    said = tuple(f"{file}: {reason}" for file, reason in left_out.items())
    return Found(path, known[0], ours, others, said)


def _twice(kinds: dict[pathlib.Path, str | None]) -> dict[pathlib.Path, str]:
    """Return {file: reason} of files that repeat one of the same folder, stem and corpus.

    The one kept is of the format that stands first in _ENDINGS, plain rather than compressed.
    """
    kept: dict[Any, pathlib.Path] = {}
    reasons = {}
    endings = [f"{e}{gz}" for gz in ("", ".gz") for e in _ENDINGS]

    def parts(file: pathlib.Path) -> tuple[int, str]:
        rank = next((i for i, e in enumerate(endings) if file.name.endswith(f".{e}")), 0)
        return rank, file.name.removesuffix(f".{endings[rank]}")

    for file in sorted((f for f in kinds if kinds[f] in READERS), key=parts):
        first = kept.setdefault((file.parent, parts(file)[1], kinds[file]), file)
        if first is not file:
            reasons[file] = f"the same data as {first.name}"
    return reasons


def _unknown(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        # As much as `looks_like` has read.
        return "nothing known" if stream.read(1 << 16).strip() else "is empty"


def statistics(found: Found) -> dict[str, Any]:
    """Read all dialogues, with progress. Return their statistics as JSON values."""
    # Running sums: a corpus of any size fits in memory.
    corpus, files = Corpus(), [_Watched(file) for file in found.files]
    size = sum(file.size for file in files)
    progress = Progress(None, unit="dialogue")
    for done, item in enumerate(read(files, found.corpus), 1):
        corpus.add(item)
        # Asking every file for its position costs more than counting a dialogue.
        if done % 256 == 0:
            part = sum(file.position() for file in files) / max(size, 1)
            progress.total = round(done / part) if part else None  # as the bytes so far suggest
            progress.update(done, pathlib.Path(found.path).name)
    progress.finish()
    return {
        "path": found.path,
        # Both forms are one corpus, with one row of the papers.
        "corpus": found.corpus.removesuffix(" (direct download)"),
        "files": len(files),
        "not_read": [str(file) for file in found.not_read],
        "left_out": list(found.left_out),
        **corpus.result(),
    }


def table(made: list[dict[str, Any]]) -> str:
    """Return a table with a row for each corpus, and the papers'."""
    rows = [["", *STATISTICS["columns"]]]
    for one in made:
        rots = one["rots"] or {}
        rows.append(
            [
                pathlib.Path(one["path"]).name,
                f"{one['dialogues']:,}",
                f"{one['utterances']:,}",
                *(_one(one[k]) for k in ("average_turns", "average_utterance_words", "mtld")),
                *(f"{rots[k]:,}" if rots else "-" for k in ("total", "unique")),
                _one(rots.get("average_words")),
            ]
        )
        if one["corpus"] in STATISTICS:
            # RoTs are ProsocialDialog's alone, so other rows are shorter.
            cells = STATISTICS[one["corpus"]]
            rows.append([f"  papers: {one['corpus']}", *cells, *["-"] * (8 - len(cells))])
    return text_table(rows)


def notes(one: dict[str, Any]) -> list[str]:
    """Return lines about everything left out of a corpus, with the reasons."""
    lines = []
    missing = one["incomplete_dialogues"]
    if missing:
        what = ", ".join(f"{number:,} lack the {part}" for part, number in missing.items())
        lines.append(
            f"{sum(missing.values()):,} incomplete dialogues: {what}; only their rows count"
        )
    if one["bad_records"]:
        number = one["bad_records"]
        lines.append("1 bad record:" if number == 1 else f"{number:,} bad records; the first:")
        lines += [f"  {reason}" for reason in one["bad_records_quoted"]]
    if one["not_read"]:
        lines.append(f"not read, for they are not {one['corpus']}: {', '.join(one['not_read'])}")
    lines += [f"left out {line}" for line in one["left_out"]]
    return lines


def safety_tables(one: dict[str, Any]) -> str:
    """Return tables of a ProsocialDialog corpus: labels, transitions, votes and sources."""
    safety = one["safety"]
    rows = [["label, % of rows", "all", *(f"turn {x['turn']}" for x in safety["by_turn"])]]
    # All turns first, then each turn, as in figure 4 of the paper.
    columns = [safety["overall"], *(x["counts"] for x in safety["by_turn"])]
    for i, label in enumerate(safety["labels"]):
        rows.append([label, *(_share(c[i], sum(c)) for c in columns)])
    rows.append(["rows", *(f"{sum(c):,}" for c in columns)])
    parts = [text_table(rows)]
    counts = all_transitions(safety)
    # Whole labels would make the table wider than a terminal.
    short = [label.strip("_").removesuffix("_needs_caution") for label in safety["labels"]]
    rows = [["from (down) to the next turn's, %", *short, "rows"]]
    for i, label in enumerate(safety["labels"]):
        shares = [_share(int(c), int(counts[i].sum())) for c in counts[i]]
        rows.append([label, *shares, f"{counts[i].sum():,}"])
    parts.append(text_table(rows))
    votes = safety["votes"]
    per, unique = (one["rots"][name] for name in ("per_dialogue", "unique_3grams"))
    paper = dict(
        zip(PROSOCIAL["rots"]["columns"], PROSOCIAL["rots"]["ProsocialDialog"], strict=True)
    )
    lines = [
        f"RoTs: {_one(per)} a dialogue (paper: {paper['RoTs a dialogue']}); of their 3-grams "
        f"{_one(None if unique is None else 100 * unique)}% are different (paper: "
        f"{paper['unique 3-grams']}%)",
        f"votes: {votes['rows']:,} rows with three; Krippendorff's alpha "
        f"{_two(votes['alpha_nominal'])} nominal, {_two(votes['alpha_ordinal'])} ordinal "
        "(paper: 0.49)",
        f"label that its votes do not give (appendix A.4): {votes['label_differs']:,} rows",
        *(f"  {place}" for place in votes["differing"]),
        f"rows that need RoTs and have none: {safety['rows_that_lack_rots']:,}; casual rows that "
        f"have some: {safety['casual_rows_with_rots']:,}",
        "sources, % of dialogues: "
        + ", ".join(
            f"{source} {_share(number, sum(safety['sources'].values()))}"
            for source, number in safety["sources"].items()
        )
        + " (paper: Social Chemistry 62, SBIC 21, ETHICS 17)",
    ]
    return "\n\n".join([*parts, "\n".join(lines)])


def text(made: list[dict[str, Any]]) -> str:
    """Return all tables and notes as text."""
    parts = [table(made)]
    for one in made:
        said = notes(one)
        if said:
            parts.append("\n".join([f"{one['path']}:", *(f"  {line}" for line in said)]))
        if one["safety"]:
            parts += [f"{one['path']}:", safety_tables(one)]
    return "\n\n".join(parts) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _one(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _check_extras(paths: list[Found], args: argparse.Namespace) -> None:
    """Raise UserError for a flag that would fail only after everything has been read."""
    labelled = [found for found in paths if found.corpus.startswith("ProsocialDialog")]
    # One file of a name shows one corpus; --output draws all of them.
    if args.plot and len(labelled) != 1:
        raise UserError(f"--plot={args.plot} draws one ProsocialDialog: got {len(labelled)}")
    # Agreement is computed for every ProsocialDialog; a plot only where it is asked for.
    needs = {"krippendorff": "stats"} if labelled else {}
    if labelled and (args.plot or args.output):
        needs["matplotlib"] = "plot"
    for module, extra in needs.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install -e '.[{extra}]'")


def _write(made: list[dict[str, Any]], args: argparse.Namespace) -> list[pathlib.Path]:
    """Write the files that were asked for, and return their paths. Raises UserError, OSError."""
    labelled = [one for one in made if one["safety"]]
    drawn = {args.plot: labelled[0]} if args.plot and labelled else {}
    written = []
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, content in (("json", json.dumps(made, indent=1) + "\n"), ("txt", text(made))):
            written.append(args.output / f"statistics.{name}")
            write_atomic(written[-1], content)
        for number, one in enumerate(labelled):
            drawn[args.output / f"labels{number or ''}.png"] = one
    if drawn:
        # Here, because matplotlib is an extra and takes a second to load.
        from tools.plot_labels import plot

        for path, one in drawn.items():
            plot(one["safety"], path, title=f"Safety labels of {pathlib.Path(one['path']).name}")
    return [*written, *drawn]


def main(argv: list[str] | None = None) -> int:
    """Count every PATH and print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dataset_stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, a folder or a glob")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", type=pathlib.Path, help="labels as a PNG")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=pathlib.Path,
        help="statistics.json, statistics.txt, and labels.png for each ProsocialDialog",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if anything is left out")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cosmo").setLevel(logging.INFO)  # progress, where stderr is no terminal
    return command_line.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Count, print and write; return the exit code."""
    # All are found before one is read: a typo in the last must not cost the first.
    paths = [find(path) for path in args.paths]
    _check_extras(paths, args)
    made = [statistics(found) for found in paths]
    # Written before anything is printed: a closed pipe must cost no file.
    written = _write(made, args)
    print(json.dumps(made, indent=1) if args.json else text(made).rstrip("\n"), flush=True)
    for path in written:
        # stdout is the table or the JSON alone.
        print(path, file=sys.stderr)
    # A corpus without a dialogue is a wrong path, so it fails without --strict too.
    empty = [one["path"] for one in made if not one["dialogues"] and not one["safety"]]
    if empty:
        print(f"error: no dialogue in {', '.join(empty)}", file=sys.stderr)
    return int(bool(empty) or (args.strict and any(map(notes, made))))


if __name__ == "__main__":
    sys.exit(main())
