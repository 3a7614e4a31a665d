"""Register the SeqIO tasks: sources, preprocessing on token ids, metrics. Imports TensorFlow.

The text form of an input is `formatting.cosmo_input`. Here the parts are tokenized one by one
before SeqIO's cache and joined after it. A cached corpus so gets a fresh dropout each epoch and any
sequence length. The joined ids are those of the joined text, because pieces never cross white space
and separators begin and end with white space.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from cosmo.engine.base.errors import DataError
from cosmo.tasks import metrics
from cosmo.tasks.families import Corpus
from cosmo.tasks.files import SPLITS
from cosmo.tasks.formatting import Example, Separators
from cosmo.tasks.vocabularies import load, seqio_vocabulary

TFDS_VERSION = "1.0.0"
_TOKEN_METRICS = (metrics.perplexity, metrics.token_accuracy)

# Examples given from Python to TensorFlow at once, because each such call is slow. On 2 cores
# SeqIO reads 2,600 examples/s, and the recipes for TPU slices need about 800.
CHUNK_EXAMPLES = 64
_UNIT = "\x1f"  # ASCII's unit separator: joins the turns of an example for that call
# TensorFlow rewrites mapped functions so that Python's `if` and `for` work on tensors. Those here
# use neither on tensors, and the rewriting would take seconds at every start.
_do_not_convert = tf.autograph.experimental.do_not_convert


class FilesSource(seqio.FunctionDataSource):
    """SeqIO's function source over the examples of files, with lazy splits and cheap shards.

    `as_dataset(corpus, examples, split)` makes a TensorFlow dataset of the `examples(split)`.
    """

    def __init__(self, corpus: Corpus, as_dataset: Callable[..., tf.data.Dataset] | None = None):
        self._corpus = corpus
        self._as_dataset = as_dataset or _file_dataset
        super().__init__(
            functools.partial(self._as_dataset, corpus, corpus.examples), splits=SPLITS
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Return True: a shard is every n-th example, whatever the number of files."""
        return True

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None, **unused):
        """Return the examples of a split, or of one shard of it."""
        del shuffle, seed, unused  # see _file_dataset
        index, number = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)

        # A shard drops the other shards' examples before TensorFlow gets them, because reading and
        # formatting an example costs a tenth of TensorFlow's part.
        def of_shard(split: str) -> Iterator[Example]:
            return itertools.islice(self._corpus.examples(split), index, None, number)

        return self._as_dataset(self._corpus, of_shard, split)

    def count(self, split: str) -> int:
        """Return the number of examples in `split`, which are all read."""
        return sum(1 for _ in self._corpus.examples(split))

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits that have files."""
        # Looked up here and not in __init__, because registering a task must not touch the data: it
        # may be on a bucket. Without any split, get_dataset raises a better error than SeqIO.
        return tuple(self._corpus.splits()) or SPLITS


def tfds_source(name: str, data_dir: Any) -> seqio.DataSource:
    """Return the source of the examples that `tfds build` wrote to `data_dir`."""
    return seqio.TfdsDataSource(f"{name}:{TFDS_VERSION}", str(data_dir), read_only=True)


def register(
    sources: Mapping[str, seqio.DataSource],
    mixtures: Mapping[str, Mapping[str, float]],
    text_metrics: Mapping[str, Sequence[Callable[..., Any]]],
    vocabulary_path: Any,
    separators: Separators,
    narrative_dropout: float,
    instruction_dropout: float,
    token_metrics: bool,
    shuffle_buffer_size: int,
) -> None:
    """Register a task per source and the mixtures of them, in place of earlier ones.

    `mixtures`: name -> task -> rate; a task of rate 0 is left out. `text_metrics` are by task.
    """
    _check_splits_at_spaces(vocabulary_path, separators)
    preprocessors = [
        functools.partial(tokenize_parts, separators=separators),
        seqio.CacheDatasetPlaceholder(),
        functools.partial(
            drop_parts,
            narrative_dropout=narrative_dropout,
            instruction_dropout=instruction_dropout,
        ),
        functools.partial(join_parts, separators=separators),
        # After the cut, so that a long text keeps its EOS.
        seqio.preprocessors.append_eos_after_trim,
    ]
    settings = vocabulary_path, text_metrics, token_metrics, shuffle_buffer_size
    add_tasks(sources, mixtures, preprocessors, *settings)


def add_tasks(
    sources: Mapping[str, seqio.DataSource],
    mixtures: Mapping[str, Mapping[str, float]],
    preprocessors: Sequence[Any],
    vocabulary_path: Any,
    text_metrics: Mapping[str, Sequence[Callable[..., Any]]],
    token_metrics: bool,
    shuffle_buffer_size: int,
    postprocess: Callable[..., Any] | None = None,
) -> None:
    """Register a task per source and the mixtures of them; see `register`.

    `postprocess` makes what the text metrics compare of a text.
    """
    feature = seqio.Feature(vocabulary=seqio_vocabulary(vocabulary_path), add_eos=True)
    for name, source in sources.items():
        # Replaced, because SeqIO refuses a name twice and one process may have several runs.
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=preprocessors,
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=postprocess,
            metric_fns=[*text_metrics[name], *(_TOKEN_METRICS if token_metrics else ())],
            shuffle_buffer_size=shuffle_buffer_size,
        )
    for mixture, rates in mixtures.items():
        seqio.MixtureRegistry.remove(mixture)
        seqio.MixtureRegistry.add(mixture, [(name, rate) for name, rate in rates.items() if rate])


def tokenize_parts(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    separators: Separators,
) -> tf.data.Dataset:
    """Add the ids of every part, each with its separator.

    Takes the features of `Example` (strings; `turns` [N]) and `is_training` (int32). Adds int32
    vectors, which SeqIO can cache:
      `narrative_tokens`, `instruction_tokens`: the separator after them, nothing when empty;
      `turn_tokens`: all turns one after the other, the separator before each;
      `turn_lengths` [N]: the tokens of each turn with its separator;
      `targets`: the ids of the response.
    """
    vocabulary = output_features["inputs"].vocabulary

    @_do_not_convert
    def tokenize(batch):
        def before_the_rest(text):
            return tf.where(tf.equal(text, ""), "", tf.strings.join([text, separators.sep]))

        turns = batch["turns"]
        single = [
            before_the_rest(batch["narrative"]),
            before_the_rest(batch["instruction"]),
            batch["response"],
        ]
        before_turns = tf.strings.join([separators.turn, turns.values])
        ids = vocabulary.encode_tf(tf.concat([*single, before_turns], axis=0))
        size = tf.size(batch["response"])

        def matrix(splits):  # ragged [batch, tokens]
            tokens = ids.values[splits[0] : splits[-1]]
            return tf.RaggedTensor.from_row_splits(tokens, splits - splits[0], validate=False)

        # Ragged tensors slice and merge too, but with so many checks that they make a third of the
        # graph, which is built anew at every start.
        splits = ids.row_splits
        turn_splits = splits[3 * size :]
        turn_lengths = tf.cast(turn_splits[1:] - turn_splits[:-1], tf.int32)
        return {
            **batch,
            "narrative_tokens": matrix(splits[: size + 1]),
            "instruction_tokens": matrix(splits[size : 2 * size + 1]),
            "targets": matrix(splits[2 * size : 3 * size + 1]),
            "turn_tokens": matrix(tf.gather(turn_splits, turns.row_splits)),
            "turn_lengths": turns.with_values(turn_lengths),
        }

    # In batches, because one call of the tokenizer costs more than tokenizing an example.
    batches = dataset.ragged_batch(CHUNK_EXAMPLES)
    examples = batches.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
    # unbatch leaves ragged tensors of no ragged dimension; a map makes them plain vectors.
    return examples.map(dict, num_parallel_calls=tf.data.AUTOTUNE)


def drop_parts(
    dataset: tf.data.Dataset, narrative_dropout: float, instruction_dropout: float
) -> tf.data.Dataset:
    """Empty narrative and instruction at random where `is_training`. Kim et al. 2023, section 4.

    The two draws are independent. The same seed of SeqIO gives the same draws.
    """

    @functools.partial(seqio.map_over_dataset, num_seeds=1)
    @_do_not_convert
    def drop(example, seed):
        example = dict(example)
        draws = tf.random.stateless_uniform([2], seed)
        dropped = tf.logical_and(
            draws < [narrative_dropout, instruction_dropout], example["is_training"] > 0
        )
        for index, part in enumerate(("narrative", "instruction")):
            text, tokens = example[part], example[f"{part}_tokens"]
            example[part] = tf.where(dropped[index], "", text)
            length = tf.where(dropped[index], 0, tf.size(tokens))
            example[f"{part}_tokens"] = tokens[:length]
        return example

    return drop(dataset)


def join_parts(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    separators: Separators,
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Join the parts to `inputs`, leaving the oldest whole turns out to fit with EOS.

    The ids are those of `cosmo_input` after `drop_oldest_turns`. If narrative, instruction and
    latest turn alone are too long, the front is cut. Keeps `id`, and the texts as
    `inputs_pretokenized` (whole, also if ids were cut) and `targets_pretokenized`.
    """
    limit = (sequence_length or {}).get("inputs")
    separator_length = len(output_features["inputs"].vocabulary.encode(separators.turn))

    @seqio.map_over_dataset
    @_do_not_convert
    def join(example):
        lengths, turn_tokens = example["turn_lengths"], example["turn_tokens"]
        fixed = tf.concat([example["narrative_tokens"], example["instruction_tokens"]], axis=0)
        first = 0
        if limit is not None:
            # formatting.first_turn_kept on tensors. suffixes[i] counts the tokens of turns i and
            # later; the separator before turn i is not written.
            suffixes = tf.cumsum(lengths, reverse=True) - separator_length
            fits = tf.size(fixed) + suffixes + 1 <= limit
            too_long = tf.reduce_sum(tf.cast(tf.logical_not(fits), tf.int32))
            first = tf.minimum(too_long, tf.size(lengths) - 1)
        start = tf.reduce_sum(lengths[:first]) + separator_length
        inputs = tf.concat([fixed, turn_tokens[start:]], axis=0)
        if limit is not None:
            # The front goes, because the newest words count most.
            inputs = inputs[tf.maximum(tf.size(inputs) - (limit - 1), 0) :]
        history = tf.strings.reduce_join(example["turns"][first:], separator=separators.turn)
        parts = tf.stack([example["narrative"], example["instruction"], history])
        parts = tf.boolean_mask(parts, tf.not_equal(parts, ""))
        return {
            "id": example["id"],
            "inputs": inputs,
            "inputs_pretokenized": tf.strings.reduce_join(parts, separator=separators.sep),
            "targets": example["targets"],
            "targets_pretokenized": example["response"],
        }

    return join(dataset)


