"""Pack several examples into one row, as SeqIO does, and count their tokens."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.data.cache_reading import RowFormat


@dataclasses.dataclass
class Packer:
    """Fill rows with examples in the order they come; a row ends where the next does not fit.

    Without packing every example has a row of its own.
    """

    # The rows are SeqIO's (`seqio.utils.trim_and_pack_dataset`), except that SeqIO also ends one
    # after every `max(lengths)` examples, for no reason of the model's.

    format: RowFormat

    def __post_init__(self):
        self._clear()

    def _clear(self):
        self.examples: list[tuple[np.ndarray, np.ndarray]] = []
        self.names: list[str] = []
        self.inputs = self.targets = 0

    def add(self, inputs: np.ndarray, targets: np.ndarray, name: str) -> Iterator[bytes]:
        """Take an example, int [<= format.inputs] and int [<= format.targets]; yield a full row."""
        full = (
            not self.format.packed
            or self.inputs + len(inputs) > self.format.inputs
            or self.targets + len(targets) > self.format.targets
        )
        if full:
            yield from self.finish()
        self.examples.append((inputs, targets))
        self.names.append(name)
        self.inputs += len(inputs)
        self.targets += len(targets)

    def finish(self) -> Iterator[bytes]:
        """Yield the row under way, if there is one."""
        if not self.examples:
            return
        form = self.format
        row = np.zeros(form.width, np.int64)  # 0 is padding, as token and as segment
        starts = np.cumsum([0, form.inputs, form.targets, form.inputs])
        for side, tokens_at, segments_at in ((0, starts[0], starts[2]), (1, starts[1], starts[3])):
            place = 0
            for number, example in enumerate(self.examples, 1):
                tokens = example[side]
                row[tokens_at + place : tokens_at + place + len(tokens)] = tokens
                if form.packed:
                    row[segments_at + place : segments_at + place + len(tokens)] = number
                place += len(tokens)
        yield form.encode(row, self.names)
        self._clear()


@dataclasses.dataclass
class Counts:
    """Counts of the examples, tokens and unknown pieces of `tasks`, in the order of their numbers.

    Token sequences `apart` and EOS count neither as text nor as unknown.
    """

    # Separators are kept apart because they may be unknown pieces in every example, such as T5's
    # `<`: they would hide whether the vocabulary knows the text.
    tasks: Sequence[str]
    limit: int  # ids from here on do not fit a row's integers
    eos_id: int
    unk_id: int
    apart: Sequence[Sequence[int]] = ()
    sums: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.sums = {task: Counter() for task in self.tasks}

    def add(self, task: np.ndarray, sides: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Count a batch: `task` int [B], sides {name: (tokens int [N], tokens a example int [B])}.

        Raises UserError for ids that a row cannot hold.
        """
        self._sum("examples", np.bincount(task, minlength=len(self.tasks)))
        for name, (tokens, lengths) in sides.items():
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.limit:
                bad = tokens.max() if tokens.max() >= self.limit else tokens.min()
                raise UserError(f"{name} hold the token id {bad}; it must be below {self.limit}")
            # The task of each token, so that one bincount serves all examples of a batch.
            whose = np.repeat(task, lengths)
            self._sum(f"{name}_tokens", self._by_task(whose))
            text = tokens != self.eos_id
            for sequence in self.apart:
                text &= ~occurrences(tokens, sequence)
            self._sum("pieces", self._by_task(whose[text]))
            self._sum("unknown", self._by_task(whose[text & (tokens == self.unk_id)]))

    def _by_task(self, whose: np.ndarray) -> np.ndarray:
        return np.bincount(whose, minlength=len(self.tasks))

    def _sum(self, kind: str, numbers: np.ndarray) -> None:
        for name, number in zip(self.tasks, numbers.tolist(), strict=True):
            self.sums[name][kind] += number


def occurrences(tokens: np.ndarray, sequence: Sequence[int]) -> np.ndarray:
    """Return bool [N]: True at every position of `tokens` that belongs to a `sequence` in it."""
    found = np.zeros(len(tokens), bool)
    starts = len(tokens) - len(sequence) + 1
    if not len(sequence) or starts < 1:
        return found
    # An offset at a time over the whole batch: a loop over tokens in Python would be far slower.
    match = np.ones(starts, bool)
    for offset, token in enumerate(sequence):
        match &= tokens[offset : offset + starts] == token
    for offset in range(len(sequence)):
        found[offset : offset + starts] |= match
    return found
