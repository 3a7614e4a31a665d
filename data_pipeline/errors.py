"""The one exception that means: the user can mend this, and the message says how."""


class UserError(Exception):
    """Bad input, settings or surroundings. The command line prints it as one line, exit code 1."""
