"""Prompts, scales, norms and token rows of PEFT that are refused, and what is said of them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig
from torch import Tensor

from deltamux.adapters.errors import AdapterCorrupt, AdapterMismatch, AdapterUnsupported
from deltamux.adapters.lower import all_kinds

from .peft_oracle import TinyBase, edit_config, edit_tensors, save_adapter

Tiny = Callable[[str], TinyBase]
Change = Callable[[dict[str, Tensor]], object]

K_PROJ = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
NORM = "base_model.model.model.norm.ln_tuning_layers.weight"
ROWS = "base_model.model.model.embed_tokens.trainable_tokens_delta"
GATE = "base_model.model.model.layers.1.self_attn.adaption_gate"
HUGE, LONG = 1 << 70, "x" * 10_000

CONFIGS: dict[str, PeftConfig] = {
    "ia3": peft.IA3Config(),
    "ln_tuning": peft.LNTuningConfig(),
    "trainable_tokens": peft.TrainableTokensConfig(token_indices=[9, 3]),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "cpt": peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6]),
    "multitask_prompt_tuning": peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, num_ranks=2
    ),
    "adaption_prompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
}
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "multitask_prompt_tuning")


def save(base: TinyBase, folder: Path, kind: str) -> Path:
    config = copy.deepcopy(CONFIGS[kind])
    config.task_type = "CAUSAL_LM"
    save_adapter(base, folder, config)
    if kind == "multitask_prompt_tuning":
        (folder / "deltamux.json").write_text('{"task_id": 1}')
    return folder


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def add(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_peft_s_configuration_is_accounted_for(
    tiny: Tiny, tmp_path: Path, kind: str
):
    """With the values that PEFT itself writes, all of them are served."""
    base = tiny("llama")
    folder = save(base, tmp_path, kind)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (served,) = (each for each in all_kinds() if (each.library, each.name) == ("peft", kind))
    known = served.rules.implemented | served.rules.harmless.keys() | served.rules.refused.keys()
    assert saved.keys() <= known
    lowered = base.lower(folder)
    assert lowered.kind == kind
    assert {type(each).__name__ for each in lowered.primitives} <= set(served.page.primitives)
    with pytest.raises(AdapterUnsupported, match="'new_field' is not known"):
        base.lower(edit_config(folder, new_field=1))


BAD_FIELDS: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("ia3", {"bias": "all_of_them"}, AdapterUnsupported, "'bias'"),
    ("trainable_tokens", {"token_indices": None}, AdapterCorrupt, "'token_indices' is None"),
    ("trainable_tokens", {"token_indices": []}, AdapterCorrupt, "not a list of token ids"),
    ("trainable_tokens", {"token_indices": [1, True]}, AdapterCorrupt, "not a list of token ids"),
    ("trainable_tokens", {"token_indices": [1, 2.0]}, AdapterCorrupt, "not a list of token ids"),
    ("trainable_tokens", {"token_indices": [4, 4]}, AdapterCorrupt, "a token twice"),
    ("trainable_tokens", {"token_indices": [4]}, AdapterCorrupt, r"\[2, 64\]"),
    ("trainable_tokens", {"token_indices": [4, 300]}, AdapterMismatch, "none for token 300"),
    ("trainable_tokens", {"token_indices": [4, -1]}, AdapterMismatch, "none for token -1"),
    ("trainable_tokens", {"token_indices": [4, HUGE]}, AdapterMismatch, "none for token 11805"),
    *(
        (kind, {"num_virtual_tokens": value}, AdapterCorrupt, "num_virtual_tokens")
        for kind in PROMPTS
        for value in (None, 0, -3, True, 3.0, "3", LONG)
    ),
    *(
        (kind, {"num_virtual_tokens": value}, AdapterCorrupt, r"prompt_embeddings of \[3, ")
        for kind in PROMPTS
        for value in (4, HUGE)
    ),
    *(
        (kind, {"num_transformer_submodules": 2}, AdapterUnsupported, "encoder and decoder")
        for kind in PROMPTS
    ),
    ("prompt_tuning", {"num_transformer_submodules": 0}, AdapterCorrupt, "submodules"),
    ("prompt_tuning", {"token_dim": 63}, AdapterCorrupt, "'token_dim' is 63"),
    ("p_tuning", {"token_dim": "64"}, AdapterCorrupt, "'token_dim' is '64'"),
    ("cpt", {"cpt_token_ids": [4, 5]}, AdapterCorrupt, "'cpt_token_ids' is not a list of 3"),
    ("cpt", {"cpt_mask": 3}, AdapterCorrupt, "'cpt_mask' is not a list of 3"),
    ("multitask_prompt_tuning", {"num_tasks": 3}, AdapterCorrupt, "prefix_task_cols"),
    ("multitask_prompt_tuning", {"num_ranks": 1}, AdapterCorrupt, "prefix_task_cols"),
    ("multitask_prompt_tuning", {"num_ranks": HUGE}, AdapterUnsupported, "more than 4096"),
    ("multitask_prompt_tuning", {"num_ranks": False}, AdapterCorrupt, "'num_ranks' is False"),
    ("prefix_tuning", {"num_layers": None}, AdapterCorrupt, "'num_layers' is None"),
    ("prefix_tuning", {"num_layers": 3}, AdapterCorrupt, "take 192 a row"),
    ("prefix_tuning", {"num_layers": HUGE}, AdapterCorrupt, "a row"),
    ("prefix_tuning", {"token_dim": 33}, AdapterCorrupt, "no multiple"),
    ("prefix_tuning", {"num_attention_heads": 0}, AdapterCorrupt, "'num_attention_heads' is 0"),
    ("prefix_tuning", {"num_attention_heads": 4}, AdapterMismatch, "4 key heads of 8, and this"),
    ("prefix_tuning", {"num_layers": 1, "token_dim": 64}, AdapterMismatch, "for 1 layers"),
    ("adaption_prompt", {"adapter_len": 4}, AdapterCorrupt, r"adaption_prompt of \[1, 3, 64\]"),
    ("adaption_prompt", {"adapter_len": HUGE}, AdapterCorrupt, "adaption_prompt of"),
    ("adaption_prompt", {"adapter_len": None}, AdapterCorrupt, "'adapter_len' is None"),
    ("adaption_prompt", {"adapter_layers": 2}, AdapterCorrupt, "'adapter_layers' is 2"),
    ("adaption_prompt", {"adapter_layers": -1}, AdapterCorrupt, "'adapter_layers' is -1"),
]


@pytest.mark.parametrize(("kind", "fields", "error", "message"), BAD_FIELDS)
def test_bad_fields(
    tiny: Tiny,
    tmp_path: Path,
    kind: str,
    fields: dict[str, object],
    error: type[Exception],
    message: str,
):
    folder = edit_config(save(tiny("llama"), tmp_path, kind), **fields)
    with pytest.raises(error, match=message) as caught:
        tiny("llama").lower(folder)
    assert len(str(caught.value)) < 1000


BAD_TENSORS: list[tuple[str, Change, type[Exception], str]] = [
    ("ia3", lambda t: t.clear(), AdapterCorrupt, "no tensor at all"),
    ("ia3", put(K_PROJ, lambda t: t[:, 0]), AdapterCorrupt, r"ia3_l of \[32\]"),
    ("ia3", put(K_PROJ, lambda t: t[:1]), AdapterCorrupt, r"ia3_l of \[1, 1\]"),
    ("ia3", put(K_PROJ, lambda t: t[:0]), AdapterCorrupt, r"ia3_l of \[0, 1\]"),
    ("ia3", put(K_PROJ, lambda t: t[:31]), AdapterMismatch, "gives 31 features there, 32 here"),
    ("ia3", put(K_PROJ, lambda t: t.T), AdapterCorrupt, "ia3_l of its input, and"),
    ("ia3", put(K_PROJ, lambda t: t.to(torch.int64)), AdapterUnsupported, "not a float"),
    (
        "ia3",
        add("base_model.model.model.layers.9.mlp.up_proj.ia3_l", 96, 1),
        AdapterMismatch,
        "layers.9",
    ),
    ("ia3", add("base_model.model.model.norm.weight", 64), AdapterUnsupported, "modules_to_save"),
    ("ia3", add("other", 1), AdapterUnsupported, "'other' is not served"),
    ("ln_tuning", put(NORM, lambda t: t[:-1]), AdapterMismatch, r"norm.weight is \[63\]"),
    (
        "ln_tuning",
        add("base_model.model.model.layers.7.input_layernorm.ln_tuning_layers.weight", 64),
        AdapterMismatch,
        "layers.7",
    ),
    (
        "ln_tuning",
        lambda t: t.update({NORM.replace("weight", "bias"): t.pop(NORM)}),
        AdapterCorrupt,
        "has no ln_tuning_layers.weight",
    ),
    ("ln_tuning", add("base_model.model.model.norm.weight", 64), AdapterUnsupported, "norm.weight"),
    (
        "trainable_tokens",
        put(ROWS, lambda t: t[:, :-1]),
        AdapterMismatch,
        r"\[63\] there, \[64\] here",
    ),
    (
        "trainable_tokens",
        lambda t: t.update({ROWS.replace("embed_tokens", "norm"): t.pop(ROWS)}),
        AdapterMismatch,
        "'model.norm' is not an embedding",
    ),
    *(
        (
            kind,
            lambda t: t.pop("prompt_embeddings"),
            AdapterCorrupt,
            "no tensor 'prompt_embeddings'",
        )
        for kind in PROMPTS
    ),
    *(
        (kind, put("prompt_embeddings", lambda t: t[0]), AdapterCorrupt, "prompt_embeddings of")
        for kind in PROMPTS
    ),
    *(
        (kind, add("base_model.lm_head.weight", 300, 64), AdapterUnsupported, "lm_head.weight")
        for kind in PROMPTS
    ),
    (
        "prompt_tuning",
        put("prompt_embeddings", lambda t: t.to(torch.int32)),
        AdapterUnsupported,
        "not a float",
    ),
    (
        "prefix_tuning",
        put("prompt_embeddings", lambda t: t[:, :-1]),
        AdapterCorrupt,
        "take 128 a row",
    ),
    (
        "multitask_prompt_tuning",
        lambda t: t.pop("prefix_task_rows"),
        AdapterCorrupt,
        "no tensor 'prefix_task_rows'",
    ),
    (
        "multitask_prompt_tuning",
        put("prefix_task_rows", lambda t: t[..., :-1]),
        AdapterCorrupt,
        r"prefix_task_rows of \[2, 2, 63\]",
    ),
    ("adaption_prompt", lambda t: t.pop(GATE), AdapterCorrupt, "has no adaption_gate"),
    ("adaption_prompt", put(GATE, lambda t: t.repeat(2)), AdapterCorrupt, r"gate of \[2\]"),
]


@pytest.mark.parametrize(("kind", "change", "error", "message"), BAD_TENSORS)
def test_bad_tensors(
    tiny: Tiny,
    tmp_path: Path,
    kind: str,
    change: Change,
    error: type[Exception],
    message: str,
):
    folder = edit_tensors(save(tiny("llama"), tmp_path, kind), change)
    with pytest.raises(error, match=message):
        tiny("llama").lower(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_base(tiny: Tiny, tmp_path: Path, kind: str):
    """A GPT-2 has no module of the same name, and its prefixes have other heads."""
    folder = save(tiny("llama"), tmp_path, kind)
    if kind in ("prompt_tuning", "p_tuning", "cpt", "multitask_prompt_tuning"):
        name = "prompt_embeddings"
        edit_tensors(folder, put(name, lambda t: torch.cat([t, t[:, :1]], dim=1)))
        if kind == "multitask_prompt_tuning":
            edit_tensors(folder, put("prefix_task_rows", lambda t: t.repeat(1, 1, 2)[..., :65]))
        edit_config(folder, token_dim=65)
    with pytest.raises(AdapterMismatch, match="another base"):
        tiny("gpt2").lower(folder)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "adaption_prompt"])
def test_prompts_as_long_as_the_base_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
):
    base = TinyBase.load(tiny_model("llama", max_position_embeddings=3))
    with pytest.raises(AdapterUnsupported, match="takes 3 positions, and the base has 3"):
        base.lower(save(base, tmp_path, kind))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, AdapterUnsupported, "say which one to serve"),
        ({"task_id": 2}, AdapterCorrupt, "'task_id' is 2"),
        ({"task_id": -1}, AdapterCorrupt, "'task_id' is -1"),
        ({"task_id": True}, AdapterCorrupt, "'task_id' is True"),
        ({"task_id": "0"}, AdapterCorrupt, "'task_id' is '0'"),
        ({"task_id": None}, AdapterCorrupt, "'task_id' is None"),
        ({"task": 0}, AdapterUnsupported, "the option 'task'"),
    ],
)
def test_the_task_must_be_one(
    tiny: Tiny, tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
):
    folder = save(tiny("llama"), tmp_path, "multitask_prompt_tuning")
    (folder / "deltamux.json").write_text(json.dumps(options))
    with pytest.raises(error, match=message):
        tiny("llama").lower(folder)


@pytest.mark.parametrize("module", ["layers.0.mlp", "embed_tokens", "layers.1.input_layernorm"])
def test_a_prompt_that_runs_through_replaced_modules_is_refused(
    tiny: Tiny, tmp_path: Path, module: str
):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=[module]
    )
    save_adapter(tiny("llama"), tmp_path, config)
    with pytest.raises(AdapterUnsupported, match="only the last norm and the head"):
        tiny("llama").lower(tmp_path)


def test_two_sets_of_rows_for_one_weight_contradict_each_other(tiny: Tiny, tmp_path: Path):
    folder = save(tiny("qwen2"), tmp_path, "trainable_tokens")
    edit_tensors(folder, put("base_model.model.lm_head.trainable_tokens_delta", lambda t: t + 1))
    with pytest.raises(AdapterCorrupt, match="two different sets of rows"):
        tiny("qwen2").lower(folder)


def test_a_layer_norm_without_its_bias_is_incomplete(tiny: Tiny, tmp_path: Path):
    folder = save(tiny("gpt2"), tmp_path, "ln_tuning")
    name = "base_model.model.transformer.ln_f.ln_tuning_layers.bias"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(AdapterCorrupt, match=r"'transformer\.ln_f' has no bias"):
        tiny("gpt2").lower(folder)


def test_scaling_a_replaced_module_is_refused(tiny: Tiny, tmp_path: Path):
    folder = save(tiny("llama"), tmp_path, "ia3")
    name = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    edit_tensors(edit_config(folder, modules_to_save=["k_proj"]), add(name, 32, 64))
    with pytest.raises(AdapterUnsupported, match="k_proj' is not the base's"):
        tiny("llama").lower(folder)


def test_adaption_prompts_are_for_the_families_of_peft(tiny: Tiny, tmp_path: Path):
    folder = save(tiny("llama"), tmp_path, "adaption_prompt")
    with pytest.raises(AdapterUnsupported, match="llama, mistral, gpt2, and this base is qwen2"):
        tiny("qwen2").lower(folder)
