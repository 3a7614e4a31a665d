"""Train and evaluate; handle bad steps, early stopping and preemption."""
