"""What the decoder needs to know of a base model, whatever family it comes from."""

from dataclasses import dataclass

from .errors import ModelCorrupt
from .rope import RopeConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and variants of one decoder.

    Attributes:
        model_type: Hugging Face ``model_type``.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Width of one head.
        intermediate_size: Inner width of the MLP.
        vocab_size: Rows of the embedding and width of the logits.
        max_position: Longest sequence.
        norm_eps: Added to the variance in every norm.
        activation: ``silu`` (gated MLP), ``gelu`` or ``gelu_new`` (plain MLP).
        windows: Per layer, how many keys back a row sees (its own included); None sees all.
        tie_word_embeddings: The head's weight is the embedding's.
        rope: Rotary embedding; None where positions are learned.
        qkv_bias: q, k and v projections have a bias.
        attention_out_bias: The attention's output projection has one.
        mlp_bias: The MLP's projections have one.
        qk_norm: Each query and key head is RMS-normalised before the rotation.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    rope: RopeConfig | None
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
            ModelCorrupt: A size is not a positive integer, or sizes contradict each other.
        """
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelCorrupt(f"config: {name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelCorrupt(
                f"config: {self.num_heads} query heads cannot share {self.num_kv_heads} KV heads"
            )
        if len(self.windows) != self.num_layers or any(
            w is not None and w < 1 for w in self.windows
        ):
            raise ModelCorrupt(f"config: no layer's sliding windows can be {self.windows}")
        if self.rope is not None and self.head_dim % 2:
            raise ModelCorrupt(f"config: rotary heads have an even width, not {self.head_dim}")


_SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position",
)
