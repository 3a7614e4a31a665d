"""Find the settings of a session over any checkpoint: network, vocabulary and lengths."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

import jax

from cosmo.engine.base import saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import BLENDERBOT_DELIMITER, Vocabulary
from cosmo.engine.checkpoints import any_format
from cosmo.engine.checkpoints.interop import ctranslate2_folder
from cosmo.engine.infer import ctranslate2_model, infer
from cosmo.engine.model import models, partitioning

log = logging.getLogger(__name__)


def session_config(
    path: str,
    load_vocabulary: Callable[[str], Vocabulary],
    *,
    vocabulary: str | None = None,
    lengths: Mapping[str, int] | None = None,
    usual_lengths: Mapping[str, int] | Callable[[Vocabulary], Mapping[str, int]],
    batch_size: int = 32,
    dtype: str | None = None,
    num_partitions: int = 1,
    backend: str | None = None,
) -> tuple[infer.SessionConfig, saved_settings.Saved]:
    """Return (the settings of a session, the settings of the run that made the checkpoint).

    Args:
        path: a run's MODEL_DIR, one of its checkpoints, a HuggingFace folder, a T5X checkpoint or
            a ParlAI model.
        load_vocabulary: function that reads a vocabulary.
        vocabulary: path of the vocabulary, if none is kept with the checkpoint.
        lengths: the most tokens of "inputs" and "targets"; None is the run's own.
        usual_lengths: the same for a checkpoint that no run of ours made, or a function of its
            vocabulary that returns them.
        batch_size: rows at a time; rounded up to the number of devices.
        dtype: "float32" or "bfloat16"; by default float32 on a CPU, else bfloat16. On a CPU
            bfloat16 is for products with weights alone.
        num_partitions: devices that one copy of the model is split over.
        backend: one of `ctranslate2_model.BACKENDS`; None is a CTranslate2 folder's own, else
            "jax". CTranslate2 takes its type of weights by the backend's name, and no `dtype`.

    The run's settings are empty for a checkpoint that no run of ours made. Nothing in the
    checkpoint's folder is executed. Raises UserError if there is no checkpoint, or no vocabulary
    for it.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # our users cannot use Orbax's notes
    # Opened for its network and vocabulary: no weights are read yet.
    source = _opened(str(path))
    vocabulary = vocabulary or source.vocabulary_path
    if dtype is not None and ctranslate2_model.backend_of(str(path), backend) != "jax":
        raise UserError(
            f"dtype={dtype!r} is of this engine's products; CTranslate2's are by the backend: "
            f"{' or '.join(ctranslate2_model.DTYPES)}",
            setting="dtype",
        )
    if vocabulary is None:
        raise UserError(
            f"{source} has no vocabulary beside it: give a byte-level BPE (vocab.json beside "
            "merges.txt, or ParlAI's .dict)"
            if source.network.max_positions
            else f"{source} has no vocabulary beside it: give a SentencePiece model (a HuggingFace "
            "model's spiece.model; that of any T5 serves for ParlAI's T5)",
            setting="vocabulary",
        )
    ours = source.format in ("cosmo", "ctranslate2")
    saved = saved_settings.read(source.path) if ours else None
    options = source.text_options
    saved = saved or saved_settings.Saved(source.path, text_options=options)
    delimiter = options.get("delimiter", BLENDERBOT_DELIMITER)
    if source.network.max_positions and delimiter != BLENDERBOT_DELIMITER:
        log.warning(
            "%s was trained with delimiter=%r between turns; here it reads two spaces, as the "
            "published BlenderBots do",
            source,
            delimiter,
        )
    on_cpu = jax.default_backend() == "cpu"
    network = dataclasses.replace(
        source.network,
        dtype="float32" if on_cpu else dtype or "bfloat16",
        # With AMX, a CPU's products with weights are more than twice as fast in bfloat16.
        product_dtype=dtype if on_cpu else None,
        dropout_rate=0.0,
        scan_layers=not on_cpu,  # a CPU is faster with unrolled layers
    )
    known = load_vocabulary(vocabulary)
    usual = usual_lengths(known) if callable(usual_lengths) else usual_lengths
    partitioner = partitioning.Partitioner(num_partitions)
    shards = partitioner.mesh().shape["data"]
    found = infer.SessionConfig(
        model=models.EncoderDecoderModel(network),
        vocabulary=known,
        checkpoint_path=str(path),
        # Later ones win: the run's own over the usual ones, the caller's over both.
        task_feature_lengths={
            **{
                side: min(length, network.max_positions or length)
                for side, length in {**usual, **_lengths_of(options)}.items()
            },
            **saved.macro("TASK_FEATURE_LENGTHS", Mapping[str, int], {}),
            **(lengths or {}),
        },
        # Rounded up, because every device takes equally many rows.
        batch_size=-(-batch_size // shards) * shards,
        partitioner=partitioner,
        backend=backend,
    )
    return found, saved


def _opened(path: str) -> any_format.Source:
    """Return the checkpoint at `path`; that of a CTranslate2 folder has no parameters."""
    found = any_format.locate(path)
    if found.format != "ctranslate2":
        return any_format.open_source(path)
    description = ctranslate2_folder.read_description(found.folder)
    network = any_format.network_of(found.folder, description)
    return any_format.Source(found.format, found.folder, found.step, network, {}, description, {})


def _lengths_of(options: Mapping[str, int]) -> dict[str, int]:
    """Return the lengths by ParlAI's options, of those that they give."""
    both = options.get("truncate")  # where a side has none of its own
    sides = {"inputs": "text_truncate", "targets": "label_truncate"}
    found = {side: options.get(name, both) for side, name in sides.items()}
    return {side: length for side, length in found.items() if length}
