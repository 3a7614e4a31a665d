"""Labels for a file of dialogues of any size: what `python -m canary label` runs."""

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from canary import reading
from canary.module import Canary, Chirp, Settings
from canary.reading import Dialogue
from cosmo.engine.infer import answer_files, bulk, infer
from cosmo.engine.model.decoding import DecodingConfig

log = logging.getLogger("canary")

DIGITS = 6  # of probabilities in files
TURNS = 8  # of a usual dialogue: with --per_turn so many fewer of them make a window


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """A `bulk.BulkRun`: the label of each dialogue, or of each of its beginnings (`per_turn`)."""

    canary: Settings
    rots: bool
    per_turn: bool
    decoding: DecodingConfig
    seed: int = 0

    @property
    def session(self) -> infer.SessionConfig:
        """Return the settings of Canary's session."""
        return self.canary.session

    def settings(self) -> dict[str, Any]:
        """See `bulk.BulkRun`."""
        return {
            "what": "labels",
            "style": self.canary.style,
            "separator": self.canary.separator,
            "per_turn": self.per_turn,
            "rots": self.rots,
            "decoding": dataclasses.asdict(self.decoding) if self.rots else None,
            "seed": self.seed if self.rots else None,
        }

    def answerer(self, session: infer.Session) -> bulk.Answerer:
        """See `bulk.BulkRun`; a line a dialogue."""
        canary = self.canary.opened(session)
        warned = False

        def lines(dialogues, on_batch):
            nonlocal warned
            again = len(dialogues) - len({dialogue.id for dialogue in dialogues})
            if again and not warned:  # ids of the whole file may not fit in memory
                warned = True
                log.warning(
                    "%d of %d dialogues labelled together have the id of another one: their lines "
                    "can be told apart by their order only",
                    again,
                    len(dialogues),
                )
            return label(canary, dialogues, self, on_batch)

        return lines


def label(
    canary: Canary,
    dialogues: Sequence[Dialogue],
    job: LabelJob,
    on_batch: Callable[[Counter[str]], None] = lambda counts: None,
) -> list[dict[str, Any]]:
    """The lines of `dialogues`, in order.

    {id, label, probabilities, rots, needs_human, text, num_turns}; with `per_turn` {id, num_turns,
    turns} instead, where `turns` has the first five for every beginning of the dialogue.
    """
    many = [list(canary.contexts(d.turns, only_last=not job.per_turn)) for d in dialogues]
    contexts = [context for one in many for context in one]
    told = _of_dialogues(on_batch, len(dialogues), len(set(contexts)))
    found = iter(
        canary.label(contexts, rots=job.rots, decoding=job.decoding, seed=job.seed, on_batch=told)
    )
    lines = []
    for dialogue, one in zip(dialogues, many, strict=True):
        chirps = [line(next(found), job.rots) for _ in one]
        line_of = {"turns": chirps} if job.per_turn else chirps[0]
        count = {"num_turns": len(dialogue.turns)}
        lines.append(
            {"id": dialogue.id, **count, **line_of}
            if job.per_turn
            else {"id": dialogue.id, **line_of, **count}
        )
    return lines


def line(chirp: Chirp, rots: bool = True) -> dict[str, Any]:
    """A Chirp as JSON values; what was not asked for is left out."""
    found: dict[str, Any] = {
        "label": chirp.label,
        "probabilities": {name: round(p, DIGITS) for name, p in chirp.probabilities.items()},
        "needs_human": chirp.needs_human,
    }
    return {**found, "rots": list(chirp.rots), "text": chirp.text} if rots else found


def _of_dialogues(
    on_batch: Callable[[Counter[str]], None], dialogues: int, rows: int
) -> Callable[[Counter[str]], None]:
    """Return `on_batch` with counts of dialogues instead of rows.

    A dialogue may have many rows of a batch or none, so every row counts as its share of them all.
    """
    done = 0

    def told(counts: Counter[str]) -> None:
        nonlocal done
        before = done
        done += counts["records"]
        share = done * dialogues // rows - before * dialogues // rows
        on_batch(Counter({**counts, "records": share}))

    return told


def run_label(args: argparse.Namespace) -> None:
    """`label`: the dialogues of --input to lines in --output."""
    # What a user has mistyped is said before anything is loaded.
    window = args.window
    if window is None and args.per_turn:
        window = infer.SORTED_BATCHES * max(args.batch_size, 1) // TURNS
    sharding = bulk.Sharding(args.num_shards, args.shards, window, args.overwrite)
    layout = answer_files.output_files(args.output, args.num_shards)
    source = reading.source(args.input, whole=args.per_turn)
    found = settings(args)
    job = LabelJob(found, args.rots, args.per_turn, decoding(args, found), args.seed)
    report = bulk.answer_source(job, source, layout, sharding)
    if jax.process_index() == 0:
        if report.rejected:
            print(f"rejected records, with reasons: {layout.rejected}")
        print(f"{args.output}: {report}")


def run_ask(args: argparse.Namespace) -> None:
    """`ask`: the label of one dialogue, in the terminal."""
    args.batch_size = 1
    found = settings(args)
    canary = found.opened(found.session.open()[0])
    turns = args.dialogue[0] if len(args.dialogue) == 1 else args.dialogue
    wanted = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    chirp = canary.chirp(turns, rots=args.rots, **wanted)
    print(chirp.label + (" (a person should see this)" if chirp.needs_human else ""))
    for name, probability in chirp.probabilities.items():
        print(f"  {probability:6.1%}  {name}")
    for rot in chirp.rots:
        print(f"- {rot}")


def settings(args: argparse.Namespace) -> Settings:
    """What the flags of a model say."""
    return Settings.find(
        args.checkpoint,
        vocabulary=args.vocabulary,
        batch_size=args.batch_size,
        dtype=args.dtype,
        label_style=args.label_style,
        turn_separator=args.turn_separator,
        num_partitions=args.num_partitions,
    )


def decoding(args: argparse.Namespace, found: Settings) -> DecodingConfig:
    """What the flags of generation say."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "beam_size", "length_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    targets = found.session.task_feature_lengths["targets"]
    return DecodingConfig(**{"max_new_tokens": targets, **given})
