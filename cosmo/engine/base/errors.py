"""The one exception that means: the user can fix this, and the message says how."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input, configuration or environment. A command line prints it as one line, exit code 1.

    `setting` names what the user has to change: a macro ("CHECKPOINT_PATH"), a parameter
    ("t5.T5Config.emb_dim") or a flag without its dashes ("window"). Code that raises the error does
    not know how a command line spells the setting: see `command_line.spelled`.
    """

    def __init__(self, message: object = "", *, setting: str | Sequence[str] = ()):
        super().__init__(message)
        self.settings = (setting,) if isinstance(setting, str) else tuple(setting)

    def __str__(self) -> str:
        """Return the message with the settings as Python names them, for callers of the library."""
        names = f" (setting: {', '.join(self.settings)})" if self.settings else ""
        return f"{self.message}{names}"

    @property
    def message(self) -> str:
        """The message alone; a command line adds the settings in its own spelling."""
        return str(self.args[0])
