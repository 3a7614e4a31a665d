"""Share everything but the corpus between both builders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cosmo.tasks.files import splits_of
from cosmo.tasks.formatting import Example

INSTRUCTIONS = """Put the corpus as published (JSON or Parquet files named by split) into the
folder {name}/ of the manual directory, or name that folder itself as the manual directory."""


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Build a corpus from its published files, with the readers that training from files uses.

    A subclass names the corpus's `description` and `homepage`. Its `read(folder, split)` yields the
    examples of a split.
    """

    # `seqio_tasks.TFDS_VERSION` asks for the same one.
    VERSION = tfds.core.Version("1.0.0")
    description: str
    homepage: str
    read: Callable[[Any, str], Iterator[Example]]

    def _info(self) -> tfds.core.DatasetInfo:
        texts = ("id", "narrative", "instruction", "response")
        features = {name: tfds.features.Text() for name in texts}
        features["turns"] = tfds.features.Sequence(tfds.features.Text())
        # `Example` has no split, but the parts of a training example alone are dropped at random.
        features["is_training"] = tfds.features.Scalar(np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.description,
            features=tfds.features.FeaturesDict(features),
            homepage=self.homepage,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = dl_manager.manual_dir / self.name
        # A user with one corpus gives its own folder.
        folder = folder if folder.exists() else dl_manager.manual_dir
        # train, because reading it raises the DataError that explains what is missing.
        splits = splits_of(folder) or ["train"]
        return {split: self._generate_examples(folder, split) for split in splits}

    def _generate_examples(self, folder, split):
        for example in self.read(folder, split):
            # In the data, because SeqIO does not give preprocessors the split.
            row = {**dataclasses.asdict(example), "is_training": int(split == "train")}
            yield example.id, {**row, "turns": list(example.turns)}
