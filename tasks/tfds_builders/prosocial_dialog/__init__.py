"""A TensorFlow Datasets builder; see `tasks.tfds_builders`."""
