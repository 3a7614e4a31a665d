"""Give SeqIO a vocabulary that only Python can read: a byte-level BPE. Imports TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf


class SeqioVocabulary(seqio.Vocabulary):
    """A vocabulary of `cosmo.tasks.vocabularies` whose tokenizer TensorFlow calls in Python."""

    def __init__(self, vocabulary: Any):
        super().__init__()
        self._vocabulary = vocabulary

    @property
    def eos_id(self) -> int:
        """Return the id of the end token."""
        return self._vocabulary.eos_id

    @property
    def unk_id(self) -> int:
        """Return the id of the unknown piece, which no text has."""
        return self._vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> np.ndarray:
            # TensorFlow gives an array of one text outside a graph. Its bytes come by `item`.
            data = text.item() if isinstance(text, np.ndarray) else text
            return np.asarray(self._vocabulary.encode(data.decode("utf-8")), np.int32)

        return tf.ensure_shape(
            tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32), [None]
        )

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1]).tolist()
            texts = [self._vocabulary.decode(row).encode("utf-8") for row in flat]
            return np.asarray(texts, object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [tf.convert_to_tensor(ids)], tf.string)
        return tf.ensure_shape(texts, ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        """Return whether both give every text the same ids."""
        return isinstance(other, SeqioVocabulary) and (
            self._vocabulary.fingerprint,
            self._vocabulary.size,
        ) == (other._vocabulary.fingerprint, other._vocabulary.size)

    def __hash__(self) -> int:
        return hash((self._vocabulary.fingerprint, self._vocabulary.size))
