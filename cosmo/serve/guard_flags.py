"""Hand on the flags of a guard to `cosmo.cli`, which imports nothing of `canary`."""

from canary.cli import flags

GUARD = flags.GUARD
