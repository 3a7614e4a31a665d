"""The one exception that means: the user can fix this, and the message says how."""


class UserError(Exception):
    """Bad input, configuration or environment. The command line prints it as one line, exit 1."""
