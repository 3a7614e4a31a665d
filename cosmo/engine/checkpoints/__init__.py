"""Saving, checking and opening checkpoints: ours, T5X's and HuggingFace's."""
