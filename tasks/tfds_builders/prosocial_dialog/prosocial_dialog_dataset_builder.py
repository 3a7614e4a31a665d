"""ProsocialDialog as a TensorFlow dataset, one record per response to learn. Kim et al. 2022."""

from __future__ import annotations

import tensorflow_datasets as tfds

from cosmo.tasks.families import prosocial_file_examples
from cosmo.tasks.tfds_builders import examples


class Builder(tfds.core.GeneratorBasedBuilder):
    """Read `allenai/prosocial-dialog`'s files with the readers that training from files uses."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = examples.INSTRUCTIONS.format(name="prosocial_dialog")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="ProsocialDialog in the format of SODA; names drawn with seed 0.",
            features=examples.features(),
            homepage="https://huggingface.co/datasets/allenai/prosocial-dialog",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = examples.corpus_folder(dl_manager.manual_dir, "prosocial_dialog")
        return {split: self._generate_examples(folder, split) for split in examples.splits(folder)}

    def _generate_examples(self, folder, split):
        return examples.rows(prosocial_file_examples(folder, split), split)
