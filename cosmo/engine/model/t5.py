"""Describe T5 1.0 and T5 1.1 (Raffel et al. 2020; Shazeer 2020); `transformer` computes them."""

import dataclasses

from flax import nnx

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SpecialIds
from cosmo.engine.model import transformer
from cosmo.engine.model.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's (`t5x.examples.t5.network.T5Config`).

    T5 1.1 is `mlp_activations=("gelu", "linear")`, `logits_via_embedding=False`; T5 1.0 is
    `("relu",)` and `True`. `dtype` is the compute type; parameters, softmax, norms and logits stay
    float32. `remat_policy` is a key of `transformer.REMAT_POLICIES`; None means "none". With "auto"
    training chooses (`sizing.choose_device_settings`), and all other commands recompute nothing.
    `attention` is "plain", "fused" (a kernel for TPUs: `fused_attention`) or "cudnn" (NVIDIA's, for
    GPUs). With "auto" training takes "fused" on TPUs v4 and later; all else is plain.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64  # need not be emb_dim / num_heads: T5 1.1 small has 6 heads of 64 for 512
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.0
    dtype: str = "bfloat16"
    # Type of the factors of products with weights, if another than `dtype`; not in `decode_step`.
    # "bfloat16" beside a float32 `dtype` is fast on a CPU with AMX, which XLA does not use for
    # bfloat16 results.
    product_dtype: str | None = None
    remat_policy: str | None = "none"
    attention: str = "plain"
    # Unrolled layers run faster on a CPU, and compile longer.
    scan_layers: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    # T5X's scanned network (`scalable_t5`) has a relative bias of its own in every layer.
    relative_attention_per_layer: bool = False
    # HuggingFace's name: multiply the decoder's output by M ** -0.5. None does so where the logits
    # are tied, as T5 1.0 does.
    scale_decoder_outputs: bool | None = None

    # The same in all T5s; see `models.NetworkConfig`.
    special_ids = SpecialIds()
    forbidden_ids = ()
    max_positions = None  # relative positions have no limit
    train_positions = False
    use_bias = False
    logits_bias = False
    dropout_shared = True

    def __post_init__(self):
        # gin gives lists; a config is hashed as the key of caches.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(
                    f"T5Config.mlp_activations has {name!r}; known are {sorted(ACTIVATIONS)}"
                )
        if self.remat_policy is None:  # as --gin.REMAT_POLICY=none arrives
            object.__setattr__(self, "remat_policy", "none")
        transformer.check_config(self)

    @property
    def inner_dropout_rate(self) -> float:
        """The rate in attention, feed-forward layers and after a stack: the same."""
        return self.dropout_rate

    @property
    def logits_scale(self) -> float:
        """The factor of the decoder's output before the product with the logits' kernel."""
        scaled = self.scale_decoder_outputs
        if scaled is None:
            scaled = self.logits_via_embedding
        return self.emb_dim**-0.5 if scaled else 1.0

    def attention_fits(self, queries: int, keys: int) -> bool:
        """Return whether the kernel of attention has room for such lengths."""
        return transformer.attention_fits(self, queries, keys)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return a network with fresh parameters."""
        return transformer.EncoderDecoder(self, rngs=rngs)
