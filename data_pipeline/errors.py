"""The error that users can put right, under the name that this package imports it by."""

from cosmo.engine.base.errors import UserError

__all__ = ["UserError"]
