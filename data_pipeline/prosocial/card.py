"""Make the dataset card of a ProsocialDialog: numbers beside the paper's, and a data statement.

After Bender and Friedman 2018 and Kim et al. 2022, sections 9 and 10 and appendix E. A fact that
only the user knows is asked for in the card, and never guessed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.tasks.safety import LABELS
from data_pipeline.co3 import croissant
from data_pipeline.prosocial import statistics, survey

_SOURCES = {
    "socialchemistry": "Social Chemistry 101 (Forbes et al. 2020): situations from Reddit, "
    "ROCStories and Dear Abby, with rules of thumb by crowd workers",
    "ethics_amt": "ETHICS, commonsense morality (Hendrycks et al. 2021): short situations by crowd "
    "workers",
    "sbic": "SBIC (Sap et al. 2020): posts from Reddit, Twitter and hate sites, stereotypes by "
    "crowd workers",
}
_CANDIDATES = {
    "source": "the source's own rules of thumb (Social Chemistry)",
    "stereotypes": 'made of stereotypes: "It\'s wrong to think ..." (SBIC)',
    "given": "given by a file, for example a model trained on Social Chemistry (ETHICS)",
    "model": "asked of the language model",
}

_FIELDS = """| field | |
| --- | --- |
| `context`, `response` | an utterance of the problematic speaker, and the guiding one's answer |
| `rots` | the rules of thumb that the response was written from, or null |
| `safety_label` | of the three votes: one for intervention decides, else votes for caution count |
| `safety_annotations`, `safety_annotation_reasons` | three workers' votes and reasons |
| `source`, `etc` | the corpus of the situation, and its id there |
| `dialogue_id`, `response_id`, `episode_done` | the place of a row in its dialogue |"""


def card(
    about: Mapping[str, Any],
    made: Mapping[str, Any],
    counts: Mapping[str, Sequence[Mapping[str, Any]]],
    left_out: Mapping[str, Mapping[str, int]],
    example: Sequence[Mapping[str, Any]] = (),
    asked: Mapping[str, str] = {},
) -> str:
    """Return the card as Markdown; `about` are the run's settings, `made` its statistics.

    `asked` are the answers to the workers' survey.
    """
    scripted = about.get("scripted_workers", False)
    sources = "\n".join(f"- {_SOURCES[name]}" for name in counts)
    quarantined = [
        [stage, reason, f"{number:,}"]
        for stage, reasons in left_out.items()
        for reason, number in reasons.items()
    ]
    by = [[_CANDIDATES[name], f"{n:,}"] for name, n in made["candidates_by"].items()]
    splits = ", ".join(f"{name} {number:,}" for name, number in made["splits"].items())
    return f"""---
language: en
pretty_name: Prosocial dialogues
task_categories:
- text-generation
- text-classification
tags:
- dialogue
- dialogue safety
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.jsonl
  - split: validation
    path: data/validation.jsonl
  - split: test
    path: data/test.jsonl
---

# Prosocial dialogues

**Contains offensive, biased and upsetting text.** Dialogues between a problematic speaker, whom a
language model plays, and a guiding speaker, built as Kim et al. 2022 built ProsocialDialog.

{_SCRIPTED if scripted else ""}{_FIELDS}

{statistics_text(made)}

Splits (dialogues): {splits}. {made["rows_that_lack_rots"]:,} of {made["rows"]:,} rows have no rule
of thumb although their label needs one. {made["ended_after_four"]:,} dialogues have fewer than six
utterances.

## Where the situations come from

{sources}

{_table(["source", "left after", "rows", "situations", "paper"], statistics.filters(counts))}

The paper's numbers are of whole corpora. A sample may have been drawn after these filters.

Candidate rules of thumb:

{_table(["made by", "dialogues"], by)}

## Left out

{_table(["stage", "reason", "number"], quarantined) if quarantined else "Nothing."}

`rejected.jsonl` has each of them with its reason; `provenance.jsonl` has edits, reports, votes and
workers' pseudonyms of each dialogue.

{_shown(example)}## Data statement

| | here | Kim et al. 2022 |
| --- | --- | --- |
| language | English, as its sources | English |
| problematic speaker | {about["model"]} | GPT-3, and the sources' authors |
| guiding speaker, labels | {_who(made, scripted)} | 212 workers of Mechanical Turk in the US and \
Canada |
| pay | to be filled in | $15 an hour |
| consent | adults, warned of the content, free to return work | the same; Crisis Text Line named |
{_survey(asked, scripted)}| license | to be chosen, within the terms of sources and model | - |

