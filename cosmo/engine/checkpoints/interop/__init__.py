"""Checkpoints of other systems, in and out: T5X's and HuggingFace's."""
