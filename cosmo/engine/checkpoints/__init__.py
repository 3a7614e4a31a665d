"""Save, check and open checkpoints: ours, T5X's and HuggingFace's."""
