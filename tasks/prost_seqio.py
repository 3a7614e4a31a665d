"""Register Prost's SeqIO tasks, on a byte-level BPE vocabulary. Imports TensorFlow.

The tokenizer runs in Python, so the source yields whole ids and texts; after SeqIO's cache they are
cut to length. The ids are those of `cosmo.tasks.prost_text`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from cosmo.tasks import prost_text
from cosmo.tasks.families import Corpus
from cosmo.tasks.prost_text import ProstExample
from cosmo.tasks.seqio_tasks import CHUNK_EXAMPLES, FilesSource, add_tasks
from cosmo.tasks.vocabularies import load

_IDS = ("inputs", "targets", "prefix")
_ENCODED_TURNS = 4096  # texts whose ids are kept: an utterance is in the history of later ones
_do_not_convert = tf.autograph.experimental.do_not_convert


def register(
    corpora: Mapping[str, Corpus],
    mixtures: Mapping[str, Mapping[str, float]],
    text_metrics: Mapping[str, Sequence[Callable[..., Any]]],
    vocabulary_path: Any,
    variant: prost_text.Variant,
    token_metrics: bool,
    shuffle_buffer_size: int,
) -> None:
    """Register a task per corpus and the mixtures of them, in place of earlier ones.

    `corpora` yield `ProstExample`s. `mixtures`: name -> task -> rate; a task of rate 0 is left out.
    `text_metrics` are by task. All metrics are of responses, without rules of thumb (RoTs): a score
    is of the response after the gold RoTs. The paper does not state this. "gold_rot_and_response"
    generates after the gold RoTs too. Raises DataError for an unknown variant, or a vocabulary
    without its marks.
    """
    prost_text.check_variant(variant, load(vocabulary_path))
    as_dataset = functools.partial(
        _example_dataset, vocabulary_path=vocabulary_path, variant=variant
    )
    add_tasks(
        {name: FilesSource(corpus, as_dataset) for name, corpus in corpora.items()},
        mixtures,
        [decode_ids, seqio.CacheDatasetPlaceholder(), cut_to_length],
        vocabulary_path,
        text_metrics,
        token_metrics,
        shuffle_buffer_size,
        postprocess=response_of,
    )


def response_of(text: str, example: Any = None, is_target: bool = False) -> str:
    """Return the response of a target or an answer, for the text metrics."""
    del example, is_target
    return prost_text.split_answer(text).response


def decode_ids(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turn the bytes of ids into int32 vectors, which SeqIO can cache."""

    @seqio.map_over_dataset
    @_do_not_convert
    def decode(example):
        names = [name for name in _IDS if name in example]
        return {**example, **{name: tf.io.decode_raw(example[name], tf.int32) for name in names}}

    return decode(dataset)


def cut_to_length(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None
) -> tf.data.Dataset:
    """Keep the last ids of `inputs` and the first ids of `targets`, end tokens counted."""
    lengths = sequence_length or {}

    @seqio.map_over_dataset
    @_do_not_convert
    def cut(example):
        example = dict(example)
        if lengths.get("inputs") is not None:
            # The oldest go. The end token is last and stays.
            example["inputs"] = example["inputs"][-lengths["inputs"] :]
        if lengths.get("targets") is not None:
            example["targets"] = example["targets"][: lengths["targets"]]
        return example

    return cut(dataset)


def _example_dataset(
    corpus: Corpus,
    examples: Callable[[str], Iterator[ProstExample]],
    split: str,
    shuffle_files: bool = False,
    seed: int | None = None,
    *,
    vocabulary_path: Any,
    variant: prost_text.Variant,
) -> tf.data.Dataset:
    """Return the examples of `split` as texts and as whole ids, each vector as bytes.

    `num_given` counts the ids of a target before its response; `prefix` are these ids, for the
    variant whose answers begin with them.
    """
    # Not shuffled here, as `seqio_tasks` explains.
    del shuffle_files, seed
    corpus.files(split)  # raise for a missing path here, because TensorFlow would hide the error

    def chunks() -> Iterator[dict[str, Any]]:
        vocabulary = _Remembering(load(vocabulary_path))
        rest = examples(split)
        while chunk := list(itertools.islice(rest, CHUNK_EXAMPLES)):
            prefixes = [
                prost_text.gold_prefix_ids(e.rots, vocabulary) if with_rots else [] for e in chunk
            ]
            targets = [prost_text.target_ids(e, vocabulary, variant) for e in chunk]
            fields = {
                "id": [e.id for e in chunk],
                "inputs": _as_bytes(prost_text.history_ids(e.turns, vocabulary).ids for e in chunk),
                "targets": _as_bytes(targets),
                "inputs_pretokenized": [prost_text.history_text(e.turns) for e in chunk],
                "targets_pretokenized": [prost_text.target_text(e, variant) for e in chunk],
                "num_given": np.asarray([len(ids) for ids in prefixes], np.int32),
                "prefix": _as_bytes(prefixes),
            }
            yield {name: fields[name] for name in signature}

    with_rots = prost_text.writes_rots(variant)
    texts = ["id", "inputs", "targets", "inputs_pretokenized", "targets_pretokenized"]
    texts += ["prefix"] if variant == "gold_rot_and_response" else []
    signature = {name: tf.TensorSpec([None], tf.string) for name in texts}
    signature["num_given"] = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(chunks, output_signature=signature).unbatch()


def _as_bytes(vectors: Iterable[Sequence[int]]) -> list[bytes]:
    return [np.asarray(ids, np.int32).tobytes() for ids in vectors]


class _Remembering:
    """A vocabulary that encodes a text once, while it is among the latest ones."""

    def __init__(self, vocabulary: Any):
        self.marks, self.eos_id = vocabulary.marks, vocabulary.eos_id
        self.path, self.size = vocabulary.path, vocabulary.size
        self.encode = functools.lru_cache(_ENCODED_TURNS)(vocabulary.encode)
