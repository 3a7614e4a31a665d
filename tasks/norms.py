"""Read corpora of social norms, which Canary may learn before ProsocialDialog.

Kim et al. 2022, appendix B.1:

- Social Chemistry 101 (Forbes et al. 2020): a situation to its rule of thumb (RoT).
- MIC, the Moral Integrity Corpus (Ziems et al. 2022): a question and its answer to the RoT.
- Commonsense Norm Bank (Jiang et al. 2021, Delphi): a situation to a judgement.

The Norm Bank has two forms. The released tables have `input_sequence`, `class_label` (1 good,
0 discretionary, -1 bad) and `text_label` for the free-form and the yes/no task. For the relative
task they have `action_1`, `action_2` and `targets` (1 or 2, the better one). The tables that
Delphi was trained on have `inputs` and `targets`.

The Norm Bank's datasheet is the source of the columns, and of splits as file prefixes. The relative
task is given out on request only. Delphi's published code is the source of the tasks' names and of
the texts. An input begins with `[moral_single]: ` or `[moral_pair]: `, and a target is
`[class]1[/class] [text]It's good[/text]`. None of the corpora was at hand. The
readers were tested on files written after these descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks import recognize
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import TABLES, all_files, files_for_split, resolve, split_names
from cosmo.tasks.formatting import Example
from cosmo.tasks.recognize import naming_other_corpus
from cosmo.tasks.record_files import missing_column, read_table, refuse_empty

# The Norm Bank's tasks, and the names that their folders and files go by.
NORM_BANK = {
    "free_form": ("moral_acceptability", "freeform", "free_form"),
    "yes_no": ("moral_agreement", "yesno", "yes_no"),
    "relative": ("moral_comparison", "relative", "compare"),
}
# Delphi's earlier tables, and its pairs, write tags in angle brackets. T5's vocabulary has no piece
# for these, so they become square ones.
_TAG = re.compile(r"<(/?(?:class|text|action[12]))>")


def social_chemistry_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield the situations and RoTs of `split` in `social-chem-101.v1.0.tsv`, in file order.

    The rows' own `split` counts (`train`, `dev`, `test`; the others belong to no split). Ids are
    `social_chemistry-SPLIT-N`. Raises DataError for a missing path or column, an empty text.
    """
    columns = ("split", "rot-bad", "situation", "rot", "rot-id")
    seen: set[str] = set()
    for file in all_files(path, split, TABLES):
        with naming_other_corpus(file, "Social Chemistry 101"):
            for place, row in read_table(file, "\t", columns):
                # As its publishers do, RoTs that an annotator marked as bad are left out.
                if row["split"] not in split_names(split) or row["rot-bad"] not in ("0", "0.0"):
                    continue
                # A RoT has a row for each annotator who broke it down, and is used once.
                if row["rot-id"] in seen:
                    continue
                id = f"social_chemistry-{split}-{len(seen)}"
                turns = (_text(row, "situation", place),)
                seen.add(row["rot-id"])
                yield Example(id, "", "", turns, _text(row, "rot", place))
    refuse_empty(path, split, len(seen))


def mic_examples(path: Any, split: str = "train") -> Iterator[Example]:
    """Yield the questions, answers and RoTs of `split` in `MIC.csv`, in file order.

    Columns are `Q`, `A`, `rot`, `split`; the rows' own `split` counts. Several RoTs of one answer
    are several examples. Ids are `mic-SPLIT-N`. Raises DataError for a missing path or column, an
    empty text.
    """
    count = 0
    for file in all_files(path, split, TABLES):
        with naming_other_corpus(file, "MIC"):
            for place, row in read_table(file, ",", ("Q", "A", "rot", "split")):
                if row["split"] not in split_names(split):
                    continue
                turns = (_text(row, "Q", place), _text(row, "A", place))
                yield Example(f"mic-{split}-{count}", "", "", turns, _text(row, "rot", place))
                count += 1
    refuse_empty(path, split, count)


