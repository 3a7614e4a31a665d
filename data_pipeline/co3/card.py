"""Make the dataset card: a README.md for dataset hubs, with the columns of tables 2 and 3."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.co3 import croissant
from data_pipeline.co3.reasons import explained
from data_pipeline.co3.schema import SODA_FIELDS

# The settings of a run that the card shows. Not the server's address, which may be internal.
_SETTINGS = {
    "triples": "triples",
    "critic": "kept by ATOMIC-10X's critic at",
    "sample": "drawn in SODA's ratios of relations",
    "shard": "shard",
    "input": "records of",
    "model": "model",
    "form": "form of the prompts",
    "body": "added to each request",
    "prompts": "version of the prompts",
    "lists": "version of the lists of words and names",
    "retries": "retries of a narrative or dialogue",
    "as_published": "asked as the published code asks",
    "no_context": "dialogues without triple and narrative",
    "seed": "seed of names and samples",
    "ask_human": "model asked which speakers are human",
    "ask_commonsense": "model asked whether the triple is in the narrative",
    "canary": "Canary's labels",
    "moderation": "moderation service",
}
_IDLE = {"critic": None, "sample": None, "shard": "0/1", "body": "{}"}  # defaults, not shown

# A row of a Markdown table is one line, however long.
_FIELDS = """| field | |
| --- | --- |
| `head`, `relation`, `tail` | the triple; `PersonX`, `PersonY`, `PersonZ`: who its persons are |
| `literal` | the triple as a sentence |
| `narrative` | the story that a model made of it |
| `dialogue`, `speakers` | the utterances, and who says each |
| `original_index` | the triple's place in its file, from 0 |
| `split` | `train`, `valid` or `test`: the triple's, or where it names none by a hash of the head |
| `head_answer`, `relation_tail_answer` | is the head, and with it the tail, in the narrative? The \
model's Yes, No or Unknown; empty: not asked |
| `pmi_head_answer`, `pmi_relation_tail_answer` | the same by pointwise mutual information |"""


def card(report: Mapping[str, Any], example: Mapping[str, Any] | None = None) -> str:
    """Return the card of a run's report (`report.build`); `example` is a row of soda.jsonl."""
    about, corpus = report["about"], report["corpus"]
    splits = ", ".join(f"{name} {number:,}" for name, number in corpus["splits"].items())
    # The report of `postprocess` counts records: there were no triples.
    asked_of = "triples" if "triples" in about else "records"
    relations = [
        (name, f"{row['percent']}%", f"{row['dialogues']:,}", ", ".join(row["keywords"]))
        for name, row in corpus["relations"].items()
    ]
    everything = ("all", "100%", f"{corpus['dialogues']:,}", ", ".join(corpus["common_keywords"]))
    left_out = [
        (stage, reason, f"{number:,}")
        for stage, reasons in report["rejected"].items()
        for reason, number in reasons.items()
    ]
    # Only runs with a sample count these.
    dropped = about.get("dropped") or {}
    # A sample is drawn from usable triples, so rejected.jsonl does not have these.
    left_out += [("before the sample", reason, f"{n:,}") for reason, n in dropped.items()]
    # `Statistics.table` joins stage and answer, because JSON's keys are texts.
    asked = [(*what.split(": "), f"{number:,}") for what, number in corpus["answers"].items()]
    return f"""---
language: en
pretty_name: Dialogues distilled with CO3
task_categories:
- text-generation
tags:
- dialogue
- synthetic
configs:
- config_name: default
  data_files: soda.jsonl
---

# Dialogues distilled with CO3

Social dialogues made by a language model from commonsense triples, with the method of Kim et al.
2023 (SODA). All text is machine-made: nobody said it, and it may be wrong or biased. What may be
done with it depends on the terms of the model and of the triples; no license is given here.
{_safety(about)}

`soda.jsonl` has the published SODA's fields, `provenance.jsonl` how each record came about (line by
line the same), `rejected.jsonl` what was left out and why, `report.json` all numbers.

| #Dialog | Avg. #Turns | Avg. Utt. Length | Lexical Diversity |
| --- | --- | --- | --- |
| {corpus["dialogues"]:,} | {corpus["turns"]} | {corpus["utterance_length"]} | \
{corpus["lexical_diversity"]} |

Names come from US births of 1990 to 2015, without those that are words too: the 1,000 most common
by frequency for the triples, then 10,000 alike as replacements. Lists of words rejected non-human
speakers before names, words for humans and the model decided. Keywords are by frequency.

Lengths are words between spaces. Lexical diversity is MTLD (McCarthy and Jarvis 2010, as in the
package lexical-diversity 0.1.1), averaged over dialogues. Splits: {splits or "none"}.

{_FIELDS}

{_shown(example)}## Relations

{_table(("relation", "share", "dialogues", "keywords of its narratives"), [everything, *relations])}

## Left out

Of {report["triples"]:,} {asked_of} {report["conversations"]:,} were whole conversations, of which \
{report["records"]:,} ({report["kept_percent"]}%) are here.

{_table(("stage", "reason", "number"), left_out)}

{_meanings(reason for _, reason, _ in left_out)}What the model answered on those that stayed:

{_table(("asked about", "answer", "dialogues"), asked)}

## Made with

{_table(("setting", ""), _settings(about))}
"""


