"""The training loop, evaluation, and what ends or guards a run."""
