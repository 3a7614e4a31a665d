"""Share the features of an example and the folder of the corpus between both builders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cosmo.tasks.files import splits_of
from cosmo.tasks.formatting import Example

INSTRUCTIONS = """Put the corpus as published (JSON or Parquet files named by split) into the
folder {name}/ of the manual directory, or name that folder itself as the manual directory."""


def features() -> tfds.features.FeaturesDict:
    """Return the features that `cosmo.tasks.seqio_tasks` reads: `Example`'s, and `is_training`."""
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
    """Return the corpus's folder: `manual_dir/name` if it is there, else `manual_dir` itself."""
    return manual_dir / name if (manual_dir / name).exists() else manual_dir


def splits(folder: Any) -> list[str]:
    """Return the splits with files, or `train` if there is none."""
    # train, because reading it raises the DataError that explains what is missing.
    return splits_of(folder) or ["train"]


def rows(examples: Iterable[Example], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, features) for each example."""
    for example in examples:
        features = {**dataclasses.asdict(example), "is_training": int(split == "train")}
        yield example.id, {**features, "turns": list(example.turns)}
