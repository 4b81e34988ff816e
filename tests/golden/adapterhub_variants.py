"""Which adapters ``make_adapterhub.py`` makes: the library's configurations, and on which bases."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.configuration import DvoRAConfig, MTLLoRAConfig

from adapters import (
    AdapterConfig,
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DiReftConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)

TINY = ("llama", "qwen2", "qwen3", "gpt2")
ROTARY = ("llama", "qwen2", "qwen3")
HOOKED = ("qwen2", "qwen3")
NATIVE = ("llama", "gpt2")
DEMO = ("smollm2",)
DEMO_LAYERS = [7, 21]
DEMO_LEAVES_OUT = [layer for layer in range(30) if layer not in DEMO_LAYERS]
LENGTHS = (1, 9, 23)


@dataclass(frozen=True)
class Variant:
    """One adapter to make per base.

    Attributes:
        name: Folder of the adapter below its family's.
        config: The library's configuration.
        families: Bases on which the library can compute it.
        cannot: Bases on which the library itself fails, with the type of its error.
        size: Factor on the random weights.
        lengths: Of the prompts.
        safetensors: Save ``adapter.safetensors`` instead of ``pytorch_adapter.bin``.
        bf16: Save bfloat16 tensors; the library computes with their values in float32.
        head: Save the language model's head along with the adapter.
        trained_head: Change that head first.
        version: Written over the version of the saved configuration.
        live_differs: What was saved and loaded again computes something else than before.
        decayed: Shrink the diagonal of the orthogonal parametrisation, as weight decay does.
    """

    name: str
    config: AdapterConfig
    families: tuple[str, ...] = TINY
    cannot: Mapping[str, type[Exception]] = field(default_factory=dict)
    size: float = 1.0
    lengths: tuple[int, ...] = LENGTHS
    safetensors: bool = False
    bf16: bool = False
    head: bool = False
    trained_head: bool = False
    version: str | None = None
    live_differs: bool = False
    decayed: bool = False


def cannot(families: tuple[str, ...], error: type[Exception]) -> dict[str, type[Exception]]:
    return dict.fromkeys(families, error)


def seq_bn(**fields: object) -> BnConfig:
    return SeqBnConfig(**{"reduction_factor": 16, **fields})


NO_PREFIX = cannot(HOOKED, ValueError)
PREFIX = PrefixTuningConfig(prefix_length=5, bottleneck_size=8)
EVERY_MATRIX = {
    "attn_matrices": ["q", "k", "v"],
    "intermediate_lora": True,
    "output_lora": True,
}

BOTTLENECK = (
    Variant("seq_bn", seq_bn()),
    Variant("double_seq_bn", DoubleSeqBnConfig(reduction_factor=16)),
    Variant("par_bn", ParBnConfig(reduction_factor=16), size=0.5),
    Variant("scaled_par_bn", ParBnConfig(reduction_factor=16, scaling="learned")),
    Variant(
        "adapter_plus",
        AdapterPlusConfig(reduction_factor=16),
        NATIVE,
        cannot(HOOKED, ValueError),
    ),
    Variant(
        "adapter_plus_residual",
        AdapterPlusConfig(reduction_factor=16, original_ln_after=True, residual_before_ln=True),
    ),
    Variant("compacter", CompacterConfig(reduction_factor=16)),
    Variant("compacter_plus_plus", CompacterPlusPlusConfig(reduction_factor=8)),
    Variant(
        "compacter_own_factored_rule",
        CompacterPlusPlusConfig(
            reduction_factor=8, shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2
        ),
        ("llama", "qwen2"),
    ),
    Variant(
        "compacter_shared_factored_rule",
        CompacterPlusPlusConfig(reduction_factor=16, factorized_phm_rule=True),
        ("llama",),
    ),
    Variant(
        "compacter_own_rule",
        CompacterConfig(reduction_factor=16, shared_phm_rule=False, phm_rank=3),
        ("gpt2",),
    ),
    Variant(
        "compacter_whole_w",
        CompacterPlusPlusConfig(
            reduction_factor=8, factorized_phm_W=False, phm_dim=2, phm_bias=True
        ),
        ("llama",),
    ),
    Variant(
        "compacter_no_bias",
        CompacterPlusPlusConfig(reduction_factor=8, phm_bias=False),
        ("llama",),
    ),
    Variant(
        "compacter_shared_w",
        CompacterConfig(reduction_factor=16, shared_W_phm=True),
        ("llama", "gpt2"),
    ),
    Variant(
        "compacter_shared_whole_w",
        CompacterConfig(reduction_factor=16, shared_W_phm=True, factorized_phm_W=False),
        (),
        cannot(("llama",), UnboundLocalError),
    ),
    Variant("seq_bn_per_layer", seq_bn(reduction_factor={"1": 4, "default": 16})),
    Variant(
        "seq_bn_per_layer_leave_out",
        seq_bn(reduction_factor={"0": 16, "1": 5.5}, leave_out=[0]),
        ("llama", "qwen3"),
    ),
    Variant(
        "double_seq_bn_leave_out",
        DoubleSeqBnConfig(reduction_factor=16, leave_out=[1]),
        ("qwen2", "gpt2"),
    ),
    Variant("seq_bn_tanh", seq_bn(non_linearity="tanh"), ("llama", "gpt2")),
    Variant("seq_bn_leakyrelu", seq_bn(non_linearity="leakyrelu"), ("llama", "qwen2")),
    Variant("seq_bn_gelu", seq_bn(non_linearity="gelu"), ("llama",)),
    Variant("seq_bn_gelu_new", seq_bn(non_linearity="gelu_new"), ("gpt2",)),
    Variant("seq_bn_quick_gelu", seq_bn(non_linearity="quick_gelu"), ("qwen3",)),
    Variant("seq_bn_sigmoid", seq_bn(non_linearity="sigmoid"), ("qwen2",)),
    Variant("seq_bn_relu2", seq_bn(non_linearity="relu2"), ("llama",)),
    Variant("seq_bn_safetensors", seq_bn(), ("llama", "qwen2", "gpt2"), safetensors=True),
    Variant(
        "compacter_safetensors",
        CompacterConfig(reduction_factor=16),
        ("llama",),
        safetensors=True,
    ),
    Variant("seq_bn_bf16", seq_bn(), ("llama", "gpt2"), bf16=True),
    Variant("seq_bn_head", seq_bn(), ("llama", "qwen2"), head=True),
    Variant("seq_bn_trained_head", seq_bn(), ("llama",), head=True, trained_head=True),
    Variant("seq_bn_float_scaling", seq_bn(scaling=2.5), ("gpt2",), size=0.7),
    Variant("seq_bn_channel_scaling", seq_bn(scaling="channel"), ("qwen2",)),
    Variant("seq_bn_ln_before", seq_bn(ln_before=True)),
    Variant("seq_bn_ln_after", seq_bn(ln_after=True)),
    Variant(
        "seq_bn_ln_after_residual",
        seq_bn(ln_after=True, adapter_residual_before_ln=True),
    ),
    Variant(
        "double_seq_bn_both_ln",
        DoubleSeqBnConfig(reduction_factor=16, ln_before=True, ln_after=True),
        ("llama", "qwen3"),
    ),
    Variant("seq_bn_second_residual", seq_bn(residual_before_ln=False)),
    Variant("seq_bn_no_original_ln_before", seq_bn(original_ln_before=False)),
    Variant(
        "seq_bn_no_original_ln_after",
        seq_bn(original_ln_after=False),
        NATIVE,
        cannot(HOOKED, ValueError),
    ),
    Variant("seq_bn_attention", seq_bn(mh_adapter=True, output_adapter=False)),
    Variant(
        "par_bn_attention",
        ParBnConfig(reduction_factor=16, mh_adapter=True, output_adapter=False),
        size=0.5,
    ),
    Variant("par_bn_ln_before", ParBnConfig(reduction_factor=16, ln_before=True), size=0.5),
    Variant("par_bn_ln_after", ParBnConfig(reduction_factor=16, ln_after=True), size=0.5),
    Variant(
        "par_bn_phm",
        ParBnConfig(reduction_factor=16, phm_layer=True, init_weights="bert"),
        ("llama",),
        size=0.7,
    ),
)

INVERTIBLE = (
    Variant(
        "seq_bn_inv",
        SeqBnInvConfig(reduction_factor=16, inv_adapter_reduction_factor=8),
        ("llama",),
    ),
    Variant(
        "double_seq_bn_inv",
        DoubleSeqBnInvConfig(reduction_factor=16, inv_adapter_reduction_factor=3.5),
        ("llama",),
    ),
    Variant(
        "compacter_inv",
        CompacterPlusPlusConfig(
            reduction_factor=8, inv_adapter="nice", inv_adapter_reduction_factor=4
        ),
        ("llama",),
    ),
    Variant(
        "union_inv",
        ConfigUnion(
            LoRAConfig(r=2, alpha=4),
            SeqBnInvConfig(
                reduction_factor=16, inv_adapter_reduction_factor=8, non_linearity="tanh"
            ),
        ),
        ("llama",),
    ),
)

PREFIXES = (
    Variant("prefix_mlp", PREFIX, NATIVE, NO_PREFIX),
    Variant("prefix_flat", PrefixTuningConfig(flat=True, prefix_length=3), NATIVE, NO_PREFIX),
    Variant("prefix_flat_long", PrefixTuningConfig(flat=True, prefix_length=20), NATIVE, NO_PREFIX),
    Variant(
        "prefix_mlp_leave_out",
        PrefixTuningConfig(
            prefix_length=16, bottleneck_size=8, non_linearity="relu", leave_out=[0]
        ),
        NATIVE,
        NO_PREFIX,
    ),
    Variant(
        "prefix_flat_leave_out",
        PrefixTuningConfig(flat=True, prefix_length=4, leave_out=[1]),
        NATIVE,
        NO_PREFIX,
    ),
)

UNIONS = (
    Variant("mam", MAMConfig(PREFIX, ParBnConfig(reduction_factor=16)), NATIVE, NO_PREFIX, 0.6),
    Variant("union_lora_seq_bn", ConfigUnion(LoRAConfig(r=2, alpha=4), seq_bn())),
    Variant(
        "union_two_bn",
        ConfigUnion(
            seq_bn(mh_adapter=True, output_adapter=False, non_linearity="tanh"),
            ParBnConfig(reduction_factor=16),
        ),
        size=0.5,
    ),
    Variant(
        "union_bn_by_layer",
        ConfigUnion(seq_bn(leave_out=[0]), ParBnConfig(reduction_factor=16, leave_out=[1])),
        ("llama",),
        size=0.6,
    ),
    Variant("union_prefix_lora", ConfigUnion(PREFIX, LoRAConfig(r=2, alpha=4)), NATIVE),
    Variant(
        "union_lora_ia3",
        ConfigUnion(LoRAConfig(leave_out=[0], r=2), IA3Config(leave_out=[1])),
        (),
        cannot(("llama",), ValueError),
    ),
    Variant(
        "union_reft_lora",
        ConfigUnion(NoReftConfig(r=2), LoRAConfig(r=2, alpha=4)),
        ("llama", "qwen2"),
    ),
)

LORAS = (
    Variant("lora", LoRAConfig(r=4, alpha=8)),
    Variant("lora_every_matrix", LoRAConfig(r=3, alpha=7.5, **EVERY_MATRIX)),
    Variant(
        "lora_rank_root_alpha",
        LoRAConfig(r=5, alpha=4.0 * 5**0.5, attn_matrices=["q", "k"], intermediate_lora=True),
    ),
    Variant("lora_q", LoRAConfig(r=4, alpha=8, attn_matrices=["q"]), ("gpt2",), size=1.5),
    Variant("lora_kv", LoRAConfig(r=4, alpha=8, attn_matrices=["k", "v"]), ("gpt2", "llama")),
    Variant("lora_v_and_q", LoRAConfig(r=4, alpha=6, attn_matrices=["v", "q"]), ("gpt2",)),
    Variant(
        "lora_mlp", LoRAConfig(r=4, selfattn_lora=False, intermediate_lora=True, output_lora=True)
    ),
    Variant("lora_leave_out", LoRAConfig(r=4, leave_out=[0]), ("llama", "gpt2"), size=1.5),
    Variant("lora_safetensors", LoRAConfig(r=4), ("qwen2", "gpt2"), safetensors=True),
    Variant("lora_bf16", LoRAConfig(r=4), ("llama",), bf16=True, safetensors=True),
    Variant("lora_old_version", LoRAConfig(r=4, alpha=16), ("llama",), version="adapters.1.0.1"),
    Variant("dora", DoRAConfig(r=3, alpha=6), ROTARY, cannot(("gpt2",), RuntimeError)),
    Variant(
        "dora_every_matrix",
        DoRAConfig(r=3, alpha=6, **EVERY_MATRIX),
        ROTARY,
        cannot(("gpt2",), RuntimeError),
    ),
    Variant(
        "vera",
        VeraConfig(r=4, alpha=8, attn_matrices=["q"]),
        ("llama", "qwen2"),
        cannot(("gpt2",), AttributeError),
    ),
    Variant("vera_q_and_v", VeraConfig(r=4), (), cannot(ROTARY, RuntimeError)),
    Variant("vera_kv", VeraConfig(r=3, alpha=6, attn_matrices=["k", "v"]), ROTARY),
    Variant(
        "vera_mlp",
        VeraConfig(r=4, alpha=8, selfattn_lora=False, output_lora=True),
        ("gpt2", "qwen2"),
    ),
    Variant("dvora", DvoRAConfig(r=4, alpha=8, attn_matrices=["q"]), ("llama", "qwen2")),
    Variant(
        "mtl_lora",
        MTLLoRAConfig(r=4, alpha=8, n_up_projection=3),
        ("llama",),
        {**cannot(("gpt2",), RuntimeError), **cannot(HOOKED, ValueError)},
    ),
    Variant(
        "mtl_lora_every_matrix",
        MTLLoRAConfig(r=3, alpha=5, n_up_projection=2, weights_sharpness=0.4, **EVERY_MATRIX),
        ("llama",),
    ),
    Variant(
        "mtl_lora_mlp",
        MTLLoRAConfig(r=3, n_up_projection=1, selfattn_lora=False, output_lora=True),
        ("gpt2",),
    ),
    Variant("ia3", IA3Config()),
    Variant("ia3_alpha", IA3Config(alpha=1.25, output_lora=True)),
    Variant("ia3_q", IA3Config(attn_matrices=["q"], intermediate_lora=False), ("llama", "gpt2")),
)

SUFFIX_LENGTHS = (1, 2, 4, 9, 23)
REFTS = (
    Variant("loreft", LoReftConfig(), ("llama",), size=3, lengths=(1, 2, 9, 23)),
    Variant("loreft_one_layer", LoReftConfig(layers=[0]), size=3, lengths=(1, 2, 9, 23)),
    Variant(
        "loreft_rank_4",
        LoReftConfig(r=4, layers=[0], prefix_positions=5),
        ("llama", "gpt2"),
        size=2,
    ),
    Variant("loreft_decayed", LoReftConfig(r=3, layers=[0]), ("llama",), size=2, decayed=True),
    Variant(
        "loreft_suffix",
        LoReftConfig(r=2, suffix_positions=2, layers=[0]),
        ("llama", "gpt2"),
        size=2,
        lengths=SUFFIX_LENGTHS,
    ),
    Variant("noreft", NoReftConfig(r=2), lengths=(1, 2, 9, 23)),
    Variant("noreft_relu", NoReftConfig(r=4, non_linearity="relu", layers=[0]), ("llama", "qwen3")),
    Variant("noreft_bf16", NoReftConfig(r=3), ("llama",), size=1.5, bf16=True, safetensors=True),
    Variant(
        "noreft_tied",
        NoReftConfig(r=2, suffix_positions=2, tied_weights=True),
        lengths=SUFFIX_LENGTHS,
    ),
    Variant("noreft_suffix", NoReftConfig(r=2, suffix_positions=2), lengths=SUFFIX_LENGTHS),
    Variant(
        "noreft_suffix_only",
        NoReftConfig(r=2, prefix_positions=0, suffix_positions=3),
        ("llama", "gpt2"),
        lengths=SUFFIX_LENGTHS,
    ),
    Variant(
        "noreft_long_suffix",
        NoReftConfig(r=2, prefix_positions=2, suffix_positions=4),
        ("llama",),
        lengths=(1, 2, 3, 4, 5, 23),
    ),
    Variant("direft", DiReftConfig(r=2), lengths=(1, 2, 9, 23), live_differs=True),
)

DEMOS = (
    Variant("seq_bn", SeqBnConfig(reduction_factor=72, leave_out=DEMO_LEAVES_OUT), DEMO, size=0.2),
    Variant(
        "lora_every_matrix",
        LoRAConfig(r=2, alpha=4, leave_out=DEMO_LEAVES_OUT, **EVERY_MATRIX),
        DEMO,
        size=0.3,
    ),
    Variant(
        "prefix_flat",
        PrefixTuningConfig(flat=True, prefix_length=4, leave_out=DEMO_LEAVES_OUT),
        DEMO,
    ),
    Variant(
        "mam",
        MAMConfig(
            PrefixTuningConfig(prefix_length=3, bottleneck_size=4, leave_out=DEMO_LEAVES_OUT),
            ParBnConfig(reduction_factor=144, leave_out=DEMO_LEAVES_OUT),
        ),
        DEMO,
        size=0.2,
    ),
    Variant("ia3", IA3Config(leave_out=DEMO_LEAVES_OUT), DEMO, size=0.3),
    Variant("noreft", NoReftConfig(r=2, layers=DEMO_LAYERS), DEMO, size=0.3, lengths=(2, 9, 23)),
    Variant(
        "direft",
        DiReftConfig(r=2, layers=DEMO_LAYERS),
        DEMO,
        size=0.3,
        lengths=(2, 9, 23),
        live_differs=True,
    ),
    Variant(
        "loreft",  # its orthogonal parametrisation stores hidden x hidden a layer: 1.3 MB
        LoReftConfig(r=2, layers=DEMO_LAYERS[:1], tied_weights=True),
        DEMO,
        lengths=(2, 9, 23),
    ),
    Variant(
        "double_seq_bn",
        DoubleSeqBnConfig(reduction_factor=144, leave_out=DEMO_LEAVES_OUT),
        DEMO,
        size=0.2,
    ),
    Variant("par_bn", ParBnConfig(reduction_factor=144, leave_out=DEMO_LEAVES_OUT), DEMO, size=0.5),
    Variant(
        "scaled_par_bn",
        ParBnConfig(reduction_factor=144, scaling="learned", leave_out=DEMO_LEAVES_OUT),
        DEMO,
        size=0.6,
    ),
    Variant(
        "adapter_plus",
        AdapterPlusConfig(reduction_factor=144, leave_out=DEMO_LEAVES_OUT),
        DEMO,
        size=0.6,
    ),
    Variant(
        "compacter",
        CompacterConfig(reduction_factor=72, leave_out=DEMO_LEAVES_OUT),
        DEMO,
        size=0.8,
    ),
    Variant(
        "compacter_plus_plus",
        CompacterPlusPlusConfig(reduction_factor=72, leave_out=DEMO_LEAVES_OUT),
        DEMO,
        size=0.8,
    ),
    Variant("dora", DoRAConfig(r=2, alpha=4, leave_out=DEMO_LEAVES_OUT), DEMO, size=0.5),
    Variant(
        "vera",
        VeraConfig(r=4, alpha=8, attn_matrices=["v"], leave_out=DEMO_LEAVES_OUT),
        DEMO,
    ),
    Variant(
        "prefix_mlp",
        PrefixTuningConfig(prefix_length=5, bottleneck_size=4, leave_out=DEMO_LEAVES_OUT),
        DEMO,
    ),
)

VARIANTS = BOTTLENECK + INVERTIBLE + PREFIXES + UNIONS + LORAS + REFTS + DEMOS
