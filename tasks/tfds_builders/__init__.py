"""TensorFlow Datasets builders of the corpora, for `use(source="tfds")` and `tfds build`.

From the repository's root, with the corpora in `MANUAL/soda` and `MANUAL/prosocial_dialog`:
`PYTHONPATH=. tfds build tasks/tfds_builders/soda --manual_dir MANUAL --data_dir DATA`.
"""
