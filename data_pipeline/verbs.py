"""The verbs of `python -m data_pipeline`; each module of a room's `commands` has those of one."""

from cosmo.engine.base.command_line import Program, Verb, imported


def _verb(name: str, text: str, room: str = "co3", **further) -> Verb:
    module = f"data_pipeline.{room}.commands.{name}"
    # Imported when called, because the modules take up to a second to load.
    return Verb(
        help=text,
        run=imported(module, f"run_{name}"),
        add_arguments=imported(module, "add_arguments"),
        **further,
    )


def _group(room: str, prefix: str, verbs: dict[str, str]) -> dict[str, Verb]:
    """Return the verbs of two words that a room has."""
    return {f"{prefix} {name}": _verb(name, text, room) for name, text in verbs.items()}


VERBS = {
    # The rest, after a lone --, goes to Apache Beam.
    name: _verb(name, text, takes_rest=name == "postprocess")
    for name, text in {
        "co3": "triples to SODA: ask a language model, filter, write records",
        "postprocess": "filters, names and statistics alone, in many processes or by Apache Beam",
        "merge": "the outputs of several --shard=i/n into one",
        "teacher": "a local server that answers the prompts of all verbs, for trying things out",
    }.items()
}
# Human evaluation.
VERBS |= _group(
    "annotation",
    "annotate",
    {
        "pairs": "two systems' responses or dialogues, sampled by seed: a task file",
        "make": "a task file of dialogues to annotate: safety, rules of thumb, proofreading ...",
        "show": "contexts with the responses of several systems below each other",
        "serve": "pages for people who judge a task, on a server of your own",
        "judge": "let a language model judge a task, in both orders",
        "report": "votes, agreement, tests and plots of a task's answers",
        "feedback": "a page for each judge: gold results, agreement, answers that differ",
        "power": "how many votes or items a study needs",
        "export": "pages for Mechanical Turk, Label Studio or Potato",
        "collect": "the results of these, read back as answers",
    },
)
# Building a ProsocialDialog.
VERBS |= _group(
    "prosocial",
    "prosocial",
    {
        "situations": "situations from Social Chemistry, ETHICS and SBIC, each filter counted",
        "make": "situations to a ProsocialDialog: drafts, rounds with people, safety labels",
        "work": "scripted workers that answer the waiting task, for trying things out",
        "workers": "what each worker did: agreement, edits, pay",
    },
)

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