def _file_dataset(
    corpus: Corpus,
    examples: Callable[[str], Iterator[Example]],
    split: str,
    shuffle_files: bool = False,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Return the examples of `split` as a dataset with the features that `tokenize_parts` takes."""
    # Not shuffled here, because ids count records in the order of files' names. SeqIO shuffles
    # examples afterwards.
    del shuffle_files, seed
    corpus.files(split)  # raise for a missing path here, because TensorFlow would hide the error

    def chunks() -> Iterator[dict[str, Any]]:
        rest = examples(split)
        while chunk := list(itertools.islice(rest, CHUNK_EXAMPLES)):
            yield {
                "id": [example.id for example in chunk],
                "narrative": [example.narrative for example in chunk],
                "instruction": [example.instruction for example in chunk],
                "turns": [_UNIT.join(t.replace(_UNIT, "") for t in e.turns) for e in chunk],
                "response": [example.response for example in chunk],
            }

    texts = ("id", "narrative", "instruction", "turns", "response")
    dataset = tf.data.Dataset.from_generator(
        chunks, output_signature={name: tf.TensorSpec([None], tf.string) for name in texts}
    ).unbatch()

    @_do_not_convert
    def with_turns(example):
        turns = tf.raw_ops.StringSplitV2(input=[example["turns"]], sep=_UNIT).values
        # As a feature, because SeqIO does not give preprocessors the split.
        return {**example, "turns": turns, "is_training": tf.constant(int(split == "train"))}

    return dataset.map(with_turns, num_parallel_calls=tf.data.AUTOTUNE)


def _check_splits_at_spaces(vocabulary_path: Any, separators: Separators) -> None:
    """Raise DataError for a vocabulary whose pieces may cross white space."""
    vocabulary = load(vocabulary_path)
    parts = ("Nora feels fine.", separators.sep, "Hi, Ben!", separators.turn, "Hi")
    if vocabulary.encode("".join(parts)) != [
        id for part in parts for id in vocabulary.encode(part)
    ]:
        raise DataError.at(
            vocabulary.path,
            None,
            "the vocabulary has pieces across white space",
            got="other ids for a text than for its words one by one",
            expected="a SentencePiece model trained with split_by_whitespace",
            remedy="Use T5's vocabulary, or train one with that option (it is the default).",
        )
