"""What both builders share: the features of an example and where the corpus lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cosmo.tasks.files import splits_of
from cosmo.tasks.formatting import Example

INSTRUCTIONS = """Put the corpus as published (JSON or Parquet files named by split) into the
folder {name}/ of the manual directory, or name that folder itself as the manual directory."""


def features() -> tfds.features.FeaturesDict:
    """The features that `cosmo.tasks.seqio_tasks` reads: those of `Example`, and `is_training`."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "narrative": tfds.features.Text(),
            "instruction": tfds.features.Text(),
            "turns": tfds.features.Sequence(tfds.features.Text()),
            "response": tfds.features.Text(),
            "is_training": tfds.features.Scalar(np.int32),
        }
    )


def corpus_folder(manual_dir: Any, name: str) -> Any:
    """Where the corpus lies: `manual_dir/name` if it is there, else `manual_dir` itself."""
    return manual_dir / name if (manual_dir / name).exists() else manual_dir


def splits(folder: Any) -> list[str]:
    """The splits to build, those with files.

    Where none has files it is `train`: reading that raises the DataError that says what is amiss.
    """
    return splits_of(folder) or ["train"]


def rows(examples: Iterable[Example], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, features) of each example."""
    for example in examples:
        yield (
            example.id,
            {
                "id": example.id,
                "narrative": example.narrative,
                "instruction": example.instruction,
                "turns": list(example.turns),
                "response": example.response,
                "is_training": int(split == "train"),
            },
        )
