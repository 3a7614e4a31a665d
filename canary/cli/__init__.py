"""The verbs of `python -m canary`, a file each: flags, help page and function.

Modules here load no JAX, so that help pages and mistakes answer at once: each function imports what
it runs.
"""
