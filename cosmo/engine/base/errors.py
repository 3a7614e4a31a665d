"""The one exception that means: the user can fix this, and the message says how."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input, configuration or environment. A command line prints it as one line, exit code 1.

    `setting` names what the user has to change: a macro ("CHECKPOINT_PATH"), a parameter
    ("t5.T5Config.emb_dim") or a flag without its dashes ("window"). Code that raises the error does
    not know how a command line spells the setting: `command_line.spelled` does. As text the error
    is the message with the bare names, for Python, T5X and TensorFlow.
    """

    def __init__(self, message: object = "", *, setting: str | Sequence[str] = ()):
        super().__init__(message)
        self.message = str(message)
        self.settings = (setting,) if isinstance(setting, str) else tuple(setting)

    def __str__(self) -> str:
        missing = [name for name in self.settings if name not in self.message]
        return f"{self.message} ({', '.join(missing)})" if missing else self.message
