"""Every field of every configuration is implemented, harmless or refused, and harmless ones are."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from deltamux.adapters.checkpoint import open_checkpoint
from deltamux.adapters.errors import AdapterUnsupported
from deltamux.adapters.folder import open_config
from deltamux.adapters.formats import adapterhub_bottleneck, adapterhub_lora
from deltamux.adapters.formats.config_fields import FieldRules
from deltamux.adapters.formats.linear_adapter import PeftKind
from deltamux.adapters.formats.lora_config import LoraScalars
from deltamux.adapters.kinds import adapterhub_mtl_lora, adapterhub_prefix_tuning, adapterhub_reft
from deltamux.adapters.lower import all_kinds, find_kind
from deltamux.server.model.base import ServedBase, load_base

from ..peft_zoo import VARIANTS, PeftOracle
from .fingerprint import fingerprint
from .peft_oracle import edit_config, quiet

KINDS = {kind.name: kind for kind in all_kinds() if isinstance(kind, PeftKind)}
CLASSES: Mapping[str, type[PeftConfig]] = {
    kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
OF_TODAY = sorted(KINDS.keys() & CLASSES.keys())
NEEDED: Mapping[str, dict[str, Any]] = {
    "adalora": {"total_step": 10},
    "adaption_prompt": {"target_modules": "self_attn"},
    "cpt": {"task_type": "CAUSAL_LM"},
}
"""Without these fields the class itself refuses."""

NESTED = {
    "use_bdlora": BdLoraConfig(),
    "kasa_config": KasaConfig(),
    "velora_config": VeloraConfig(),
    "monteclora_config": MontecloraConfig(),
}

BOTTLENECK_FIELDS = """
    mh_adapter output_adapter reduction_factor non_linearity original_ln_before original_ln_after
    ln_before ln_after init_weights init_weights_seed is_parallel scaling use_gating
    residual_before_ln adapter_residual_before_ln inv_adapter inv_adapter_reduction_factor
    cross_adapter leave_out dropout phm_layer phm_dim factorized_phm_W shared_W_phm shared_phm_rule
    factorized_phm_rule phm_c_init phm_init_range learn_phm hypercomplex_nonlinearity phm_rank
    phm_bias stochastic_depth
"""
LORA_FIELDS = """
    architecture selfattn_lora intermediate_lora output_lora leave_out r alpha dropout attn_matrices
    composition_mode init_weights init_weights_seed use_gating use_dora vera_d vera_b dtype
