"""SODA as a TensorFlow dataset, one record per response to learn. Kim et al. 2023."""

from __future__ import annotations

import tensorflow_datasets as tfds

from cosmo.tasks.families import soda_file_examples
from cosmo.tasks.tfds_builders import examples


class Builder(tfds.core.GeneratorBasedBuilder):
    """Read `allenai/soda`'s files with the readers that training from files uses."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = examples.INSTRUCTIONS.format(name="soda")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="SODA: social dialogues with the narrative they are grounded in.",
            features=examples.features(),
            homepage="https://huggingface.co/datasets/allenai/soda",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = examples.corpus_folder(dl_manager.manual_dir, "soda")
        return {split: self._generate_examples(folder, split) for split in examples.splits(folder)}

    def _generate_examples(self, folder, split):
        return examples.rows(soda_file_examples(folder, split), split)
