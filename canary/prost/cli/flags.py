"""Describe the flags that several verbs share; return the settings that they stand for."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from canary.cli.flags import decoding_fields
from cosmo.engine.base.errors import UserError

if TYPE_CHECKING:
    from canary import module
    from canary.prost.agent import Prost, Settings

MODEL = """
the model:
--checkpoint CKPT!  MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP,
                    MODEL_DIR/best, a HuggingFace folder or a ParlAI file
--vocabulary FILE   if none is kept with the checkpoint
--variant rot_and_response|response_only  what the model was trained to write (default: the
                    run's own, or response_only)
--dtype float32|bfloat16  of products (float32 on a CPU, else bfloat16)
--num_partitions N=1  devices a model copy
"""
CANARY = """
--canary CKPT       the safety module whose rules of thumb the answers follow (default: the
                    model writes its own)
--canary_vocabulary FILE  if none is kept with that checkpoint
"""
GENERATION = """
generation (default: as the run's settings say; BlenderBot's preset for other checkpoints):
--max_new_tokens N:int    longest answer in tokens, rules of thumb counted
--min_length N:int        tokens before an answer may end
--temperature T:float     above 0, sample instead of searching
--top_k K:int             sample from the K likeliest (0: from all)
--top_p P:float           sample from the likeliest of mass P (1.0)
--beam_size N:int         above 1, search with so many beams
--beam_search t5x|parlai|huggingface  whose beam search
--length_penalty A:float  above 0, beams favour length
--block_ngram N:int       no N tokens in a row twice in an answer (0: off)
--context_block_ngram N:int  nor any of the dialogue's (0: off)
--banned_ids IDS:ints     tokens that no answer has, such as 3,8004
--seed N=0                of samples
"""


def model_settings(args: argparse.Namespace, batch_size: int) -> "Settings":
    """Return the settings of the model that the flags of MODEL name. Raises UserError."""
    from canary.prost.agent import Settings

    return Settings.find(
        args.checkpoint,
        variant=args.variant,
        vocabulary=args.vocabulary,
        batch_size=batch_size,
        dtype=args.dtype,
        num_partitions=args.num_partitions,
    )


def canary_settings(args: argparse.Namespace, batch_size: int) -> "module.Settings | None":
    """Return the settings of the Canary that --canary names, or None."""
    from canary import module

    if args.canary is None:
        if args.canary_vocabulary is not None:
            raise UserError(
                "there is no Canary to read this vocabulary: give its checkpoint too",
                setting=("canary", "canary_vocabulary"),
            )
        return None
    try:
        return module.Settings.find(
            args.canary,
            vocabulary=args.canary_vocabulary,
            batch_size=batch_size,
            dtype=args.dtype,
            num_partitions=args.num_partitions,
        )
    except UserError as error:
        # By its own flags: those that the error names are Prost's here.
        names = {"vocabulary": "canary_vocabulary", "VOCABULARY_PATH": "canary_vocabulary"}
        setting = [names.get(name, "canary") for name in error.settings] or "canary"
        raise UserError(error.message, setting=setting) from error


def both_settings(
    args: argparse.Namespace, batch_size: int
) -> "tuple[Settings, module.Settings | None]":
    """Return the settings of the model and of its Canary. Raises UserError for a wrong flag.

    A mistake in flags costs no loading.
    """
    settings = model_settings(args, batch_size)
    settings.decoding(**decoding_fields(args))
    for name in ("canary", "rot"):
        if getattr(args, name, None):  # `chat` has no --rot
            settings.check_follows_rots(name)
    return settings, canary_settings(args, batch_size)


def open_prost(args: argparse.Namespace, *, bucketed: bool = True) -> "Prost":
    """Load the model for one dialogue at a time and, if it is named, its Canary.

    Without `bucketed` all inputs are padded to one length. Raises UserError.
    """
    # A larger batch would be padding.
    settings, canary = both_settings(args, batch_size=1)

    def replaced(found: Any) -> Any:
        session = dataclasses.replace(found.session, bucketed=bucketed)
        return dataclasses.replace(found, session=session)

    settings = replaced(settings)
    opened = None if canary is None else replaced(canary).open()
    return settings.with_session(settings.session.open()[0], opened)
