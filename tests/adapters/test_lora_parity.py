"""Every variant of LoRA that is served computes what PEFT computes, place by place."""

import json

import pytest
import torch
from peft import EvaConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

from deltamux.adapters.inspect import describe
from deltamux.adapters.kind import Lowered
from deltamux.adapters.primitives.embedding import EmbeddingAffine
from deltamux.adapters.primitives.layer import NormOverride
from deltamux.adapters.primitives.linear import Affine, Dense, OutputRows
from deltamux.adapters.scope import EveryPosition, FromInvocation

from .. import peft_zoo
from .applied import check_order
from .peft_oracle import (
    ROWS,
    TinyBase,
    assert_equals_peft,
    edit_config,
    edit_tensors,
    inputs_for,
    our_outputs,
    peft_module,
    peft_outputs,
)

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_ALL = ["c_attn", "c_proj", "c_fc"]
TOKENS = [17, 3, 250, 4]

PLAIN = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rank 1": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": LLAMA_ALL}),
    "rank above the width": ("llama", {"r": 100, "lora_alpha": 16, "target_modules": ["k_proj"]}),
    "odd rank, float alpha": ("qwen2", {"r": 3, "lora_alpha": 2.5, "target_modules": ["o_proj"]}),
    "negative alpha": ("llama", {"r": 3, "lora_alpha": -2, "target_modules": ["o_proj"]}),
    "dropout": ("llama", {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]}),
    "rsLoRA": ("llama", {"r": 8, "use_rslora": True, "target_modules": ["down_proj", "k_proj"]}),
    "heads wider than the stream": ("qwen3", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "all-linear": ("qwen2", {"r": 2, "target_modules": "all-linear"}),
    "all-linear without some": (
        "qwen2",
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "regex": ("llama", {"r": 5, "target_modules": r".*\.1\.self_attn\.(q|o)_proj"}),
    "layers_to_transform": (
        "llama",
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    ),
    "layers_pattern": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"},
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
    "GPT-2": ("gpt2", {"r": 4, "target_modules": GPT2_ALL}),
    "GPT-2, flag set": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "untied head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "tied head": ("qwen2", {"r": 4, "target_modules": ["lm_head"]}),
    "bias of a base without any": ("llama", {"r": 4, "bias": "all", "target_modules": ["q_proj"]}),
}
INITS = {
    "gaussian": ("llama", {"init_lora_weights": "gaussian", "target_modules": ["q_proj"]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
    "no initialization": ("llama", {"init_lora_weights": False, "target_modules": ["q_proj"]}),
    "mica": ("llama", {"init_lora_weights": "mica", "target_modules": ["q_proj"]}),
    "eva": (
        "llama",
        {"init_lora_weights": "eva", "eva_config": EvaConfig(), "target_modules": ["q_proj"]},
    ),
    "pissa": ("llama", {"init_lora_weights": "pissa", "r": 4, "target_modules": LLAMA_ALL}),
    "pissa, GPT-2": (
        "gpt2",
        {"init_lora_weights": "pissa", "r": 5, "lora_alpha": 7, "target_modules": GPT2_ALL},
    ),
    "pissa, rsLoRA and patterns": (
        "qwen2",
        {
            "init_lora_weights": "pissa",
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"k_proj": 1},
            "target_modules": ["q_proj", "k_proj", "lm_head"],
        },
    ),
    "pissa, untied head": (
        "llama",
        {"init_lora_weights": "pissa", "r": 4, "target_modules": ["q_proj", "lm_head"]},
    ),
    "pissa, all of the weight": (
        "llama",
        {"init_lora_weights": "pissa", "r": 32, "target_modules": ["k_proj"]},
    ),
    "pissa beside an embedding": (
        "qwen2",
        {"init_lora_weights": "pissa", "r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "pissa and DoRA": (
        "qwen2",
        {"init_lora_weights": "pissa", "r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    ),
    "olora": (
        "llama",
        {"init_lora_weights": "olora", "r": 4, "lora_alpha": 6, "target_modules": LLAMA_ALL},
    ),
    "olora, negative scale": (
        "llama",
        {"init_lora_weights": "olora", "r": 3, "lora_alpha": -6, "target_modules": ["up_proj"]},
    ),
    "kasa": (
        "llama",
        {"kasa_config": KasaConfig(), "r": 4, "lora_alpha": 6, "target_modules": LLAMA_ALL},
    ),
}
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["self_attn.q_proj", "0.mlp.up_proj"],
    nblocks=4,
    match_strict=False,
)
STORED_OTHERWISE = {
    "bdlora": ("llama", {"use_bdlora": BLOCKS, "r": 8, "target_modules": LLAMA_ALL}),
    "bdlora and lora_bias": (
        "qwen2",
        {"use_bdlora": BLOCKS, "r": 8, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    ),
    "velora": (
        "llama",
        {"velora_config": VeloraConfig(num_groups=8), "target_modules": ["q_proj"]},
    ),
    "monteclora": (
        "llama",
        {"monteclora_config": MontecloraConfig(num_samples=2), "target_modules": ["q_proj"]},
    ),
    "parameters": (
        "llama",
        {
            "target_modules": ["k_proj"],
            "target_parameters": ["q_proj.weight", "model.layers.1.mlp.up_proj.weight"],
            "rank_pattern": {"q_proj.weight": 3, "up_proj": 5},
            "alpha_pattern": {"up_proj.weight": 3},
        },
    ),
    "parameters of GPT-2, square ones too": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["c_attn.weight", "attn.c_proj.weight"]},
    ),
    "parameters of embedding and head": (
        "qwen2",
        {"target_modules": [], "target_parameters": ["embed_tokens.weight", "lm_head.weight"]},
    ),
    "parameter of positions": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["wpe.weight"]},
    ),
}
DORA = {
    "dora": ("llama", {"use_dora": True, "r": 4, "target_modules": LLAMA_ALL}),
    "dora, GPT-2": ("gpt2", {"use_dora": True, "r": 4, "target_modules": GPT2_ALL}),
    "dora with rsLoRA": (
        "qwen2",
        {"use_dora": True, "r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "dora and trained biases": (
        "qwen2",
        {"use_dora": True, "r": 4, "bias": "lora_only", "target_modules": ["q_proj"]},
    ),
    "dora, tied head": ("qwen2", {"use_dora": True, "r": 4, "target_modules": ["lm_head"]}),
    "dora, embedding": (
        "llama",
        {"use_dora": True, "r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "dora, positions": ("gpt2", {"use_dora": True, "r": 4, "target_modules": ["wpe"]}),
}
BESIDE = {
    "embedding": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]}),
    "tied embedding": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and its tied head": (
        "qwen2",
        {"r": 4, "ensure_weight_tying": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "tokens and positions": ("gpt2", {"r": 4, "target_modules": ["wte", "wpe"]}),
    "all biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn", "wte"]}),
    "all biases and lora_bias": (
        "qwen2",
        {"bias": "all", "lora_bias": True, "target_modules": ["q_proj"]},
    ),
    "all biases and a whole norm": (
        "gpt2",
        {"bias": "all", "modules_to_save": ["ln_f"], "target_modules": ["c_attn"]},
    ),
    "biases of the targets": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"]}),
    "norms": (
        "qwen3",
        {"modules_to_save": ["norm", "input_layernorm", "q_norm"], "target_modules": ["q_proj"]},
    ),
    "norms of GPT-2": ("gpt2", {"modules_to_save": ["ln_1"], "target_modules": ["c_attn"]}),
    "whole layer": (
        "gpt2",
        {"modules_to_save": ["transformer.h.1"], "target_modules": ["c_attn"]},
    ),
    "whole mlp": ("llama", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    "whole head": ("qwen2", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "whole embedding": (
        "qwen2",
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
    "whole positions": ("gpt2", {"modules_to_save": ["wpe"], "target_modules": ["c_attn"]}),
    "both, tied": (
        "qwen2",
        {
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
            "target_modules": ["q_proj"],
        },
    ),
    "tokens": ("llama", {"trainable_token_indices": TOKENS, "target_modules": ["q_proj"]}),
    "tokens, tied": ("qwen2", {"trainable_token_indices": TOKENS, "target_modules": ["q_proj"]}),
    "tokens by name": (
        "gpt2",
        {"trainable_token_indices": {"wte": TOKENS}, "target_modules": ["c_attn"]},
    ),
    "tokens of both alike": (
        "qwen2",
        {
            "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS},
            "target_modules": ["q_proj"],
        },
    ),
    "tokens of both apart": (
        "qwen2",
        {
            "trainable_token_indices": {"model.embed_tokens": TOKENS, "lm_head": [5, 2]},
            "target_modules": ["q_proj"],
        },
    ),
    "tokens of the tied head alone": (
        "qwen2",
        {"trainable_token_indices": {"lm_head": [5, 2]}, "target_modules": ["q_proj"]},
    ),
    "rows of positions": (
        "gpt2",
        {"trainable_token_indices": {"wpe": [3, 1]}, "target_modules": ["c_attn"]},
    ),
}
VARIANTS = {**PLAIN, **INITS, **STORED_OTHERWISE, **DORA, **BESIDE}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_peft(variant, tiny, save_lora):
    family, config = VARIANTS[variant]
    adapter = assert_equals_peft(tiny(family), save_lora(family, **config))
    assert (adapter.kind, adapter.library) == ("lora", "peft")
    (part,) = adapter.parts
    assert part.scope == EveryPosition()
    check_order(Lowered(adapter.parts))


ZOO = {variant.name: variant for variant in peft_zoo.LORA}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora-qalora", "llama"),
        ("lora-qalora-unused", "gpt2"),
        ("lora-pissa-converted", "gpt2"),
        ("lora-olora-converted", "llama"),
    ],
)
def test_what_takes_more_than_a_configuration(name, family, tiny, tmp_path):
    oracle = peft_zoo.PeftOracle(tiny(family).folder)
    folder = oracle.save(ZOO[name], tmp_path / "adapter", seed=3)
    assert_equals_peft(tiny(family), folder, oracle.load(folder))


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
def test_tricky_alpha_patterns(name, tiny, save_lora):
    folder = save_lora("llama", r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    edit_config(folder, alpha_pattern=PATTERNS[name])
    assert_equals_peft(tiny("llama"), folder)


def test_a_pattern_that_is_null_is_none(tiny, save_lora):
    folder = save_lora("llama", r=4, target_modules=["q_proj"])
    edit_config(folder, alpha_pattern=None, rank_pattern=None)
    assert tiny("llama").lower(folder).rank == 4


def test_config_of_an_old_peft(tiny, save_lora):
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
    assert_equals_peft(tiny("llama"), folder)


def test_adapter_of_another_name_lives_in_its_own_folder(tiny, save_lora):
    folder = save_lora("llama", r=4, adapter_name="tone", target_modules=["q_proj"])
    assert folder.name == "tone"
    assert_equals_peft(tiny("llama"), folder)


def test_saved_in_bfloat16(tiny, save_lora):
    folder = save_lora("llama", r=4, dtype=torch.bfloat16, target_modules=["q_proj"])
    assert_equals_peft(tiny("llama"), folder)


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter])
def test_saved_as_pickle(wrap, tiny, save_lora):
    folder = save_lora("llama", r=4, target_modules=["q_proj", "down_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = {name: wrap(tensor) for name, tensor in load_file(path).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    path.unlink()
    assert_equals_peft(tiny("llama"), folder)


INVOKED = {"alora_invocation_tokens": [31, 7, 7], "r": 4, "lora_alpha": 6}


class TestActivatedLora:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("active", [0, 3, ROWS])
    def test_equals_peft(self, active, family, tiny, save_lora):
        targets = GPT2_ALL if family == "gpt2" else LLAMA_ALL
        base = tiny(family)
        folder = save_lora(family, lora_bias=True, target_modules=targets, **INVOKED)
        adapter, model = base.lower(folder), base.reload(folder)
        (part,) = adapter.parts
        assert part.scope == FromInvocation((31, 7, 7))
        bare, ours = peft_outputs(base, base.model), our_outputs(base, adapter)
        for primitive in part.primitives:
            x = inputs_for(primitive.path, primitive.target.in_features)
            with torch.no_grad():
                module = peft_module(model, primitive.path)
                expected = module(x[None], alora_offsets=[active or None])[0]
            start = ROWS - active
            assert torch.equal(expected[:start], bare[primitive.path][:start])
            torch.testing.assert_close(
                expected[start:], ours[primitive.path][start:], atol=1e-5, rtol=0
            )

    def test_whole_modules_are_replaced_everywhere(self, tiny, save_lora):
        folder = save_lora(
            "gpt2", target_modules=["c_attn"], modules_to_save=["ln_f"], bias="all", **INVOKED
        )
        everywhere, invoked = tiny("gpt2").lower(folder).parts
        assert everywhere.scope == EveryPosition()
        assert {type(each) for each in everywhere.primitives} == {Affine, NormOverride}
        assert all(each.a is None for each in everywhere.primitives if isinstance(each, Affine))
        assert invoked.scope == FromInvocation((31, 7, 7))
        assert [type(each) for each in invoked.primitives] == [Affine, Affine]
        assert all(each.bias is None for each in invoked.primitives)

    def test_no_invocation_tokens_are_plain_lora(self, tiny, save_lora):
        folder = save_lora("llama", target_modules=["q_proj"])
        assert_equals_peft(tiny("llama"), edit_config(folder, alora_invocation_tokens=[]))


class TestCopiesOfBaseWeights:
    """PEFT saves the embedding's or head's own weight when it is a target, or when told to."""

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
    def test_equal_ones_cost_nothing(self, target, family, tiny, save_lora):
        folder = save_lora(family, target_modules=[target], save_embedding_layers=True)
        weights = load_file(folder / "adapter_model.safetensors")
        assert any("lora" not in name for name in weights)
        adapter = assert_equals_peft(tiny(family), folder)
        assert {type(each) for each in adapter.primitives} <= {Affine, EmbeddingAffine}

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
    def test_others_are_served_as_peft_loads_them(self, target, family, tiny, save_lora):
        folder = save_lora(family, target_modules=[target], save_embedding_layers=True)
        edit_tensors(folder, self.shift)
        adapter = assert_equals_peft(tiny(family), folder)
        replaced = [each for each in adapter.primitives if isinstance(each, Dense)]
        assert len(replaced) == (family == "qwen2" or target != "embed_tokens")

    @staticmethod
    def shift(tensors):
        for name in tensors:
            if "lora" not in name:
                tensors[name] += torch.linspace(0.1, 0.3, len(tensors[name]))[:, None]


def test_rows_of_tokens_are_stored_once_for_tied_weights(tiny, save_lora):
    folder = save_lora("qwen2", trainable_token_indices=TOKENS, target_modules=["q_proj"])
    adapter = tiny("qwen2").lower(folder)
    (head,) = (each for each in adapter.primitives if isinstance(each, OutputRows))
    assert head.indices.tolist() == sorted(TOKENS)
    assert sum(each is head.weight for each in adapter.tensors) == 1


IN_BFLOAT16 = {
    name: VARIANTS[name] for name in ("lora_bias", "dora", "dora, embedding", "all biases", "pissa")
}


@pytest.mark.parametrize("variant", IN_BFLOAT16)
def test_on_a_base_in_bfloat16(variant, tiny, save_lora):
    family, config = VARIANTS[variant]
    base = TinyBase.load(tiny(family).folder, torch.bfloat16)
    folder = save_lora(family, **config)
    bare, expected = (peft_outputs(base, each) for each in (base.model, base.reload(folder)))
    actual = our_outputs(base, base.lower(folder))
    for path, output in expected.items():
        change = (output - bare[path]).float().norm()
        off = (output - actual[path]).float().norm()
        assert off <= 0.02 * change + 0.005 * output.float().norm(), path


def test_the_scale_is_folded_in_before_the_one_cast(tiny, save_lora):
    folder = save_lora("llama", r=3, lora_alpha=5, lora_bias=True, target_modules=["q_proj"])
    exact = tiny("llama").lower(folder)
    cast = TinyBase.load(tiny("llama").folder, torch.bfloat16).lower(folder)
    for high, low in zip(exact.primitives, cast.primitives, strict=True):
        for wide, narrow in zip(high.tensors, low.tensors, strict=True):
            assert narrow.is_contiguous()
            assert torch.equal(wide.to(torch.bfloat16), narrow)
    assert exact.digest == cast.digest
    assert exact.num_bytes == 2 * cast.num_bytes


def test_the_digest_is_of_both_files(tiny, save_lora):
    base, digests = tiny("llama"), set()
    folder = save_lora("llama", r=4, target_modules=["q_proj"])
    digests.add(base.lower(folder).digest)
    edit_config(folder, lora_alpha=9)
    digests.add(base.lower(folder).digest)
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).add_(1))
    digests.add(base.lower(folder).digest)
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_describe_needs_no_base(tiny, save_lora):
    folder = save_lora(
        "qwen2",
        r=4,
        lora_bias=True,
        rank_pattern={"k_proj": 2},
        target_modules=["q_proj", "k_proj"],
    )
    told, adapter = describe(folder), tiny("qwen2").lower(folder)
    assert (told.kind, told.library, told.digest) == ("lora", "peft", adapter.digest)
    assert told.ranks == (2, 4)
    assert told.target_modules == ("k_proj", "q_proj")
    assert told.num_modules == 4
    assert told.num_parameters == adapter.num_elements
    assert told.primitives == {"Affine": 4}


@pytest.mark.parametrize(
    "variant", ["embedding", "norms", "whole layer", "tokens", "dora", "pissa"]
)
def test_describe_counts_what_is_stored(variant, tiny, save_lora):
    family, config = VARIANTS[variant]
    folder = save_lora(family, save_embedding_layers=False, **config)
    told, adapter = describe(folder), tiny(family).lower(folder)
    assert set(told.primitives) == {type(each).__name__ for each in adapter.primitives}
    assert told.num_modules == len({each.path for each in adapter.primitives})
    # What is replaced takes a row of zeros and the tokens' ids beside.
    beside = adapter.num_elements - told.num_parameters
    assert 0 <= beside < 0.05 * adapter.num_elements
