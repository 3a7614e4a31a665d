"""Compute the network, its loss, the training step and generation: pure functions of arrays."""
