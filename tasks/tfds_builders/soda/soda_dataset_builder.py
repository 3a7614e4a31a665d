"""SODA as a TensorFlow dataset, one record per response to learn. Kim et al. 2023."""

from cosmo.tasks.families import soda_file_examples
from cosmo.tasks.tfds_builders import examples


class Builder(examples.CorpusBuilder):
    """Read the files of `allenai/soda`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = examples.INSTRUCTIONS.format(name="soda")
    description = "SODA: social dialogues with the narrative they are grounded in."
    homepage = "https://huggingface.co/datasets/allenai/soda"
    read = staticmethod(soda_file_examples)
