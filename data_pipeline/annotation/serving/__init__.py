"""Serve a task to people; an answer is on the disk before the judge reads that it is stored."""
