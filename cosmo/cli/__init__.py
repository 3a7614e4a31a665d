"""The verbs of `python -m cosmo`, a file each: flags, help page and function.

Modules here load neither JAX nor NumPy, so that help pages and mistakes answer at once: each
function imports what it runs.
"""