"""
ADAPTERHUB: Mapping[str, tuple[FieldRules, str]] = {
    "BnConfig": (adapterhub_bottleneck.RULES, BOTTLENECK_FIELDS),
    "LoRAConfig": (adapterhub_lora.RULES, LORA_FIELDS),
    "MTLLoRAConfig": (
        adapterhub_mtl_lora.MTL_RULES,
        f"{LORA_FIELDS} n_up_projection task_specific_matrix_type weights_sharpness",
    ),
    "PrefixTuningConfig": (
        adapterhub_prefix_tuning.RULES,
        """architecture encoder_prefix cross_prefix leave_out flat prefix_length bottleneck_size
        non_linearity dropout use_gating shared_gating init_weights_seed""",
    ),
    "ReftConfig": (
        adapterhub_reft.RULES,
        """layers prefix_positions suffix_positions r orthogonality tied_weights dropout
        non_linearity dtype architecture output_reft init_weights_seed""",
    ),
}
"""The dataclasses' fields in ``adapters`` 1.3.0, which the tests' environment cannot hold."""


def known(rules: FieldRules) -> set[str]:
    return {*rules.implemented, *rules.harmless, *rules.refused}


def require_disjoint(rules: FieldRules) -> None:
    assert len(known(rules)) == sum(map(len, (rules.implemented, rules.harmless, rules.refused)))


@pytest.mark.parametrize("name", OF_TODAY)
def test_every_field_of_pefts_class_is_in_one_group(name: str) -> None:
    rules, names = KINDS[name].rules, {each.name for each in fields(CLASSES[name])}
    assert names <= known(rules)
    assert {each.name for each in fields(PeftConfig)} <= known(rules)
    require_disjoint(rules)
    assert rules.implemented | rules.refused.keys() <= names, "a field that PEFT never had"


def test_bone_alone_has_no_class_any_more() -> None:
    assert KINDS.keys() - CLASSES.keys() == {"bone"}
    require_disjoint(KINDS["bone"].rules)


@pytest.mark.parametrize("name", OF_TODAY)
def test_a_fresh_configuration_of_peft_has_no_unknown_field(name: str) -> None:
    config = CLASSES[name](**NEEDED.get(name, {}))
    fresh = json.loads(json.dumps(config.to_dict(), default=sorted))
    assert len(fresh) >= 10
    KINDS[name].rules.check(fresh)


@pytest.mark.parametrize("name", NESTED)
def test_fields_of_loras_nested_configurations(name: str) -> None:
    nested = asdict(NESTED[name])
    LoraScalars.read({name: nested}, 1)
    with pytest.raises(AdapterUnsupported, match="'sparkle' is not known"):
        LoraScalars.read({name: {**nested, "sparkle": 1}}, 1)


@pytest.mark.parametrize("name", ADAPTERHUB)
def test_every_field_of_adapterhubs_class_is_in_one_group(name: str) -> None:
    rules, names = ADAPTERHUB[name]
    assert set(names.split()) <= known(rules)
    require_disjoint(rules)


Changed = tuple[str, str, str, object]
"""Variant, family, field, its new value."""

# Fields that sound as if they mattered, and change nothing once an adapter is trained.
CHANGED: tuple[Changed, ...] = (
    ("lora", "llama", "fan_in_fan_out", True),
    ("lora", "gpt2", "fan_in_fan_out", False),
    ("lora", "gpt2", "fan_in_fan_out", True),
    ("lora", "llama", "lora_dropout", 0.9),
    ("lora", "llama", "inference_mode", False),
    ("lora", "llama", "init_lora_weights", False),
    ("lora", "llama", "init_lora_weights", "orthogonal"),
    ("lora", "llama", "init_lora_weights", "mica"),
    ("lora", "llama", "task_type", "SEQ_2_SEQ_LM"),
    ("lora", "llama", "revision", "main"),
    ("lora", "llama", "eva_config", {"rho": 3.0}),
    ("lora", "llama", "corda_config", {}),
    ("lora", "llama", "loftq_config", {"loftq_bits": 2}),
    ("lora", "llama", "qalora_group_size", 3),
    ("lora", "llama", "velora_config", {"num_groups": 8, "scale": 5.0}),
    ("lora", "llama", "monteclora_config", {"num_samples": 2, "sample_scaler": 9.0}),
    ("lora", "llama", "megatron_core", "somewhere"),
    ("lora-layers-pattern", "llama", "layers_pattern", None),
    ("lora-exclude", "llama", "exclude_modules", None),
    ("lora-save-tied", "qwen2", "ensure_weight_tying", False),
    ("lora-bias-only", "qwen2", "bias", "all"),
    ("adalora", "llama", "r", 99),
    ("adalora", "llama", "use_rslora", True),
    ("adalora", "llama", "alpha_pattern", {"q_proj": 99}),
    ("adalora", "llama", "lora_bias", True),
    ("adalora", "llama", "init_lora_weights", False),
    ("adalora", "llama", "target_r", 1),
    ("loha", "llama", "init_weights", False),
    ("loha", "llama", "rank_dropout", 0.9),
    ("loha", "llama", "module_dropout", 0.9),
    ("loha", "llama", "use_effective_conv2d", True),
    ("lokr", "llama", "rank_dropout_scale", True),
    ("vera", "llama", "d_initial", 9.0),
    ("vera", "llama", "projection_prng_key", 9),
    ("vera", "llama", "vera_dropout", 0.9),
    ("vblora", "llama", "init_logits_std", 9.0),
    ("vblora", "llama", "init_vector_bank_bound", 9.0),
    ("randlora", "llama", "projection_prng_key", 9),
    ("randlora", "llama", "sparse", True),
    ("randlora", "llama", "very_sparse", True),
    ("fourierft", "llama", "init_weights", False),
    ("oft", "llama", "init_weights", False),
    ("oft", "llama", "module_dropout", 0.9),
    ("oft", "llama", "eps", 0.5),
    ("oft-solve", "llama", "num_cayley_neumann_terms", 2),
    ("boft", "llama", "boft_dropout", 0.9),
    ("boft", "llama", "init_weights", False),
    ("hra", "llama", "init_weights", False),
    ("shira", "llama", "random_seed", 9),
    ("shira", "llama", "init_weights", False),
    ("miss", "llama", "miss_dropout", 0.9),
    ("miss", "llama", "mini_r", 5),
    ("c3a", "llama", "init_weights", False),
    ("poly-task-0", "llama", "init_weights", False),
    ("ia3", "llama", "fan_in_fan_out", True),
    ("ia3", "llama", "init_ia3_weights", False),
    ("trainable-tokens", "llama", "init_weights", False),
    ("prompt-tuning", "llama", "num_layers", 9),
    ("prompt-tuning", "llama", "num_attention_heads", 9),
    ("prompt-tuning", "llama", "prompt_tuning_init", "SAMPLE_VOCAB"),
    ("p-tuning-mlp", "llama", "encoder_reparameterization_type", "LSTM"),
    ("p-tuning-mlp", "llama", "encoder_hidden_size", 7),
    ("p-tuning-mlp", "llama", "encoder_num_layers", 3),
    ("prefix-tuning", "llama", "prefix_projection", True),
    ("prefix-tuning", "llama", "encoder_hidden_size", 7),
    ("multitask-task-1", "llama", "prompt_tuning_init_task", 1),
    ("cpt", "llama", "opt_projection_epsilon", 9.0),
    ("cpt", "llama", "opt_loss_decay_factor", 9.0),
)


@pytest.fixture(scope="module")
def saved(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[PeftOracle, ServedBase, Path]]:
    """The library, the base, and a folder for each variant and family, made once."""
    root = tmp_path_factory.mktemp("zoo")

    @cache
    def bases(family: str) -> tuple[PeftOracle, ServedBase]:
        return PeftOracle(tiny_model(family)), load_base(tiny_model(family), torch.float32)

    @cache
    def get(name: str, family: str) -> tuple[PeftOracle, ServedBase, Path]:
        variant = next(each for each in VARIANTS if each.name == name)
        oracle, base = bases(family)
        return oracle, base, oracle.save(variant, root / family / name, 1)

    return get


@pytest.mark.parametrize(
    ("name", "family", "field", "value"), CHANGED, ids=lambda value: str(value)[:24]
)
def test_what_peft_does_not_read_does_not_change_what_is_served(
    name: str, family: str, field: str, value: object, saved: Callable[[str, str], Any]
) -> None:
    oracle, base, folder = saved(name, family)
    before = json.loads((folder / "adapter_config.json").read_text())
    assert before[field] != value or (name, family) == ("lora", "gpt2")
    prompt = [5, 120, 17, 3, 250, 9, 64, 99]
    computed, ours = oracle.prompt_logprobs(prompt, folder), fingerprint(lowered(folder, base))
    try:
        edit_config(folder, **{field: value})
        with quiet():  # of fields that it ignores
            assert torch.equal(oracle.prompt_logprobs(prompt, folder), computed)
        assert fingerprint(lowered(folder, base)) == ours
    finally:
        edit_config(folder, **before)


def lowered(folder: Path, base: ServedBase) -> Any:
    config = open_config(folder)
    return find_kind(config).parse(open_checkpoint(config)).lower(base)
