"""What the data means: formatting, readers, vocabularies, metrics, and the SeqIO tasks.

Importing this package, or any module of it but `seqio_tasks` and `tfds_builders`, loads neither
TensorFlow nor SeqIO: chatting, exporting and training from a packed cache need none of them.
"""
