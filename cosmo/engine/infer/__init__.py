"""Answers: a session over a model, batches by length, files of any size."""
