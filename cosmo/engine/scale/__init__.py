"""Estimate a step before it runs: memory, traffic, defaults, plans."""