Cautions (sections 9 and 10 of the paper):

- Norms differ between cultures and times. These are of the people who wrote and labelled.
- The problematic utterances must not be used to train a model to produce them.
- A model trained on this corpus alone becomes negative: mix it with casual dialogues.
- "Needs intervention" asks for a person. No response here replaces help.

## Made with

{_table(["setting", ""], [[name, str(value)] for name, value in about.items()])}
"""


# Column -> (type, meaning, whether it is a list), of Croissant's metadata.
_COLUMNS = {
    "context": (croissant.TEXT, "an utterance of the problematic speaker", False),
    "response": (croissant.TEXT, "the guiding speaker's answer", False),
    "rots": (croissant.TEXT, "the rules of thumb that the response was written from", True),
    "safety_label": (croissant.TEXT, "the label that follows from three votes", False),
    "safety_annotations": (croissant.TEXT, "the votes", True),
    "safety_annotation_reasons": (croissant.TEXT, "the reasons of the votes", True),
    "source": (croissant.TEXT, "the corpus of the situation", False),
    "etc": (croissant.TEXT, "the situation's id there", False),
    "dialogue_id": (croissant.NUMBER, "the dialogue", False),
    "response_id": (croissant.NUMBER, "the place of the row in its dialogue, from 0", False),
    "episode_done": (croissant.TRUTH, "whether the row is its dialogue's last", False),
}


def write_croissant(folder: Path, about: Mapping[str, Any], scripted: bool) -> None:
    """Write the Croissant metadata of the splits in `folder`/data."""
    people = "a script in place of people" if scripted else "people"
    croissant.write(
        folder,
        name="prosocial_dialogues",
        description="Dialogues between a problematic and a guiding speaker, with rules of thumb "
        "and safety labels. Contains offensive, biased and upsetting text.",
        cite_as="Kim et al. 2022, ProsocialDialog: A Prosocial Backbone for Conversational "
        "Agents, EMNLP",
        files={split: f"data/{split}.jsonl" for split in ("train", "validation", "test")},
        fields=_COLUMNS,
        rai={
            "dataCollection": f"The model {about['model']} played the problematic speaker; "
            f"{people} proofread, chose or wrote rules of thumb, and responded.",
            "dataCollectionType": ["Synthetic data generation", "Manual Human Curator"],
            "dataAnnotationProtocol": f"Three votes on the safety of each context, by {people}; "
            "two rounds of validation.",
            "annotationsPerItem": "3",
            "dataBiases": "Norms differ between cultures and times. These are of the people who "
            "wrote and labelled, and of the corpora of the situations.",
            "personalSensitiveInformation": "Workers are pseudonyms. Situations come from public "
            "corpora.",
            "dataLimitations": "English. A model trained on this corpus alone becomes negative.",
            "dataSocialImpact": "Problematic utterances must not be used to train a model to "
            "produce them. No response here replaces help.",
            "dataUseCases": "Training and studying models that respond to problematic content.",
        },
    )


_SCRIPTED = """**A script stood in for the workers**, to try the pipeline: no person wrote or judged
anything. Do not train on it, or publish it, as human data.

"""


def statistics_text(made: Mapping[str, Any]) -> str:
    """Return the tables of a corpus as Markdown."""
    names = [label.strip("_").replace("_", " ") for label in LABELS]
    return (
        _table(["", "here", "paper"], statistics.table(made))
        + "\n\nSafety labels by utterance:\n\n"
        + _table(["utterance", *names], statistics.labels(made))
    )


def _survey(asked: Mapping[str, str], scripted: bool) -> str:
    blank = "nobody" if scripted else "not asked"
    return "".join(
        f"| {name.replace('_', ' ')} | {asked.get(name, blank)} | {paper} |\n"
        for name, paper in survey.PAPER.items()
    )


def _who(made: Mapping[str, Any], scripted: bool) -> str:
    return "a script" if scripted else f"{made['workers']} workers"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar in a cell would end it.
    cells = (
        " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line)
        for line in [head, ["---"] * len(head), *rows]
    )
    return "\n".join(f"| {line} |" for line in cells)


def _shown(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        lines += [
            f"- {row['context']}",
            f"  [{row['safety_label']}: {'; '.join(row['rots'] or ())}]",
        ]
        lines += [f"  > {row['response']}"]
    wrapped = (textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)
    return "The first dialogue:\n\n```\n" + "\n".join(wrapped) + "\n```\n\n"
