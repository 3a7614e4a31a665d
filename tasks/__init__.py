"""The meaning of the data: formatting, readers, vocabularies, metrics, and the SeqIO tasks.

Only `seqio_tasks` and `tfds_builders` load TensorFlow and SeqIO. Chatting, exporting and training
from a packed cache need neither.
"""
