"""Checkpoints of other systems, in and out: T5X and HuggingFace."""
