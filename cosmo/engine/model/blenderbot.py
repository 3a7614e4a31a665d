"""Describe BlenderBot 1 and the PushShift transformer (Roller et al. 2020).

`transformer` computes them. Source: ParlAI's transformer of variant "prelayernorm", and
HuggingFace's `BlenderbotForConditionalGeneration`.
"""

import dataclasses

from flax import nnx

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SpecialIds
from cosmo.engine.model import transformer


@dataclasses.dataclass(frozen=True)
class BlenderbotConfig:
    """Sizes and numerics; the defaults are the 2.7B of Prost's base and of BlenderBot 3B.

    Unlike T5 it has biases, the usual layer norm, the exact GELU and attention over sqrt(head
    size). Positions are absolute: `max_positions` tokens are a hard limit of inputs and of answers.
    Logits are the product with the embedding, without a scale. Fields
    that `t5.T5Config` has too mean the same.
    """

    vocab_size: int = 8008
    emb_dim: int = 2560
    num_heads: int = 32
    num_encoder_layers: int = 2
    num_decoder_layers: int = 24
    mlp_dim: int = 10240
    max_positions: int = 128
    dropout_rate: float = 0.0
    dtype: str = "bfloat16"
    product_dtype: str | None = None
    remat_policy: str | None = "none"
    attention: str = "plain"
    scan_layers: bool = True
    # ParlAI gives its start token the probability 0, in training too; HuggingFace does not.
    forbidden_ids: tuple[int, ...] = (1,)
    # ParlAI keeps the tables of positions as they are, HuggingFace trains them.
    train_positions: bool = False
    # HuggingFace adds a constant to the logits, of zeros in the published checkpoints.
    logits_bias: bool = False

    # The same in all BlenderBots; see `models.NetworkConfig`.
    special_ids = SpecialIds(pad=0, start=1, eos=2)
    mlp_activations = ("gelu_exact",)
    logits_via_embedding = True
    logits_scale = 1.0
    inner_dropout_rate = 0.0
    dropout_shared = False
    relative_attention_num_buckets = 0
    relative_attention_max_distance = 0
    relative_attention_per_layer = False
    use_bias = True

    def __post_init__(self):
        # gin gives lists; a config is hashed as the key of caches.
        object.__setattr__(self, "forbidden_ids", tuple(self.forbidden_ids))
        if self.remat_policy is None:  # as --gin.REMAT_POLICY=none arrives
            object.__setattr__(self, "remat_policy", "none")
        transformer.check_config(self)
        if self.emb_dim % self.num_heads or self.emb_dim % 2:
            raise UserError(
                f"BlenderbotConfig.emb_dim={self.emb_dim}; it must be even, and a multiple of "
                f"num_heads={self.num_heads}"
            )
        eos = self.special_ids.eos
        if not all(0 < id < self.vocab_size and id != eos for id in self.forbidden_ids):
            raise UserError(
                f"BlenderbotConfig.forbidden_ids={self.forbidden_ids}; ids are 1 to "
                f"{self.vocab_size - 1}, but not {eos}, which ends texts",
                setting="FORBIDDEN_IDS",
            )

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.emb_dim // self.num_heads

    def attention_fits(self, queries: int, keys: int) -> bool:
        """Return whether the kernel of attention has room for such lengths."""
        return transformer.attention_fits(self, queries, keys)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return a network with fresh parameters."""
        return transformer.EncoderDecoder(self, rngs=rngs)
