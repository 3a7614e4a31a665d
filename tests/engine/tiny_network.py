"""The network of the engine's tests: a T5 1.1 in float32 that computes in no time."""

from cosmo.engine.model import t5


def config(**changes) -> t5.T5Config:
    """Two layers and three, or with other fields."""
    sizes = dict(
        vocab_size=40,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=3,
        head_dim=8,
        mlp_dim=24,
        dtype="float32",
    )
    return t5.T5Config(**{**sizes, **changes})
