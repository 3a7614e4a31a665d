"""Exports to Mechanical Turk, Label Studio and Potato, and their results read back."""
