"""Flags that several verbs share, and the settings that they stand for."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from canary.module import Settings
    from cosmo.engine.model.decoding import DecodingConfig


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="MODEL_DIR of a run (its latest checkpoint), MODEL_DIR/checkpoints/STEP, "
        "MODEL_DIR/best (of a run with early stopping), or a HuggingFace or T5X folder",
    )
    group.add_argument("--vocabulary", metavar="FILE", help="if none is kept with the checkpoint")
    group.add_argument(
        "--label_style",
        choices=["text", "sentinel"],
        help="how the model writes labels (default: the run's own, or text)",
    )
    group.add_argument(
        "--turn_separator",
        metavar="TEXT",
        help='what the model reads between turns (default: the run\'s own, or " // ")',
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of products (float32 on a CPU, else bfloat16); on a CPU with AMX bfloat16 is more "
        "than twice as fast",
    )
    group.add_argument(
        "--num_partitions", type=int, default=1, metavar="N", help="devices a model copy (1)"
    )


def model_settings(args: argparse.Namespace, batch_size: int) -> "Settings":
    """Return the settings of the model that the flags of `add_model` name. Raises UserError."""
    from canary.module import Settings

    return Settings.find(
        args.checkpoint,
        vocabulary=args.vocabulary,
        batch_size=batch_size,
        dtype=args.dtype,
        label_style=args.label_style,
        turn_separator=args.turn_separator,
        num_partitions=args.num_partitions,
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the flags of decoding, which writes rules of thumb."""
    group = parser.add_argument_group("rules of thumb (greedy by default)")
    number = group.add_argument
    number("--max_new_tokens", type=int, metavar="N", help="longest (the model's targets)")
    number("--temperature", type=float, metavar="T", help="above 0, sample (0.0)")
    number("--top_k", type=int, metavar="K", help="sample from the K likeliest (0: from all)")
    number("--top_p", type=float, metavar="P", help="sample from the likeliest of mass P (1.0)")
    number("--beam_size", type=int, metavar="N", help="above 1, search with so many beams (1)")
    number("--length_penalty", type=float, metavar="A", help="above 0, beams favour length (0.6)")
    number("--seed", type=int, default=0, metavar="N", help="of samples (0)")


def decoding_config(args: argparse.Namespace, settings: "Settings") -> "DecodingConfig":
    """Return the decoding that the flags of `add_generation` name."""
    from cosmo.engine.model.decoding import DecodingConfig

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "beam_size", "length_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    targets = settings.session.task_feature_lengths["targets"]
    return DecodingConfig(**{"max_new_tokens": targets, **given})
