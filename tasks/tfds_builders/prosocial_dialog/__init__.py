"""A TensorFlow Datasets builder; see `cosmo.tasks.tfds_builders`."""
