"""Convert checkpoints between formats, piece by piece, so that a model may exceed memory."""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from cosmo.engine.base import durable, saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained, is_remote
from cosmo.engine.base.progress import Progress
from cosmo.engine.base.vocabulary import Vocabulary, identity
from cosmo.engine.checkpoints import any_format, lazy, run_checkpoints, streaming
from cosmo.engine.checkpoints.any_format import Source
from cosmo.engine.checkpoints.description import check_same_vocabulary, check_vocabulary, describe
from cosmo.engine.checkpoints.interop import (
    ctranslate2_folder,
    huggingface,
    t5x,
    t5x_adafactor,
    tokenizer,
)
from cosmo.engine.model import models
from cosmo.engine.model.step import StepConfig, TrainState, init_state
from cosmo.engine.model.t5 import T5Config

log = logging.getLogger(__name__)

MAX_STEP = 2**31 - 1  # an int32 in every checkpoint

REMEDY = "free some space, or give another folder"

FLOAT16 = (
    "float16 is refused: activations may overflow in it (those of T5's feed-forward layers pass "
    "65504), and the model answers NaN or nonsense; bfloat16 is as small and has float32's range"
)


def import_checkpoint(
    path: str,
    output: str,
    *,
    format: str | None = None,
    vocabulary: Vocabulary | None = None,
    optimizer_state: bool = False,
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> Source:
    """Convert a checkpoint of T5X, HuggingFace or ParlAI to ours, `output`/checkpoints/STEP.

    Args:
        path: the checkpoint.
        output: a folder that then serves as INITIAL_CHECKPOINT_PATH or CHECKPOINT_PATH.
        format: "t5x", "huggingface" or "parlai": raise an error if the checkpoint is of another.
        vocabulary: the meaning of its token ids. Its file is kept with the checkpoint.
        optimizer_state: whether to take over Adafactor's state (T5X only).
        step: the step to write instead of the checkpoint's own (0 for HuggingFace and ParlAI).
        allow_nonfinite: whether parameters may hold NaN or infinity.

    Returns the source. Raises UserError before anything is written if a tensor is missing, surplus
    or misshapen. An interrupted import leaves no checkpoint.
    """
    # This checks every tensor's name and shape, before anything is written.
    source = any_format.open_source(path, format, allow_nonfinite=allow_nonfinite)
    if source.format == "cosmo":
        raise UserError(f"{path} is a checkpoint of ours already: use it as it is")
    # HuggingFace stores no step, so a user may know better than the file.
    step = source.step if step is None else step
    if not 0 <= step <= MAX_STEP:
        raise UserError(f"step={step}; a checkpoint's step is 0 to {MAX_STEP}", setting="step")
    description = describe(models.EncoderDecoderModel(source.network), vocabulary)
    if vocabulary is not None:
        log.info(describe_vocabulary_fit(source, vocabulary))
        any_format.check_own_vocabulary(source, description["vocabulary"])
    # For people: a converted checkpoint shows where its numbers come from.
    description["imported_from"] = {
        "format": source.format,
        "path": source.path,
        "step": source.step,
        **source.description,
    }
    if source.text_options:
        description["imported_from"]["text_options"] = source.text_options
    params = traverse_util.unflatten_dict(source.params)
    state: Any = {"step": lazy.from_array(np.int32(step)[()]), "params": params}
    if optimizer_state:
        model = models.EncoderDecoderModel(source.network)
        # The defaults of StepConfig are T5X's: an Adafactor that factors the same tensors.
        abstract = jax.eval_shape(lambda: init_state(model, StepConfig(), 0).opt_state)
        opt_state = any_format.read_adafactor(source, abstract)
        state = TrainState(state["step"], state["params"], opt_state)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Errors of single arrays are UserErrors already, and name the array: they pass through.
    with _progress(total) as on_piece, explained(output, REMEDY, "output"):
        streaming.write_checkpoint(output, step, state, description, on_piece)
        if vocabulary is not None:
            run_checkpoints.copy_vocabulary(output, vocabulary.path)
    return source


def export_checkpoint(
    path: str,
    output: str,
    *,
    format: str,
    dtype: str = "float32",
    max_shard_gb: float = 5.0,
    vocabulary_path: str | None = None,
    model_type: str | None = None,
) -> Source:
    """Write a checkpoint of any format in HuggingFace's, T5X's or CTranslate2's.

    Args:
        path: the checkpoint.
        output: the folder to make. "t5x": the folder to make checkpoint_STEP in.
        format: "huggingface", "t5x" or "ctranslate2".
        dtype: "float32", "bfloat16" (HuggingFace only) or "int8" (CTranslate2 only).
        max_shard_gb: the maximum size of a safetensors file, in 1e9 bytes.
        vocabulary_path: a vocabulary, written as HuggingFace's tokenizer files, or beside
            T5X's checkpoint.
        model_type: "t5", "mt5" or "umt5" (HuggingFace only). None is that of the HuggingFace folder
            that the checkpoint is, or was imported from; else the one that computes the network.

    Returns the source. Raises UserError if the folder exists or cannot be written. A folder appears
    whole or not at all (in a bucket: its index or config.json comes last).
    """
    if dtype == "float16":
        raise UserError(FLOAT16)
    known = ctranslate2_folder.DTYPES if format == "ctranslate2" else tuple(huggingface.DTYPES)
    if dtype not in known:
        raise UserError(f"dtype={dtype!r}; it is one of {list(known)}", setting="dtype")
    if not 0 < max_shard_gb < math.inf:
        raise UserError(
            f"max_shard_gb={max_shard_gb}; it must be above 0, such as 5.0", setting="max_shard_gb"
        )
    if format == "t5x" and dtype != "float32":
        raise UserError("T5X keeps float32 parameters: export them with dtype float32")
    source = any_format.open_source(path)
    if format == "t5x" and not isinstance(source.network, T5Config):
        raise UserError(f"{source} is no T5, and T5X has no other network: export it as hf")
    if format == "ctranslate2":
        ctranslate2_folder.package()  # before the folder is made
        ctranslate2_folder.check_network(source.network)
        if is_remote(output):
            raise UserError(
                f"{output}: CTranslate2 writes to local disk: give a local folder, and copy it",
                setting="output",
            )
    target = epath.Path(output) / (f"checkpoint_{source.step}" if format == "t5x" else "")
    # Parameters of a source are float32, whatever its file holds.
    total = sum(a.nbytes for a in source.params.values()) * (2 if dtype == "bfloat16" else 4) // 4
    with _progress(total) as on_piece, _new_folder(target) as folder:
        if format == "t5x":
            # Only our own checkpoints have an optimizer state in the form that can be written.
            states = None
            if source.format == "cosmo":
                states = t5x_adafactor.to_param_states(source.others, source.network)
            if states is None:
                log.warning(
                    "%s has no Adafactor state: T5X must start its optimizer anew (see "
                    "docs/extend.md)",
                    source,
                )
            t5x.write_checkpoint(
                folder, source.step, source.params, source.network, states, on_piece
            )
            if vocabulary_path is not None:  # beside the checkpoint: T5X has no place for it
                run_checkpoints.copy_vocabulary(str(target.parent), vocabulary_path)
        elif format == "ctranslate2":
            pieces = None
            if vocabulary_path is not None:
                pieces = tokenizer.pieces_of(vocabulary_path)
                tokenizer.write_tokenizer(folder, vocabulary_path)
            description = describe(models.EncoderDecoderModel(source.network), None)
            description |= {"step": source.step, "exported_from": source.path}
            if vocabulary := _vocabulary_of(source, vocabulary_path):
                description["vocabulary"] = vocabulary
            ctranslate2_folder.write_folder(
                folder, source.params, source.network, dtype, pieces, on_piece, description
            )
            # Lengths and separators, so that the folder serves as a MODEL_DIR.
            for name in (saved_settings.FILE, saved_settings.GIN_FILE):
                settings = epath.Path(source.path) / name
                if source.format == "cosmo" and settings.exists():
                    (folder / name).write_bytes(settings.read_bytes())
        else:
            # Before the weights, so that an unsuitable vocabulary costs no time.
            if vocabulary_path is not None:
                tokenizer.write_tokenizer(folder, vocabulary_path)
            shard_bytes = int(max_shard_gb * 1e9)
            origin = {**source.description, **source.description.get("imported_from", {})}
            kind = model_type or origin.get("model_type")
            huggingface.write_folder(
                folder, source.params, source.network, dtype, shard_bytes, on_piece, kind
            )
    return source


def _vocabulary_of(source: Source, path: str | None) -> dict[str, Any] | None:
    """Return {path, fingerprint} of the vocabulary given, else of the source's own, if known."""
    path = path or source.vocabulary_path
    if path and epath.Path(path).exists():
        return {"path": path, "fingerprint": tokenizer.fingerprint(path)}
    return source.description.get("vocabulary")


def check_vocabulary_of(source: Source, vocabulary: Vocabulary) -> None:
    """Raise UserError if a vocabulary does not fit a checkpoint, or is not the checkpoint's own."""
    check_vocabulary(models.EncoderDecoderModel(source.network), vocabulary)
    wanted = identity(vocabulary)
    check_same_vocabulary(str(source), source.description.get("vocabulary"), wanted)
    any_format.check_own_vocabulary(source, wanted)


def describe_vocabulary_fit(source: Source, vocabulary: Vocabulary) -> str:
    """Return how a vocabulary fits a checkpoint's embedding, as a sentence.

    Raises UserError if it has more pieces than the embedding has rows.
    """
    rows, pieces = source.network.vocab_size, vocabulary.size
    check_vocabulary(models.EncoderDecoderModel(source.network), vocabulary)
    if pieces == rows:
        return f"{pieces:,} pieces, a row of the embedding each"
    # Models pad their embedding to a round size, for the hardware's sake.
    return (
        f"the embedding's {rows:,} rows are {rows - pieces:,} more than the vocabulary's "
        f"{pieces:,} pieces; they are kept, and read as unknown if ever generated"
    )


@contextlib.contextmanager
def _new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """Yield a folder to fill; rename it to `target` when the block ends, remove it if that fails.

    Raises UserError if `target` exists and is not empty, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: give another, or remove it", setting="output")
    # In an object store files appear whole, and folders cannot be renamed.
    remote = is_remote(target)
    # A fixed name, so that the next try removes what a kill has left.
    partial = target if remote else target.parent / f".{target.name}.partial"
    try:
        with explained(target, REMEDY, "output"):
            if partial.exists() and not remote:
                shutil.rmtree(partial)  # left by a process that was killed
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            if not remote:
                durable.sync_tree(partial)  # else a power loss could leave the name, files empty
                # An empty folder that the user made.
                if target.exists():
                    target.rmdir()
                partial.rename(target)
                durable.sync(target.parent)
    finally:
        if not remote:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` bytes in MiB. Yield a function that counts bytes as done."""
    # In MiB: bytes of a large model are too many digits to read.
    progress = Progress(math.ceil(total / 2**20), unit="MiB")
    done = 0

    def on_piece(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done // 2**20)

    yield on_piece
    progress.finish()
