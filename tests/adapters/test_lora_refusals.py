"""What LoRA code cannot compute exactly is refused, and the message names what it was."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from deltamux.adapters.inspect import describe
from deltamux.adapters.kinds.lora import MAX_RANK, RULES
from deltamux.adapters.lower import lower

from .peft_oracle import ROOM, edit_config, edit_tensors, quiet

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(save_lora) -> Path:
    return save_lora("llama", r=4, target_modules=["q_proj", "v_proj"])


def refusal(folder: Path, layout=None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        describe(folder) if layout is None else lower(folder, layout, torch.float32, ROOM)
    return caught.value


def test_every_field_of_peft_is_in_one_group():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    groups = [set(RULES.implemented), set(RULES.harmless), set(RULES.refused)]
    classified = set().union(*groups)
    assert sum(map(len, groups)) == len(classified), "a field is in two groups"
    assert fields <= classified, f"PEFT has fields nobody has judged: {fields - classified}"
    assert classified - fields == {"merge_weights"}


def test_every_reason_is_given():
    assert all([*RULES.harmless.values(), *RULES.refused.values()])


def test_a_default_config_has_nothing_refused():
    with quiet():
        RULES.check(peft.LoraConfig().to_dict())


@pytest.mark.parametrize("field", sorted(RULES.refused))
@pytest.mark.parametrize("value", [True, ["score"], {"a": 1}, 3], ids=str)
def test_refused_fields_are_named(field, value, folder):
    error = refusal(edit_config(folder, **{field: value}))
    assert isinstance(error, AdapterUnsupported)
    assert field in str(error)


@pytest.mark.parametrize("field", sorted(RULES.refused))
@pytest.mark.parametrize("value", [None, False, [], {}], ids=str)
def test_refused_fields_may_be_off(field, value, folder):
    describe(edit_config(folder, **{field: value}))


def test_an_unknown_field_is_named(folder):
    error = refusal(edit_config(folder, sparkle_factor=0))
    assert isinstance(error, AdapterUnsupported)
    assert "sparkle_factor" in str(error)


def test_an_unknown_field_may_be_null(folder):
    describe(edit_config(folder, sparkle_factor=None))


@pytest.mark.parametrize(
    "init",
    ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "novel", None, 1],
)
def test_initializations_that_change_the_base(init, folder):
    error = refusal(edit_config(folder, init_lora_weights=init))
    assert isinstance(error, AdapterUnsupported)
    assert "init_lora_weights" in str(error)
    assert "path_initial_model_for_weight_conversion" in str(error)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_initializations_that_leave_it_alone(init, folder):
    describe(edit_config(folder, init_lora_weights=init))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
            "trainable_token_indices",
        ),
        ({"target_modules": ["lm_head"], "save_embedding_layers": "auto"}, "base_layer.weight"),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}, "alora_invocation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_features_that_are_not_served(config, named, save_lora):
    error = refusal(save_lora("llama", r=4, **config))
    assert isinstance(error, AdapterUnsupported)
    assert named in str(error)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base(bias, save_lora):
    error = refusal(save_lora("gpt2", r=4, bias=bias, target_modules=["c_attn"]))
    assert isinstance(error, AdapterUnsupported)
    assert "bias='none'" in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("r", 0),
        ("r", -4),
        ("r", "4"),
        ("r", True),
        ("r", None),
        ("r", 5),
        ("r", 10**30),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("lora_bias", True),
        ("lora_bias", "yes"),
        ("rank_pattern", {"q_proj": 2}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": [4]}),
        ("rank_pattern", {"q_proj)": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"[": 4}),
        ("alpha_pattern", {"(a+)+": 4}),
        ("alpha_pattern", {"(a|a)(a|a)(a|a)(a|a)": 4}),
        ("alpha_pattern", {"a?" * 50: 4}),
        ("alpha_pattern", {"x" * 10_000: 4}),
        ("alpha_pattern", {f"q{i}": 4 for i in range(5000)}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_values_are_refused_by_the_field(field, value, folder):
    error = refusal(edit_config(folder, **{field: value}))
    assert isinstance(error, AdapterCorrupt | AdapterUnsupported)
    assert field in str(error) or "rank" in str(error)
    assert len(str(error)) < 1000


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (drop(f"{Q0}.lora_A.weight"), AdapterCorrupt, "lora_A"),
        (drop(f"{Q0}.lora_B.weight"), AdapterCorrupt, "lora_B"),
        (put(f"{Q0}.lora_B.bias", torch.ones(64)), AdapterCorrupt, "lora_bias"),
        (put(f"{Q0}.lora_A.weight", torch.ones(5, 64)), AdapterCorrupt, "rank 4"),
        (put(f"{Q0}.lora_B.weight", torch.ones(64, 5)), AdapterCorrupt, "rank 4"),
        (put(f"{Q0}.lora_A.weight", torch.ones(0, 64)), AdapterCorrupt, "rank 4"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4, 64, 1)), AdapterUnsupported, "not a linear"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4)), AdapterUnsupported, "not a linear"),
        (
            put(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)),
            AdapterUnsupported,
            "int8",
        ),
        (
            put(f"{Q0}.lora_A.weight", torch.ones(4, 64).to(torch.float8_e4m3fn)),
            AdapterUnsupported,
            "float8_e4m3fn",
        ),
        (put(f"{Q0}.lora_magnitude_vector", torch.ones(64)), AdapterUnsupported, "DoRA"),
        (put("base_model.model.lm_head.weight", torch.ones(2)), AdapterUnsupported, "lm_head"),
        (rename(f"{Q0}.lora_A.weight", "q_proj.lora_A.weight"), AdapterUnsupported, "q_proj"),
        (
            rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.weight"),
            AdapterUnsupported,
            "default",
        ),
        (
            rename(f"{Q0}.lora_A.weight", f"base_model.model.{'x.' * 999}lora_A.weight"),
            AdapterUnsupported,
            "x.x.",
        ),
        (lambda tensors: tensors.clear(), AdapterCorrupt, "no LoRA tensor"),
    ],
)
def test_bad_tensors_are_named(change, kind, says, folder):
    error = refusal(edit_tensors(folder, change))
    assert type(error) is kind
    assert says in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite(value, dtype, folder):
    def poison(tensors):
        bad = tensors[f"{Q0}.lora_B.weight"].to(dtype)
        bad[3, 1] = value
        tensors[f"{Q0}.lora_B.weight"] = bad

    error = refusal(edit_tensors(folder, poison))
    assert isinstance(error, AdapterCorrupt)
    assert f"{Q0}.lora_B.weight" in str(error)


def test_an_absurd_rank(save_lora):
    folder = save_lora("llama", r=4, target_modules=["q_proj"], layers_to_transform=[0])
    rank = MAX_RANK + 1
    edit_config(folder, r=rank)
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                f"{Q0}.lora_A.weight": torch.ones(rank, 64),
                f"{Q0}.lora_B.weight": torch.ones(64, rank),
            }
        ),
    )
    error = refusal(folder)
    assert isinstance(error, AdapterUnsupported)
    assert str(rank) in str(error)


def test_a_scale_that_overflows_the_dtype(folder, layouts):
    edit_config(folder, lora_alpha=1e8)
    lower(folder, layouts["llama"], torch.float32, ROOM)
    with pytest.raises(AdapterUnsupported, match=r"overflows in torch\.float16"):
        lower(folder, layouts["llama"], torch.float16, ROOM)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_what_takes_more_than_there_is_room_for(stored, pickled, folder, layouts):
    edit_tensors(folder, lambda t: t.update({name: t[name].to(stored) for name in t}))
    if pickled:
        path = folder / "adapter_model.safetensors"
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
    fits = lower(folder, layouts["llama"], torch.bfloat16, ROOM).num_bytes
    lower(folder, layouts["llama"], torch.bfloat16, fits)
    with pytest.raises(AdapterTooLarge, match="there is room for"):
        lower(folder, layouts["llama"], torch.bfloat16, fits - 2)


def test_another_architecture(folder, layouts):
    error = refusal(folder, layouts["gpt2"])
    assert isinstance(error, AdapterMismatch)
    assert "q_proj" in str(error)
    assert "gpt2" in str(error)


def test_a_base_of_another_width(folder, layouts):
    def widen(tensors):
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensors[name] = torch.ones(tensor.shape[0], 128)

    error = refusal(edit_tensors(folder, widen), layouts["llama"])
    assert isinstance(error, AdapterMismatch)
    assert "128" in str(error)
    assert "hidden size 64" in str(error)


def test_a_base_with_fewer_layers(folder, layouts):
    deeper = Q0.replace("layers.0", "layers.31")

    def deepen(tensors):
        for name in list(tensors):
            tensors[name.replace(Q0, deeper)] = tensors.pop(name)

    error = refusal(edit_tensors(folder, deepen), layouts["llama"])
    assert isinstance(error, AdapterMismatch)
    assert "at least 32 layers" in str(error)
    assert "has 2 layers" in str(error)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": "lora"}, "'lora'"),
        ({"peft_type": None}, "None"),
        ({"peft_type": ["LORA"]}, "LORA"),
    ],
)
def test_kinds_that_are_not_served(config, says, folder):
    error = refusal(edit_config(folder, **config))
    assert isinstance(error, AdapterUnsupported)
    assert says in str(error)
    assert "peft lora" in str(error)


def test_adapterhub_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"config": {"architecture": "lora"}, "hidden_size": 64, "version": "adapters.1.3.0"}'
    )
    error = refusal(tmp_path)
    assert isinstance(error, AdapterUnsupported)
    assert "AdapterHub" in str(error)


def test_a_config_of_nothing_known(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "peft_type" in str(refusal(tmp_path))
