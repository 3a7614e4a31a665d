"""Describe a corpus as Croissant metadata: files with checksums, fields, responsible-AI facts.

The form is MLCommons' Croissant 1.0 with its RAI vocabulary 1.0, in JSON-LD. `croissant.json`
stands beside the corpus. Facts that only the user knows (license, creators, address) are left out,
not guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic

NAME = "croissant.json"
# The terms that the file uses, as the specification lists them.
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_CONFORMS = ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
TEXT, NUMBER, TRUTH = "sc:Text", "sc:Integer", "sc:Boolean"


def write(
    folder: Path,
    *,
    name: str,
    description: str,
    cite_as: str,
    files: Mapping[str, str],
    fields: Mapping[str, tuple[str, str, bool]],
    rai: Mapping[str, str | Sequence[str]],
) -> None:
    """Write `croissant.json` to `folder`.

    `files` maps the name of a record set to its JSON lines below `folder`. `fields` maps a column
    to (type, description, whether it is a list). `rai` maps terms of the RAI vocabulary, such as
    "dataLimitations", to text.
    """
    content = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": description,
        "conformsTo": _CONFORMS,
        "citeAs": cite_as,
        "inLanguage": "en",
        **{f"rai:{term}": text for term, text in rai.items()},
        "distribution": [_file(folder, path) for path in files.values()],
        "recordSet": [_records(label, path, fields) for label, path in files.items()],
    }
    write_atomic(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _file(folder: Path, path: str) -> dict[str, Any]:
    with (folder / path).open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{(folder / path).stat().st_size} B",
        "encodingFormat": "application/jsonlines",
        "sha256": checksum,
    }


def _records(label: str, path: str, fields: Mapping[str, tuple[str, str, bool]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": label,
        "name": label,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{label}/{column}",
                "name": column,
                "description": about,
                "dataType": kind,
                **({"repeated": True} if is_list else {}),
                "source": {"fileObject": {"@id": path}, "extract": {"column": column}},
            }
            for column, (kind, about, is_list) in fields.items()
        ],
    }