# Columns whose name alone does not explain them.
_ABOUT_FIELDS = {
    "literal": "the triple as a sentence",
    "narrative": "the story that a model made of the triple",
    "dialogue": "the utterances, in order",
    "speakers": "the speaker of each utterance",
    "original_index": "the triple's place in its file, from 0",
}


def write_croissant(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the Croissant metadata of the soda.jsonl in `folder`."""
    about = report["about"]
    fields = {
        name: (
            croissant.NUMBER if name == "original_index" else croissant.TEXT,
            _ABOUT_FIELDS.get(name, f"SODA's field {name}"),
            name in ("dialogue", "speakers"),
        )
        for name in SODA_FIELDS
    }
    croissant.write(
        folder,
        name="co3_dialogues",
        description="Social dialogues made by a language model from commonsense triples with CO3.",
        cite_as="Kim et al. 2023, SODA: Million-scale Dialogue Distillation with Social "
        "Commonsense Contextualization, EMNLP",
        files={"soda": "soda.jsonl"},
        fields=fields,
        rai={
            "dataCollection": f"Written by the model {about.get('model', 'of earlier records')} "
            "from triples of a commonsense knowledge graph. No person wrote or said it.",
            "dataCollectionType": ["Synthetic data generation"],
            "dataManipulationProtocol": "Filters of patterns, turns, speakers and safety removed "
            "dialogues; names were replaced. report.json counts each filter.",
            "dataBiases": "Views and stereotypes of the model and of the triples, and names by "
            "births in the US.",
            "personalSensitiveInformation": "Names are drawn from statistics and mean nobody.",
            "dataLimitations": f"English. The text may be wrong. {_safety(about)}".strip(),
            "dataUseCases": "Training and studying models of social dialogue.",
        },
    )


def _safety(about: Mapping[str, Any]) -> str:
    filters = [_SETTINGS[name] for name in ("canary", "moderation") if about.get(name)]
    if filters:
        return f"Unsafe dialogues were taken out by: {', '.join(filters)}."
    if "moderation" not in about:
        return ""  # `postprocess` over earlier records: their own card has this line
    return "**No safety filter was used**: neither Canary nor a moderation service was asked."


def _settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, said in _SETTINGS.items():
        if name in about and about[name] != _IDLE.get(name, ()):
            value = about[name]
            if value is None or isinstance(value, bool):
                # People read the card, and need not know Python's words.
                value = {None: "none", True: "yes", False: "no"}[value]
            # The name of a labels' file without its folder, which may be private.
            rows.append((said, str(value).rsplit("/", 1)[-1] if name == "canary" else str(value)))
    return rows


def _meanings(reasons: Iterable[str]) -> str:
    rows = explained(reasons)
    return _table(("reason", "meaning"), rows) + "\n\n" if rows else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    # Markdown wants this line between the head of a table and its rows.
    lines = [head, ("---",) * len(head), *rows]
    # A bar in a cell would end it.
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells)


def _shown(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    # As in the file, so that a reader can search for it.
    triple = json.dumps([row["head"], row["relation"], row["tail"]], ensure_ascii=False)
    said = zip(row["speakers"], row["dialogue"], strict=True)
    lines = [triple, "", row["narrative"], "", *(f"{name}: {words}" for name, words in said)]
    # Dataset hubs do not wrap the lines of a code block.
    wrapped = (textwrap.fill(line, 96, subsequent_indent="  ") for line in lines)
    return "The first of them:\n\n```\n" + "\n".join(wrapped) + "\n```\n\n"
