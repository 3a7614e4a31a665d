"""SeqIO tasks for the tests of the reader process, which imports this module by its name."""

import functools

import numpy as np
import seqio
import tensorflow as tf

from cosmo.tasks.vocabularies import seqio_vocabulary

VOCABULARY = "tasks/sample/vocabulary.model"
SENTENCES = [f"number {i} of the toy corpus" for i in range(40)]


def _dataset(split, shuffle_files=False, seed=None, *, broken=False):
    del shuffle_files, seed

    def examples():
        for i, text in enumerate(SENTENCES if split == "train" else SENTENCES[:5]):
            if broken and i == 3:
                raise ValueError("toys.jsonl:4: the field 'targets' is missing")
            yield {"inputs": text, "targets": f"answer {i}"}

    signature = {name: tf.TensorSpec([], tf.string) for name in ("inputs", "targets")}
    return tf.data.Dataset.from_generator(examples, output_signature=signature)


def exact(targets, predictions):
    """Return the share of predictions that equal their target."""
    return {"exact": np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}


def total(targets, scores, counts=None):
    """Return the sum of the scores and of the numbers of tokens."""
    return {"total": sum(scores), "tokens": sum(counts["num_tokens"])}


def _add(name, **settings):
    feature = seqio.Feature(seqio_vocabulary(VOCABULARY), add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, **settings), splits=("train", "validation")
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=lambda text, example, is_target: text.upper(),
        metric_fns=[exact, total],
    )


_add("toys")
_add("broken_toys", broken=True)
