"""List all verbs of `python -m cosmo`.

A flag whose `dest` is in capitals is a gin macro: giving it is giving `--gin.THAT_MACRO=VALUE`,
after all files.
"""

from cosmo.cli import (
    cache,
    chat,
    convert,
    evaluate,
    infer,
    plan,
    push,
    quickstart,
    serve,
    settings,
    train,
)
from cosmo.engine.base.command_line import Program

PROGRAM = Program(
    name="cosmo",
    description="Train, evaluate and question dialogue models.",
    verbs={
        "quickstart": quickstart.VERB,
        "train": train.VERB,
        "cache": cache.VERB,
        "eval": evaluate.VERB,
        "infer": infer.VERB,
        "chat": chat.VERB,
        "serve": serve.VERB,
        "plan": plan.VERB,
        "import": convert.IMPORT,
        "export": convert.EXPORT,
        "push": push.VERB,
    },
    loggers=("cosmo", "tasks"),
    # A model is a whole block of settings, which no single flag could set. `import` and `export`
    # take no settings.
    flags={"MODEL": "--gin_file", "VOCABULARY_PATH": "--vocabulary"},
    load_settings=settings.load,
)
