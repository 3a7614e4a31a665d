"""The verbs of `python -m canary.prost`, a file a verb."""
