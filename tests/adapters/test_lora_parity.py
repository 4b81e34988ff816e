"""Every variant of LoRA that is served computes what PEFT computes, module by module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.adapters.inspect import describe
from deltamux.adapters.lower import lower
from deltamux.adapters.primitives import LowRank, OutputBias

from .peft_oracle import (
    ROOM,
    edit_config,
    edit_tensors,
    inputs_for,
    our_deltas,
    peft_deltas,
    reload,
)

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rank 1": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": LLAMA_ALL}),
    "rank above the width": ("llama", {"r": 256, "lora_alpha": 16, "target_modules": ["k_proj"]}),
    "odd rank, float alpha": ("qwen2", {"r": 3, "lora_alpha": 2.5, "target_modules": ["o_proj"]}),
    "dropout": ("llama", {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]}),
    "rsLoRA": ("llama", {"r": 8, "use_rslora": True, "target_modules": ["down_proj", "k_proj"]}),
    "all-linear": ("qwen2", {"r": 2, "target_modules": "all-linear"}),
    "all-linear without some": (
        "qwen2",
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "regex": (
        "llama",
        {"r": 5, "target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
    ),
    "layers_to_transform": (
        "llama",
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    ),
    "layers_pattern": (
        "gpt2",
        {
            "r": 4,
            "target_modules": ["c_attn"],
            "layers_to_transform": 0,
            "layers_pattern": "h",
        },
    ),
    "lora_bias": (
        "qwen2",
        {"r": 4, "lora_alpha": 12, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    ),
    "lora_bias with rsLoRA": (
        "gpt2",
        {"r": 4, "lora_bias": True, "use_rslora": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": LLAMA_ALL,
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"v_proj": 31, "model.layers.0.self_attn.o_proj": 5},
        },
    ),
    "patterns with rsLoRA": (
        "llama",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "GPT-2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "GPT-2, flag set": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "untied head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "tied head": ("qwen2", {"r": 4, "target_modules": ["lm_head"]}),
    "bias of a base without any": ("llama", {"r": 4, "bias": "all", "target_modules": ["q_proj"]}),
    "gaussian": ("llama", {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]}),
    "orthogonal": (
        "llama",
        {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
    ),
    "no initialization": (
        "llama",
        {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]},
    ),
    "mica": ("llama", {"r": 4, "init_lora_weights": "mica", "target_modules": ["q_proj"]}),
}


def assert_equals_peft(family, folder, bases, layouts):
    adapter = lower(folder, layouts[family], torch.float32, ROOM)
    expected = peft_deltas(reload(bases[family], folder), inputs_for)
    actual = our_deltas(adapter, inputs_for)
    assert actual.keys() == expected.keys()
    for path, delta in expected.items():
        assert delta.abs().max() > 1e-3, path
        torch.testing.assert_close(actual[path], delta, atol=1e-5, rtol=0)
    return adapter


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_peft(variant, save_lora, bases, layouts):
    family, config = VARIANTS[variant]
    folder = save_lora(family, **config)
    adapter = assert_equals_peft(family, folder, bases, layouts)
    assert (adapter.kind, adapter.library) == ("lora", "peft")
    ranks = [p.rank for p in adapter.primitives if isinstance(p, LowRank)]
    assert adapter.rank == max(ranks)


PATTERNS = {
    "the first of two that match": {".*_proj": 2, "q_proj": 16},
    "the other way round": {"q_proj": 16, ".*_proj": 2},
    "a dot is any character": {"self_attn.q.proj": 16},
    "not inside a name": {"proj": 16, "_proj": 16, "self_attn": 16},
    "alternation": {"q_proj|v_proj": 16},
    "alternation at the start": {"layers.0.self_attn.q_proj|k_proj": 16},
    "one layer, not its namesakes": {"1.self_attn.q_proj": 16},
    "anchored": {"^model.layers.0.self_attn.q_proj": 16},
    "anchored in the middle matches nothing": {"^q_proj": 16},
    "class": {"[qk]_proj": 16},
    "empty": {"": 16},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_tricky_alpha_patterns(name, save_lora, bases, layouts):
    folder = save_lora("llama", r=4, target_modules=LLAMA_ALL)
    edit_config(folder, alpha_pattern=PATTERNS[name])
    assert_equals_peft("llama", folder, bases, layouts)


def test_a_pattern_that_is_null_is_none(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, target_modules=["q_proj"])
    edit_config(folder, alpha_pattern=None, rank_pattern=None)
    adapter = lower(folder, layouts["llama"], torch.float32, ROOM)
    assert adapter.rank == 4


def test_config_of_an_old_peft(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    old = {
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))
    assert_equals_peft("llama", folder, bases, layouts)


def test_adapter_of_another_name_lives_in_its_own_folder(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, adapter_name="tone", target_modules=["q_proj"])
    assert folder.name == "tone"
    assert_equals_peft("llama", folder, bases, layouts)


def test_saved_in_bfloat16(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, dtype=torch.bfloat16, target_modules=["q_proj"])
    assert_equals_peft("llama", folder, bases, layouts)


def test_saved_as_pickle(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, target_modules=["q_proj", "down_proj"])
    as_pickle(folder)
    assert_equals_peft("llama", folder, bases, layouts)


def test_saved_as_pickle_of_parameters(save_lora, bases, layouts):
    folder = save_lora("llama", r=4, target_modules=["q_proj"])
    as_pickle(folder, wrap=torch.nn.Parameter)
    assert_equals_peft("llama", folder, bases, layouts)


def as_pickle(folder: Path, wrap=lambda tensor: tensor) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: wrap(tensor) for name, tensor in load_file(path).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    path.unlink()


def test_the_scale_is_folded_in_before_the_one_cast(save_lora, layouts):
    folder = save_lora("llama", r=3, lora_alpha=5, lora_bias=True, target_modules=["q_proj"])
    exact = lower(folder, layouts["llama"], torch.float32, ROOM)
    cast = lower(folder, layouts["llama"], torch.bfloat16, ROOM)
    for high, low in zip(exact.primitives, cast.primitives, strict=True):
        for wide, narrow in zip(high.tensors, low.tensors, strict=True):
            assert narrow.is_contiguous()
            assert torch.equal(wide.to(torch.bfloat16), narrow)
    assert exact.digest == cast.digest
    assert exact.num_bytes == 2 * cast.num_bytes


def test_primitives_come_in_the_order_of_the_targets(save_lora, layouts):
    folder = save_lora("llama", r=4, target_modules=LLAMA_ALL)
    adapter = lower(folder, layouts["llama"], torch.float32, ROOM)
    indices = [primitive.target.index for primitive in adapter.primitives]
    assert indices == sorted(indices)


def test_the_digest_is_of_both_files(save_lora, layouts):
    digests = set()
    folder = save_lora("llama", r=4, target_modules=["q_proj"])
    digests.add(lower(folder, layouts["llama"], torch.float32, ROOM).digest)
    edit_config(folder, lora_alpha=9)
    digests.add(lower(folder, layouts["llama"], torch.float32, ROOM).digest)
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).add_(1))
    digests.add(lower(folder, layouts["llama"], torch.float32, ROOM).digest)
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_describe_needs_no_base(save_lora, layouts):
    folder = save_lora(
        "qwen2",
        r=4,
        lora_bias=True,
        rank_pattern={"k_proj": 2},
        target_modules=["q_proj", "k_proj"],
    )
    told, adapter = describe(folder), lower(folder, layouts["qwen2"], torch.bfloat16, ROOM)
    assert (told.kind, told.library, told.digest) == ("lora", "peft", adapter.digest)
    assert told.ranks == (2, 4)
    assert told.target_modules == ("k_proj", "q_proj")
    assert told.num_modules == 4
    assert told.num_parameters == adapter.num_elements
    assert told.num_bytes_bfloat16 == adapter.num_bytes
    counts = {cls.__name__: 0 for cls in (LowRank, OutputBias)}
    for primitive in adapter.primitives:
        counts[type(primitive).__name__] += 1
    assert told.primitives == counts
