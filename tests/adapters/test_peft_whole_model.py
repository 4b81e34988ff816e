"""Prompts, scales, norms and token rows of PEFT: our whole base with the adapter, and PEFT's."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig

from deltamux.adapters.lower import lower
from deltamux.adapters.primitives.lowered import KVPrefix
from deltamux.server.model.base import ServedBase, load_base
from tests.peft_zoo import FAMILIES, VARIANTS, PeftOracle, Variant

from .peft_oracle import ROOM, TinyBase, quiet, save_adapter
from .whole_model import prompt_logprobs

KINDS = (
    "ia3",
    "ln_tuning",
    "trainable_tokens",
    "prompt_tuning",
    "p_tuning",
    "multitask_prompt_tuning",
    "prefix_tuning",
    "cpt",
    "adaption_prompt",
)
CASES = [
    (variant, family)
    for variant in VARIANTS
    for family in sorted(variant.families)
    if variant.kind in KINDS
]
PROMPT = [5, 120, 77, 210, 9, 64, 33, 181, 12, 250, 3]
TOLERANCE = 1e-4

Tiny = Callable[[str], TinyBase]


@pytest.fixture(scope="module")
def oracles(tiny_model: Callable[..., Path]) -> Callable[[str], PeftOracle]:
    made: dict[str, PeftOracle] = {}

    def make(family: str) -> PeftOracle:
        if family not in made:
            made[family] = PeftOracle(tiny_model(family))
        return made[family]

    return make


def test_every_kind_has_cases():
    assert {variant.kind for variant, _ in CASES} == set(KINDS)
    assert {family for _, family in CASES} == FAMILIES


@pytest.mark.parametrize(
    ("variant", "family"), CASES, ids=[f"{variant.name}-{family}" for variant, family in CASES]
)
def test_log_probabilities_are_peft_s(
    tiny: Tiny,
    oracles: Callable[[str], PeftOracle],
    tmp_path: Path,
    variant: Variant,
    family: str,
):
    oracle, prompt = oracles(family), variant.prompt(PROMPT)
    folder = oracle.save(variant, tmp_path / "adapter", seed=3)
    expected = oracle.prompt_logprobs(prompt, folder)
    assert (expected - oracle.prompt_logprobs(prompt)).abs().max() > 0.1
    actual = prompt_logprobs(tiny(family).base, tiny(family).lower(folder), prompt)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


SAVED = {
    "ia3, mlp": ("llama", peft.IA3Config(modules_to_save=["mlp"])),
    "ia3, head": ("gpt2", peft.IA3Config(modules_to_save=["lm_head"])),
    "ln tuning, head": ("qwen3", peft.LNTuningConfig(modules_to_save=["lm_head"])),
    "ln tuning, linear": ("gpt2", peft.LNTuningConfig(target_modules=["ln_1", "c_fc"])),
    "ln tuning, query norms": ("qwen3", peft.LNTuningConfig(target_modules=["q_norm", "k_norm"])),
    "prefix, layer": (
        "llama",
        peft.PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=["layers.1"]),
    ),
    "prefix, norm": (
        "gpt2",
        peft.PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=["ln_f"]),
    ),
    "prompt, head": (
        "llama",
        peft.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head"]),
    ),
    "prompt, last norm": (
        "gpt2",
        peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, modules_to_save=["ln_f"]
        ),
    ),
    "tokens of the head": (
        "llama",
        peft.TrainableTokensConfig(token_indices=[9, 77, 5], target_modules=["lm_head"]),
    ),
    "tokens of the tied head alone": (
        "qwen2",
        peft.TrainableTokensConfig(token_indices=[9, 77, 5], target_modules=["lm_head"]),
    ),
    "tokens of both": (
        "llama",
        peft.TrainableTokensConfig(
            token_indices=[9, 77, 5], target_modules=["lm_head", "embed_tokens"]
        ),
    ),
    "positions": ("gpt2", peft.TrainableTokensConfig(token_indices=[3, 0], target_modules=["wpe"])),
}


@pytest.mark.parametrize("name", SAVED)
def test_replaced_modules_beside_it(tiny: Tiny, tmp_path: Path, name: str):
    family, config = SAVED[name]
    assert_log_probabilities(tiny(family), tmp_path, config)


def assert_log_probabilities(
    base: TinyBase, folder: Path, config: PeftConfig, tolerance: float = TOLERANCE
) -> None:
    config = copy.deepcopy(config)  # PEFT fills in what it leaves open
    config.task_type = "CAUSAL_LM"
    save_adapter(base, folder, config)
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode(), quiet():
        bare = base.model(tokens).logits[0]
        expected = base.reload(folder)(tokens).logits[0, -len(PROMPT) :]
    assert (expected - bare).abs().max() > 0.05
    rows = expected[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    actual = prompt_logprobs(base.base, base.lower(folder), PROMPT)
    torch.testing.assert_close(actual, rows, atol=tolerance, rtol=0)


def test_adaption_prompts_add_the_bias_of_the_output_projection_twice(
    tiny_model: Callable[..., Path], tmp_path: Path
):
    base = TinyBase.load(tiny_model("llama", attention_bias=True))
    assert_log_probabilities(
        base, tmp_path, peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
    )


def test_adaption_prompts_on_mistral_with_its_window(
    tiny_model: Callable[..., Path], tmp_path: Path
):
    base = TinyBase.load(tiny_model("mistral"))
    assert_log_probabilities(
        base, tmp_path, peft.AdaptionPromptConfig(adapter_len=20, adapter_layers=1)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=6),
        peft.PrefixTuningConfig(num_virtual_tokens=6),
        peft.IA3Config(),
    ],
    ids=["prompt", "prefix", "ia3"],
)
def test_bfloat16(tiny_model: Callable[..., Path], tmp_path: Path, family: str, config: PeftConfig):
    folder = tiny_model(family)
    exact = TinyBase.load(folder)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    save_adapter(exact, tmp_path, config)
    base = load_base(folder, torch.bfloat16)
    adapter = lower(tmp_path, base, ROOM)
    assert all(tensor.dtype is torch.bfloat16 for tensor in adapter.tensors)
    expected = prompt_logprobs(exact.base, exact.lower(tmp_path), PROMPT)
    actual = prompt_logprobs(base, adapter, PROMPT)
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0)


class TestPrefixes:
    """What is known of a prefix beside what it computes."""

    def prefix(self, base: ServedBase, folder: Path) -> KVPrefix:
        adapter = lower(folder, base, ROOM)
        assert adapter.prefix is not None
        assert adapter.parts == ()
        return adapter.prefix

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_of_prefix_tuning(self, tiny: Tiny, tmp_path: Path, family: str):
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        save_adapter(tiny(family), tmp_path, config)
        prefix, layout = self.prefix(tiny(family).base, tmp_path), tiny(family).base.layout
        assert prefix.keys.shape == (2, layout.num_kv_heads, 5, layout.head_dim)
        assert prefix.position_offset == prefix.length == 5
        assert not prefix.embedded

    def test_of_a_prompt_of_real_tokens_is_what_these_leave_in_the_cache(
        self, tiny: Tiny, tmp_path: Path
    ):
        base, tokens = tiny("gpt2"), [7, 9, 11]
        config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=tokens)
        with quiet():
            peft.get_peft_model(base.model, config).save_pretrained(tmp_path)
        prefix = self.prefix(base.base, tmp_path)
        with torch.inference_mode():
            cache = base.model(torch.tensor([tokens])).past_key_values
        for layer, keys in enumerate(prefix.keys):
            torch.testing.assert_close(keys, cache.layers[layer].keys[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                prefix.values[layer], cache.layers[layer].values[0], atol=1e-5, rtol=0
            )
        assert prefix.position_offset == prefix.length == 3
        assert prefix.embedded

    def test_a_task_is_chosen_beside_the_adapter(self, tiny: Tiny, tmp_path: Path):
        base = tiny("llama")
        config = peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
        )
        save_adapter(base, tmp_path, config)
        found = []
        for task in (0, 1):
            (tmp_path / "deltamux.json").write_text(json.dumps({"task_id": task}))
            found.append(self.prefix(base.base, tmp_path))
        assert not torch.allclose(found[0].values, found[1].values, atol=1e-3)

    def test_one_task_needs_no_choice(self, tiny: Tiny, tmp_path: Path):
        config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        save_adapter(tiny("llama"), tmp_path, config)
        assert self.prefix(tiny("llama").base, tmp_path).length == 3
