"""ProsocialDialog as a TensorFlow dataset, one record per response to learn. Kim et al. 2022."""

from cosmo.tasks.families import prosocial_file_examples
from cosmo.tasks.tfds_builders import examples


class Builder(examples.CorpusBuilder):
    """Read the files of `allenai/prosocial-dialog`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = examples.INSTRUCTIONS.format(name="prosocial_dialog")
    description = "ProsocialDialog in the format of SODA; names drawn with seed 0."
    homepage = "https://huggingface.co/datasets/allenai/prosocial-dialog"
    read = staticmethod(prosocial_file_examples)
