"""Load a verb's settings from gin files, or from the folder of a trained run."""

import argparse
import ast

from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

# Networks of this project that a run may name beside T5, and the gin file that binds each.
OWN_CODE = {"@blenderbot.BlenderbotConfig()": "gin/models/blenderbot.gin"}


def load(args: argparse.Namespace, verb: Verb, bindings: list[str]) -> None:
    """Load the settings of a verb into gin: its defaults, --gin_file or a run's, `bindings`.

    Raises UserError if a setting is missing, unknown or of the wrong type.
    """
    from cosmo.engine.base import config

    search_paths = [path for path in (args.gin_search_paths or "").split(",") if path]
    saved = None
    # A gin file that is given stands alone: a run's settings would change it unseen.
    if not args.gin_file:
        saved, further = _saved(args, verb, bindings)
        bindings = [*bindings, *further]
    config.load(verb.gin_file, args.gin_file, bindings, search_paths, saved, OWN_CODE)


def _saved(args: argparse.Namespace, verb: Verb, bindings: list[str]):
    """Return (the settings of the run in MODEL_DIR, bindings that follow from them)."""
    from etils import epath

    from cosmo.engine.base import hub, saved_settings
    from cosmo.engine.checkpoints import run_checkpoints
    from cosmo.engine.checkpoints.interop import tokenizer

    if not verb.saved_settings:
        raise UserError(f"{args.verb} needs --gin_file, such as --gin_file=gin/cosmo/tiny.gin")
    values = dict(binding.split(" = ", 1) for binding in bindings)
    if "MODEL_DIR" not in values:
        raise UserError(
            f"{args.verb} needs --gin_file=FILE, or --gin.MODEL_DIR=DIR of a trained run"
        )
    try:
        # The binding is gin's text of the path, in quotes.
        folder = epath.Path(hub.local(ast.literal_eval(values["MODEL_DIR"])))
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"MODEL_DIR={values['MODEL_DIR']}; give the path of a folder") from error
    saved = saved_settings.read(folder)
    if saved is None:
        raise UserError(
            f"no {folder / saved_settings.FILE}: give the run's --gin_file, or a MODEL_DIR that "
            "train has left"
        )
    module = saved.macros.get(saved_settings.MODULE)
    if module is not None and saved_settings.MODULE not in values and verb.reads_tasks(args):
        raise UserError(
            f"this run's tasks come from the module {module!r}, which is code and is not imported "
            f"because a folder says so: give --gin.{saved_settings.MODULE}={module} if you trust it"
        )
    vocabulary = saved.macro("VOCABULARY_PATH", str | None)
    # The run's own file first: the copy is for a folder that has moved.
    if vocabulary and not epath.Path(vocabulary).exists() and "VOCABULARY_PATH" not in values:
        # An exported folder has HuggingFace's name of it.
        for name in (run_checkpoints.VOCABULARY, tokenizer.SPIECE):
            if (folder / name).exists():
                return saved, [f"VOCABULARY_PATH = {str(folder / name)!r}"]
    return saved, []


def check_tasks(*splits: str) -> None:
    """Raise DataError if the tasks' settings or files are wrong, before anything is compiled."""
    from cosmo.engine.base import config
    from cosmo.tasks import mixtures

    # Tasks of a user's own module are known only to the reader process, which imports it.
    if config.query("MIXTURE_OR_TASK_MODULE") is None:
        mixtures.check(splits, **config.call(config.registration).keywords)