def norm_bank_examples(path: Any, task: str, split: str = "train") -> Iterator[Example]:
    """Yield the examples of one of NORM_BANK's tasks, in file order.

    Ids are `norm_bank-TASK-SPLIT-N`. Raises DataError for a missing path or column, an empty text
    or an unknown class.
    """
    count = 0
    for file in norm_bank_files(path, task, split):
        with naming_other_corpus(file, *recognize.NORM_BANK):
            # Columns are checked row by row, because the two forms have different ones.
            for place, row in read_table(file, "\t"):
                inputs, target = _judgement(row, task, place)
                yield Example(f"norm_bank-{task}-{split}-{count}", "", "", (inputs,), target)
                count += 1
    refuse_empty(path, split, count)


def norm_bank_files(path: Any, task: str, split: str) -> list[Any]:
    """Return the files of a task's split; raise DataError if there are none.

    `path` is a mapping from task to path, or the folder of all tasks. In the folder a task has a
    folder of its own (`moral_acceptability/train*.tsv`) or files
    (`train.moral_acceptability.tsv`), by one of the names in NORM_BANK.
    """
    if isinstance(path, Mapping):
        if task in path:
            return files_for_split(path[task], split, TABLES)
    elif path and resolve(path).is_dir():
        # The datasheet and Delphi's code have names of their own for a task.
        for name in NORM_BANK[task]:
            folder = resolve(path) / name
            if folder.is_dir():
                return files_for_split(folder, split, TABLES)
            for prefix in split_names(split):
                if (resolve(path) / f"{prefix}.{name}.tsv").exists():
                    return [resolve(path) / f"{prefix}.{name}.tsv"]
    names = NORM_BANK[task]
    raise DataError.at(
        path,
        None,
        f"no data for the Norm Bank's task {task!r}, split {split!r}",
        got=str(sorted(path)) if isinstance(path, Mapping) else "no such folder or file in it",
        expected=f"a folder {' or '.join(names)}, or files SPLIT.{names[0]}.tsv",
        remedy="Correct the path, or give a mapping from task to path. "
        "Without the relative task: MIXTURE_RATES={'norm_bank_relative': 0}.",
        setting="NORM_BANK_PATH",
    )


def _judgement(row: Mapping[str, str], task: str, place: Place) -> tuple[str, str]:
    """Return (input text, target text) of a Norm Bank row in either form; raise DataError."""
    # Both, because the relative task's released table has `targets` too.
    if "inputs" in row and "targets" in row:
        # Delphi's texts begin so, and its checkpoints expect it.
        prefix = "[moral_pair]: " if task == "relative" else "[moral_single]: "
        # Delphi's tables may have the prefix already.
        inputs = _TAG.sub(r"[\1]", _text(row, "inputs", place)).removeprefix(prefix.strip())
        return prefix + inputs.strip(), _TAG.sub(r"[\1]", _text(row, "targets", place))
    if task == "relative":
        first, second = _text(row, "action_1", place), _text(row, "action_2", place)
        better = _one_of(row, "targets", ("1", "2"), place)
        pair = f"[action1]{first}[/action1] [action2]{second}[/action2]"
        return f"[moral_pair]: {pair}", better
    inputs, text = _text(row, "input_sequence", place), _text(row, "text_label", place)
    label = _one_of(row, "class_label", ("-1", "0", "1"), place)
    return f"[moral_single]: {inputs}", f"[class]{label}[/class] [text]{text}[/text]"


def _text(row: Mapping[str, str], name: str, place: Place) -> str:
    if name not in row:
        raise missing_column(name, row, place)
    if not row[name].strip():
        raise place.error(f"column '{name}' is empty", shown(row[name]), "a text")
    return row[name].strip()


def _one_of(row: Mapping[str, str], name: str, values: tuple[str, ...], place: Place) -> str:
    value = _text(row, name, place)
    if value not in values:
        raise place.error(f"column '{name}' has an unknown value", shown(value), f"one of {values}")
    return value
