"""The verbs of `python -m data_pipeline`; each module of `co3.commands` has the flags of one."""

from cosmo.engine.base.command_line import Program, Verb, imported


def _verb(name: str, text: str, **further) -> Verb:
    module = f"data_pipeline.co3.commands.{name}"
    # Imported when called, because CO3's modules take a second to load.
    return Verb(
        help=text,
        run=imported(module, f"run_{name}"),
        add_arguments=imported(module, "add_arguments"),
        **further,
    )


VERBS = {
    # The rest, after a lone --, goes to Apache Beam.
    name: _verb(name, text, takes_rest=name == "postprocess")
    for name, text in {
        "co3": "triples to SODA: ask a language model, filter, write records",
        "postprocess": "filters, names and statistics alone, in many processes or by Apache Beam",
        "merge": "the outputs of several --shard=i/n into one",
        "teacher": "a local server that answers CO3's prompts, for trying things out",
    }.items()
}

PROGRAM = Program(
    name="data_pipeline",
    description="Make corpora of dialogues from a language model.",
    verbs=VERBS,
    loggers=("data_pipeline", "cosmo", "tasks"),
    # Calls need no accelerator.
    uses_jax=False,
    epilog="""

A first run, without a bill:
  python -m data_pipeline teacher --port=8765 &
  python -m data_pipeline co3 --triples=triples.jsonl --output=/tmp/soda \\
    --base_url=http://127.0.0.1:8765/v1 --model=teacher --limit=100
""",
)
