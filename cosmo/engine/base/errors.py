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
        # Attributes of the instance: gin raises a proxy of an error, made without this method, that
        # looks up in the original what it lacks itself.
        self.message = str(message)
        self.settings = (setting,) if isinstance(setting, str) else tuple(setting)

    def __str__(self) -> str:
        """Return the message with the bare settings, for Python, T5X and TensorFlow's reports."""
        names = f" (setting: {', '.join(self.settings)})" if self.settings else ""
        return f"{self.message}{names}"
