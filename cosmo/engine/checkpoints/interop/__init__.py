"""Read and write checkpoints of other systems: T5X and HuggingFace."""
