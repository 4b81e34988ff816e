"""The zoo's adapters do something, hold no zeros and leave the base alone: else parity is cheap."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .peft_zoo import FAMILIES, REFUSED_VARIANTS, VARIANTS, PeftOracle, Variant

Oracles = Callable[[str], PeftOracle]
PROMPT = [5, 120, 77, 210, 9, 64, 33, 181, 12, 250]
UNUSED_TENSORS = ("lora_velora_embed",)
"""Saved by PEFT, and read in training only."""


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[..., Path]) -> Oracles:
    made: dict[str, PeftOracle] = {}

    def make(family: str) -> PeftOracle:
        if family not in made:
            made[family] = PeftOracle(tiny_model(family))
        return made[family]

    return make


def family_of(variant: Variant) -> str:
    """One of the families, so that each gets its share."""
    families = sorted(variant.families)
    return families[sum(variant.name.encode()) % len(families)]


def named(variants: tuple[Variant, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants, ids=[v.name for v in variants])


def test_names_are_unique_and_families_known():
    names = [variant.name for variant in (*VARIANTS, *REFUSED_VARIANTS)]
    assert len(names) == len(set(names))
    assert all(v.families and v.families <= FAMILIES for v in (*VARIANTS, *REFUSED_VARIANTS))


@named(VARIANTS)
def test_the_saved_adapter_changes_the_output(variant, oracle, tmp_path):
    peft = oracle(family_of(variant))
    before = {name: tensor.clone() for name, tensor in peft.model.state_dict().items()}
    prompt = variant.prompt(PROMPT)
    folder = peft.save(variant, tmp_path / "adapter", seed=1)

    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"].lower() == (
        variant.kind
    )
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert tensor.any() or not tensor.numel() or name.endswith(UNUSED_TENSORS), name
    adapted, plain = peft.generate(prompt, 2, folder), peft.generate(prompt, 2)
    assert abs(adapted.logprobs[0] - plain.logprobs[0]) > 1e-3
    change = peft.prompt_logprobs(prompt, folder) - peft.prompt_logprobs(prompt)
    assert change.isfinite().all()
    assert change.abs().max() > 0.1
    after = peft.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@named(REFUSED_VARIANTS)
def test_what_is_refused_is_saved_all_the_same(variant, oracle, tmp_path):
    folder = oracle("llama").save(variant, tmp_path / "adapter", seed=1)
    assert (folder / "adapter_config.json").exists()
    assert load_file(folder / "adapter_model.safetensors")


def test_seeds_give_different_adapters_and_the_same_seed_the_same(oracle, tmp_path):
    peft = oracle("llama")
    first, again, other = (
        load_file(peft.save(VARIANTS[0], tmp_path / name, seed) / "adapter_model.safetensors")
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["alora", "alora-one-token", "alora-twice"])
def test_alora_is_what_pefts_own_generate_makes_of_it(name, family, oracle, tmp_path):
    peft, variant = oracle(family), next(v for v in VARIANTS if v.name == name)
    prompt = variant.prompt(PROMPT)
    folder = peft.save(variant, tmp_path, seed=2)
    expected = peft.load(folder).generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert peft.generate(prompt, 6, folder).token_ids == expected[0, len(prompt) :].tolist()
    assert peft.generate(PROMPT, 3, folder) == peft.generate(PROMPT, 3)  # never invoked
