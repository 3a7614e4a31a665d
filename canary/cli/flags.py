"""Describe the flags that several verbs share; return the settings that they stand for."""

import argparse
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cosmo.engine.base.errors import UserError

if TYPE_CHECKING:
    from canary.module import Settings
    from cosmo.engine.model.decoding import DecodingConfig


MODEL = """
the model:
--checkpoint CKPT!  MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP,
                    MODEL_DIR/best (of a run with early stopping), a HuggingFace or T5X
                    folder, or a ParlAI model's file (the published Canary)
--vocabulary FILE   if none is kept with the checkpoint
--label_style text|sentinel  how the model writes labels (default: the run's own, or text)
--turn_separator TEXT  what the model reads between turns (default: its own, or " // ")
--dtype float32|bfloat16  of products (float32 on a CPU, else bfloat16); on a CPU with AMX
                    bfloat16 is more than twice as fast
--num_partitions N=1  devices a model copy
"""
# Both `canary guard` and `cosmo serve`, which guards itself, have these flags.
GUARD = """\
--policy FILE       what follows from labels (TOML): only the keys that differ from the default,
                    canary/guard/policy.toml
--audit FILE        gets a line of JSON for each decision, on the disk before it takes effect
--audit_text        write what people and the model said into --audit too
--queue FILE        gets a line of JSON for each intervention
--webhook URL       is called for each intervention (default: the policy's)
"""
# Rules of thumb are generated, labels are not.
GENERATION = """
rules of thumb (greedy by default):
--max_new_tokens N:int    longest (the model's targets)
--temperature T:float     above 0, sample (0.0)
--top_k K:int             sample from the K likeliest (0: from all)
--top_p P:float           sample from the likeliest of mass P (1.0)
--beam_size N:int         above 1, search with so many beams (1)
--length_penalty A:float  above 0, beams favour length (0.6)
--beam_search t5x|parlai|huggingface  whose beam search (t5x)
--min_length N:int        tokens before they may end (0)
--block_ngram N:int       no N tokens in a row twice (0: off)
--context_block_ngram N:int  no N tokens in a row of the dialogue (0: off)
--banned_ids IDS:ints     tokens that they may not have, such as 3,8004
--seed N=0                of samples
"""


def model_settings(
    args: argparse.Namespace, batch_size: int, backend: str | None = None
) -> "Settings":
    """Return the settings of the model that the flags of MODEL name. Raises UserError."""
    from canary.module import Settings

    return Settings.find(
        args.checkpoint,
        vocabulary=args.vocabulary,
        batch_size=batch_size,
        dtype=args.dtype,
        label_style=args.label_style,
        turn_separator=args.turn_separator,
        num_partitions=args.num_partitions,
        backend=backend,
    )


def decoding_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of DecodingConfig that flags such as GENERATION's give."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "beam_size", "length_penalty")
    names = (*names, "min_length", "block_ngram", "context_block_ngram", "banned_ids")
    flags = {name: name for name in names} | {"search": "beam_search"}
    given = {field: getattr(args, flag) for field, flag in flags.items()}
    return {field: value for field, value in given.items() if value is not None}


def first_examples(examples: Iterable[Any], args: argparse.Namespace) -> list[Any]:
    """Return the first --num_examples of `examples`, or all. Raises UserError for less than 0."""
    if args.num_examples is not None and args.num_examples < 0:
        raise UserError(
            f"num_examples={args.num_examples}; it must be at least 1", setting="num_examples"
        )
    return list(itertools.islice(examples, args.num_examples))


def decoding_config(args: argparse.Namespace, settings: "Settings") -> "DecodingConfig":
    """Return the decoding that the flags of GENERATION name."""
    from cosmo.engine.model.decoding import DecodingConfig

    # By default as long as the targets that the model learnt to write.
    targets = settings.session.task_feature_lengths["targets"]
    return DecodingConfig(**{"max_new_tokens": targets, **decoding_fields(args)})
