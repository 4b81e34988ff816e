"""What LoRA code cannot compute exactly is refused, and the message names what it was."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file

from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from deltamux.adapters.formats.linear_adapter import MAX_RANK
from deltamux.adapters.formats.lora_config import MAX_INVOCATION_TOKENS, RULES
from deltamux.adapters.inspect import describe
from deltamux.adapters.lower import lower

from .peft_oracle import ROOM, TinyBase, edit_config, edit_tensors, quiet

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"


@pytest.fixture
def folder(save_lora) -> Path:
    return save_lora("llama", r=4, target_modules=["q_proj", "v_proj"])


def refusal(folder: Path, base: TinyBase | None = None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        describe(folder) if base is None else base.lower(folder)
    assert len(str(caught.value)) < 1000
    return caught.value


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


class TestFields:
    def test_every_field_of_peft_is_in_one_group(self):
        fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        groups = [set(RULES.implemented), set(RULES.harmless), set(RULES.refused)]
        classified = set().union(*groups)
        assert sum(map(len, groups)) == len(classified), "a field is in two groups"
        assert fields <= classified, f"PEFT has fields nobody has judged: {fields - classified}"
        assert classified - fields == {"merge_weights"}

    def test_every_reason_is_given(self):
        assert all([*RULES.harmless.values(), *RULES.refused.values()])

    def test_a_default_config_has_nothing_refused(self):
        with quiet():
            RULES.check(peft.LoraConfig().to_dict())

    @pytest.mark.parametrize("field", sorted(RULES.refused))
    @pytest.mark.parametrize("value", [True, ["score"], {"a": 1}, 3], ids=str)
    def test_refused_fields_are_named(self, field, value, folder):
        error = refusal(edit_config(folder, **{field: value}))
        assert isinstance(error, AdapterUnsupported)
        assert field in str(error)

    @pytest.mark.parametrize("field", sorted(RULES.refused))
    @pytest.mark.parametrize("value", [None, False, [], {}], ids=str)
    def test_refused_fields_may_be_off(self, field, value, folder):
        describe(edit_config(folder, **{field: value}))

    def test_an_unknown_field_is_named(self, folder):
        error = refusal(edit_config(folder, sparkle_factor=0))
        assert isinstance(error, AdapterUnsupported)
        assert "sparkle_factor" in str(error)

    def test_an_unknown_field_may_be_null(self, folder):
        describe(edit_config(folder, sparkle_factor=None))

    @pytest.mark.parametrize(
        "init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "novel", None, 1]
    )
    def test_initializations_that_nobody_can_repeat(self, init, folder):
        error = refusal(edit_config(folder, init_lora_weights=init))
        assert isinstance(error, AdapterUnsupported)
        assert "init_lora_weights" in str(error)
        assert "path_initial_model_for_weight_conversion" in str(error)

    @pytest.mark.parametrize(
        "init", ["gaussian", "eva", "orthogonal", "mica", "pissa", "olora", True, False]
    )
    def test_initializations_that_are_known(self, init, folder):
        describe(edit_config(folder, init_lora_weights=init))


BLOCKS = {"target_modules_bd_a": ["q_proj"], "nblocks": 2}


class TestCombinations:
    @pytest.mark.parametrize(
        "fields",
        [
            {"use_dora": True, "alora_invocation_tokens": [1]},
            {"use_dora": True, "use_qalora": True},
            {"kasa_config": {}, "use_bdlora": BLOCKS},
            {"velora_config": {"num_groups": 4}, "monteclora_config": {}},
            {"kasa_config": {}, "init_lora_weights": "pissa"},
            {"target_parameters": ["q_proj.weight"], "use_dora": True},
            {"target_parameters": ["q_proj.weight"], "init_lora_weights": "olora"},
        ],
        ids=str,
    )
    def test_peft_has_none_of_these(self, fields, folder):
        error = refusal(edit_config(folder, **fields))
        assert isinstance(error, AdapterUnsupported)
        assert all(field in str(error) for field in fields)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("alora_invocation_tokens", [1]),
            ("kasa_config", {"beta": 0.1}),
            ("use_qalora", True),
            ("lora_bias", True),
        ],
    )
    def test_nor_these_for_embeddings(self, field, value, save_lora):
        folder = save_lora("llama", r=4, target_modules=["embed_tokens"])
        error = refusal(edit_config(folder, **{field: value}))
        assert isinstance(error, AdapterUnsupported)
        assert field in str(error)
        assert "embedding" in str(error)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("kasa_config", KasaConfig()), ("init_lora_weights", "olora")],
    )
    def test_nor_these_for_conv1d(self, field, value, tiny, save_lora):
        folder = save_lora("gpt2", r=4, target_modules=["c_attn"])
        edit_config(folder, **{field: value if isinstance(value, str) else vars(value)})
        if field == "kasa_config":
            edit_tensors(folder, add_diagonals)
        error = refusal(folder, tiny("gpt2"))
        assert isinstance(error, AdapterUnsupported)
        assert "Conv1D" in str(error)

    @pytest.mark.parametrize(("init", "rank"), [("pissa", 33), ("olora", 40), (None, 32)])
    def test_parts_that_are_larger_than_the_weight(self, init, rank, tiny, save_lora):
        folder = save_lora("llama", r=rank, target_modules=["v_proj"])
        if init is None:
            edit_config(folder, kasa_config={})
            edit_tensors(folder, add_diagonals)
        else:
            edit_config(folder, init_lora_weights=init)
        error = refusal(folder, tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert str(rank) in str(error)

    def test_a_part_of_a_weight_that_is_the_embedding_too(self, tiny, save_lora):
        config = {"init_lora_weights": "pissa", "r": 4, "target_modules": ["lm_head"]}
        folder = save_lora("qwen2", save_embedding_layers=False, **config)
        base = tiny("qwen2")
        embedding = base.reload(folder).get_base_model().get_input_embeddings()
        assert not torch.equal(embedding.weight, base.model.get_input_embeddings().weight)
        error = refusal(folder, base)
        assert isinstance(error, AdapterUnsupported)
        assert "save_embedding_layers=True" in str(error)

    @pytest.mark.parametrize("config", [{"use_dora": True}, {"alora_invocation_tokens": [3]}])
    def test_a_weight_of_its_own_where_the_base_counts(self, config, tiny, save_lora):
        folder = save_lora("llama", r=4, target_modules=["lm_head"], **config)
        tiny("llama").lower(folder)
        edit_tensors(folder, lambda tensors: tensors[f"{HEAD}.base_layer.weight"].mul_(1.1))
        error = refusal(folder, tiny("llama"))
        assert isinstance(error, AdapterUnsupported)
        assert "lm_head" in str(error)

    def test_trained_rows_of_an_adapted_head(self, tiny, save_lora):
        folder = save_lora("qwen2", r=4, target_modules=["lm_head"], trainable_token_indices=[3, 1])
        error = refusal(folder, tiny("qwen2"))
        assert isinstance(error, AdapterUnsupported)
        assert "lm_head" in str(error)

    def test_a_row_that_dora_cannot_scale(self, tiny, save_lora):
        folder = save_lora("llama", r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj"])
        row = tiny("llama").base.linear(tiny("llama").base.layout.targets[Q0[17:]]).weight[5]

        def cancel(tensors):
            tensors[f"{Q0}.lora_A.weight"][0] = -row
            tensors[f"{Q0}.lora_B.weight"][5] = torch.tensor([1.0, 0, 0, 0])

        error = refusal(edit_tensors(folder, cancel), tiny("llama"))
        assert isinstance(error, AdapterUnsupported)
        assert "DoRA" in str(error)


def add_diagonals(tensors):
    for name in list(tensors):
        if name.endswith("lora_A.weight"):
            diagonal = name.replace("lora_A.weight", "lora_diag")
            tensors[diagonal] = torch.ones(len(tensors[name]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("bias", ["all"]),
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
        ("use_dora", True),
        ("use_dora", "yes"),
        ("use_qalora", 1),
        ("kasa_config", {"beta": 1}),
        ("kasa_config", {"gamma": 1, "sparkle": 2}),
        ("kasa_config", True),
        ("velora_config", 3),
        ("use_bdlora", True),
        ("use_bdlora", {**BLOCKS, "nblocks": 0}),
        ("use_bdlora", {**BLOCKS, "nblocks": 3}),
        ("use_bdlora", {**BLOCKS, "nblocks": 10**12}),
        ("use_bdlora", {**BLOCKS, "target_modules_bd_b": ["q_proj"]}),
        ("use_bdlora", {**BLOCKS, "target_modules_bd_b": [1]}),
        ("use_bdlora", {**BLOCKS, "target_modules_bd_b": ["x"] * 1025}),
        ("use_bdlora", {**BLOCKS, "sparkle": 2}),
        ("alora_invocation_tokens", "text"),
        ("alora_invocation_tokens", [1, -1]),
        ("alora_invocation_tokens", [1.0]),
        ("alora_invocation_tokens", [True]),
        ("alora_invocation_tokens", [1] * (MAX_INVOCATION_TOKENS + 1)),
        ("target_parameters", "q_proj.weight"),
        ("target_parameters", [1]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
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
    named = (field, "rank", *value) if isinstance(value, dict) else (field, "lora_A")
    assert any(name in str(error) for name in named)


@pytest.mark.parametrize("size", [1, 0, "16", None])
def test_groups_that_tell_nothing(size, folder):
    error = refusal(edit_config(folder, use_qalora=True, qalora_group_size=size))
    assert isinstance(error, AdapterCorrupt | AdapterUnsupported)
    assert "qalora_group_size" in str(error)


def test_groups_that_fit_no_input(folder, tiny):
    edit_config(folder, use_qalora=True, qalora_group_size=10**12)
    edit_tensors(folder, put(f"{Q0}.lora_A.weight", torch.ones(4, 8)))
    error = refusal(folder, tiny("llama"))
    assert isinstance(error, AdapterMismatch)
    assert "q_proj" in str(error)


def test_blocks_that_make_a_wider_module(save_lora, tiny):
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    folder = save_lora("llama", r=4, use_bdlora=blocks, target_modules=["q_proj"])
    edit_config(folder, use_bdlora={**BLOCKS, "nblocks": 4})
    error = refusal(folder, tiny("llama"))
    assert isinstance(error, AdapterMismatch)
    assert "maps 128 to 64" in str(error)


@pytest.mark.parametrize("alpha", [0, -1])
def test_pissa_with_a_scale_that_has_no_root(alpha, folder):
    error = refusal(edit_config(folder, init_lora_weights="pissa", lora_alpha=alpha))
    assert isinstance(error, AdapterCorrupt)
    assert "alpha above 0" in str(error)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (drop(f"{Q0}.lora_A.weight"), AdapterCorrupt, "lora_A"),
        (drop(f"{Q0}.lora_B.weight"), AdapterCorrupt, "lora_B"),
        (put(f"{Q0}.lora_B.bias", torch.ones(64)), AdapterCorrupt, "lora_bias"),
        (put(f"{Q0}.lora_A.weight", torch.ones(5, 64)), AdapterCorrupt, "[4, ?]"),
        (put(f"{Q0}.lora_B.weight", torch.ones(64, 5)), AdapterCorrupt, "[?, 4]"),
        (put(f"{Q0}.lora_A.weight", torch.ones(0, 64)), AdapterCorrupt, "[4, ?]"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4, 0)), AdapterCorrupt, "[4, ?]"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4, 64, 1)), AdapterCorrupt, "[4, 64, 1]"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4)), AdapterCorrupt, "[4, ?]"),
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
        (put(f"{Q0}.lora_magnitude_vector", torch.ones(64)), AdapterCorrupt, "use_dora"),
        (put(f"{Q0}.lora_diag", torch.ones(4)), AdapterCorrupt, "kasa_config"),
        (put(f"{Q0}.lora_velora_embed", torch.ones(4)), AdapterUnsupported, "velora_config"),
        (put(f"{Q0}.lora_arrow.x", torch.ones(4)), AdapterUnsupported, "routes"),
        (put(f"{Q0}.base_layer.lora_A.weight", torch.ones(4)), AdapterUnsupported, "experts"),
        (put(f"{Q0}.lora_embedding_A", torch.ones(4, 64)), AdapterCorrupt, "lora_embedding_B"),
        (put(f"{Q0}.weight", torch.ones(64, 64)), AdapterUnsupported, "modules_to_save"),
        (put(f"{Q0}.bias", torch.ones(64)), AdapterUnsupported, "'bias' is 'none'"),
        (put(f"{Q0}.base_layer.bias", torch.ones(64)), AdapterUnsupported, "'bias' is 'none'"),
        (
            put(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", torch.ones(1, 64)),
            AdapterCorrupt,
            "trainable_token_indices",
        ),
        (
            put(f"{EMBEDDING}.token_adapter.base_layer.weight", torch.ones(300, 64)),
            AdapterUnsupported,
            "trained otherwise as well",
        ),
        (put("model.embed_tokens.weight", torch.ones(300, 64)), AdapterUnsupported, "its name"),
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


class TestTensorsBeside:
    @pytest.mark.parametrize(
        "indices", [[3], [3, 1, 5], [3, 3], [3, -1], ["3", 1], 7, {"wte": [3, 1]}, {}], ids=str
    )
    def test_tokens_that_do_not_name_the_rows(self, indices, save_lora):
        folder = save_lora("llama", target_modules=["q_proj"], trainable_token_indices=[3, 1])
        error = refusal(edit_config(folder, trainable_token_indices=indices))
        assert isinstance(error, AdapterCorrupt)
        assert "trainable_token_indices" in str(error)

    def test_tokens_of_another_vocabulary(self, tiny, save_lora):
        folder = save_lora("llama", target_modules=["q_proj"], trainable_token_indices=[3, 1])
        edit_config(folder, trainable_token_indices=[3, 300])
        error = refusal(folder, tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert "300" in str(error)

    def test_rows_of_an_adapted_embedding(self, save_lora):
        folder = save_lora("llama", target_modules=["embed_tokens"])
        name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
        edit_tensors(folder, put(name, torch.ones(2, 64)))
        error = refusal(edit_config(folder, trainable_token_indices=[1, 2]))
        assert isinstance(error, AdapterUnsupported)
        assert "embed_tokens" in str(error)

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_a_resized_vocabulary(self, target, tiny, save_lora):
        folder = save_lora("llama", r=4, target_modules=[target])
        name = f"base_model.model.{'model.' * (target != 'lm_head')}{target}.base_layer.weight"
        edit_tensors(folder, put(name, torch.ones(320, 64)))
        error = refusal(folder, tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert "vocabulary of another size" in str(error)

    def test_two_copies_of_one_weight(self, tiny, save_lora):
        folder = save_lora("qwen2", target_modules=["q_proj"], save_embedding_layers=True)
        edit_tensors(folder, lambda tensors: tensors[f"{HEAD}.weight"].mul_(2))
        error = refusal(folder, tiny("qwen2"))
        assert isinstance(error, AdapterCorrupt)
        assert "lm_head.weight" in str(error)

    def test_a_module_that_the_base_has_not(self, tiny, save_lora):
        folder = save_lora("llama", target_modules=["q_proj"], modules_to_save=["norm"])
        edit_tensors(folder, put("base_model.model.score.weight", torch.ones(2, 64)))
        edit_config(folder, modules_to_save=["norm", "score"])
        error = refusal(folder, tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert "score" in str(error)

    def test_saved_twice_and_different(self, save_lora):
        folder = save_lora("gpt2", bias="all", modules_to_save=["ln_f"], target_modules=["c_attn"])
        name = "base_model.model.transformer.ln_f.modules_to_save.bias"
        error = refusal(edit_tensors(folder, lambda tensors: tensors[name].add_(1)))
        assert isinstance(error, AdapterUnsupported)
        assert name in str(error)


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


def test_a_scale_that_overflows_the_dtype(folder, tiny):
    edit_config(folder, lora_alpha=1e8)
    tiny("llama").lower(folder)
    narrow = TinyBase.load(tiny("llama").folder, torch.float16)
    with pytest.raises(AdapterUnsupported, match=r"overflows in torch\.float16"):
        narrow.lower(folder)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_what_takes_more_than_there_is_room_for(stored, pickled, folder, tiny):
    base = tiny("llama").base
    edit_tensors(folder, lambda t: t.update({name: t[name].to(stored) for name in t}))
    if pickled:
        path = folder / "adapter_model.safetensors"
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
    fits = lower(folder, base, ROOM).num_bytes
    lower(folder, base, fits)
    with pytest.raises(AdapterTooLarge, match="there is room for"):
        lower(folder, base, fits - 4)


class TestAnotherBase:
    def test_architecture(self, folder, tiny):
        error = refusal(folder, tiny("gpt2"))
        assert isinstance(error, AdapterMismatch)
        assert "q_proj" in str(error)
        assert "gpt2" in str(error)

    def test_width(self, folder, tiny):
        def widen(tensors):
            for name, tensor in tensors.items():
                if "lora_A" in name:
                    tensors[name] = torch.ones(tensor.shape[0], 128)

        error = refusal(edit_tensors(folder, widen), tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert "128" in str(error)
        assert "hidden size 64" in str(error)

    def test_layers(self, folder, tiny):
        deeper = Q0.replace("layers.0", "layers.31")

        def deepen(tensors):
            for name in list(tensors):
                tensors[name.replace(Q0, deeper)] = tensors.pop(name)

        error = refusal(edit_tensors(folder, deepen), tiny("llama"))
        assert isinstance(error, AdapterMismatch)
        assert "layers.31" in str(error)
        assert "has 2 layers" in str(error)

    def test_vocabulary(self, save_lora, tiny):
        folder = save_lora("gpt2", r=4, target_modules=["wte"])
        name = "base_model.model.transformer.wte.lora_embedding_A"
        error = refusal(edit_tensors(folder, put(name, torch.ones(4, 301))), tiny("gpt2"))
        assert isinstance(error, AdapterMismatch)
        assert "301 rows" in str(error)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "NOVEL"}, "'NOVEL'"),
        ({"peft_type": "lora"}, "'lora'"),
        ({"peft_type": None}, "None"),
        ({"peft_type": ["LORA"]}, "LORA"),
    ],
)
def test_kinds_that_are_not_served(config, says, folder):
    error = refusal(edit_config(folder, **config))
    assert isinstance(error, AdapterUnsupported)
    assert says in str(error)
    assert "adalora, " in str(error)


def test_a_config_of_nothing_known(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "peft_type" in str(refusal(tmp_path))
