"""AdaLoRA computes what PEFT's computes, pruned or not, and names what it cannot."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch

from deltamux.adapters.errors import AdapterCorrupt, AdapterMismatch, AdapterUnsupported
from deltamux.adapters.inspect import describe
from deltamux.adapters.kinds.peft_adalora import KIND

from .. import peft_zoo
from .peft_oracle import assert_equals_peft, edit_config, edit_tensors, quiet, save_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MASK = [True, False, True, True, False, False]


@pytest.fixture
def save(tiny, tmp_path):
    def save(family: str = "llama", **config: object) -> Path:
        fields = {"target_modules": ["q_proj", "v_proj"], "init_r": 6, "total_step": 9, **config}
        with quiet():
            adalora = peft.AdaLoraConfig(task_type="CAUSAL_LM", **fields)
        return save_adapter(tiny(family), tmp_path / "adapter", adalora)

    return save


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"lora_alpha": 12}),
        ("llama", {"lora_alpha": 0}),
        ("qwen2", {"lora_alpha": -3, "target_modules": ["k_proj", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("qwen2", {"modules_to_save": ["norm", "lm_head"]}),
        ("qwen2", {"trainable_token_indices": [7, 2]}),
        ("llama", {"use_rslora": True, "r": 3, "alpha_pattern": {"q_proj": 99}}),
        ("qwen2", {"lora_bias": True}),
        ("llama", {"init_lora_weights": "pissa"}),
    ],
    ids=str,
)
def test_equals_peft(family, config, tiny, save):
    adapter = assert_equals_peft(tiny(family), save(family, **config))
    assert (adapter.kind, adapter.library) == ("adalora", "peft")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruned_by_its_own_training(family, tiny, tmp_path):
    (variant,) = (each for each in peft_zoo.ADALORA if each.name == "adalora-pruned")
    oracle = peft_zoo.PeftOracle(tiny(family).folder)
    with quiet():
        folder = oracle.save(variant, tmp_path / "adapter", seed=5)
    adapter = assert_equals_peft(tiny(family), folder, oracle.load(folder))
    ranks = {primitive.rank for primitive in adapter.primitives}
    assert len(ranks) > 1
    assert max(ranks) < 6


@pytest.mark.parametrize("alpha", [5, 0])
def test_the_scale_of_a_pruned_module(alpha, tiny, save):
    def prune(tensors):
        for name in ("lora_A", "lora_E"):
            tensors[f"{Q0}.{name}"] = tensors[f"{Q0}.{name}"][MASK]
        tensors[f"{Q0}.lora_B"] = tensors[f"{Q0}.lora_B"][:, MASK].contiguous()

    folder = edit_tensors(save(lora_alpha=alpha), prune)
    edit_config(folder, rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": MASK})
    assert_equals_peft(tiny("llama"), folder)


def test_modules_of_rank_0_are_left_out(tiny, save):
    def empty(tensors):
        for name in ("lora_A", "lora_E"):
            tensors[f"{Q0}.{name}"] = tensors[f"{Q0}.{name}"][:0]
        tensors[f"{Q0}.lora_B"] = tensors[f"{Q0}.lora_B"][:, :0].contiguous()

    folder = edit_tensors(save(), empty)
    edit_config(folder, rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [False] * 6})
    adapter = assert_equals_peft(tiny("llama"), folder)
    assert len(adapter.primitives) == 3
    assert describe(folder).num_modules == 3


def test_every_field_of_peft_is_in_one_group():
    fields = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}
    groups = [set(KIND.rules.implemented), set(KIND.rules.harmless), set(KIND.rules.refused)]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a field is in two groups"
    assert fields == set().union(*groups)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"sparkle": 1}, "sparkle"),
        ({"init_r": 5}, "rank 5"),
        ({"init_r": "6"}, "init_r"),
        ({"init_r": 10**9}, "init_r"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {f"{Q0[17:]}.lora_E": MASK}}, "rank 3"),
        ({"rank_pattern": {f"{Q0[17:]}.lora_E": MASK[1:]}}, "truth values"),
        ({"rank_pattern": {f"{Q0[17:]}.lora_E": [1, 1, 1, 1, 1, 1]}}, "truth values"),
        ({"rank_pattern": {f"{Q0[17:]}.lora_E": 6}}, "truth values"),
    ],
    ids=str,
)
def test_fields_that_are_refused(fields, says, save):
    folder = edit_config(save(), **fields)
    with pytest.raises((AdapterCorrupt, AdapterUnsupported), match=says):
        describe(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("lora_E", None, "lora_E"),
        ("lora_A", torch.ones(6), "rank 6"),
        ("lora_A", torch.ones(5, 64), "rank 6"),
        ("lora_B", torch.ones(64, 7), "rank 6"),
        ("lora_E", torch.ones(6), "rank 6"),
        ("lora_E", torch.ones(6, 1, dtype=torch.int32), "int32"),
        ("lora_A.weight", torch.ones(6, 64), "modules_to_save"),
    ],
    ids=str,
)
def test_tensors_that_are_refused(name, tensor, says, save):
    def change(tensors):
        tensors.pop(f"{Q0}.{name}", None)
        if tensor is not None:
            tensors[f"{Q0}.{name}"] = tensor

    folder = edit_tensors(save(), change)
    with pytest.raises((AdapterCorrupt, AdapterUnsupported), match=says):
        describe(folder)


def test_another_base(tiny, save):
    with pytest.raises(AdapterMismatch, match="gpt2"):
        tiny("gpt2").lower(save())
