"""The server end to end on the GPU's kernels, which Triton's interpreter runs on the CPU.

Decode steps are padded to their buckets as those that a GPU replays; captured they are not.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from ..kinds import Case, base_cases, golden_cases, peft_cases, variants
from ..peft_zoo import PeftOracle
from .test_kinds import served_answers

MAX_TOKENS = 3
LONGEST_PROMPT = 17
GOLDENS = {
    f"adapterhub-{name}" for name in ("seq_bn", "prefix_flat", "loreft_suffix", "ia3", "mam")
}
"""Of AdapterHub, one of each primitive and scope."""
FAMILIES = {"llama": 100, "gpt2": 6, "qwen3": 6}
"""How many adapters of each: all kinds of the first, some with the others' own operations."""


def chosen(oracle: PeftOracle, family: str, folder: Path) -> list[Case]:
    """A request of every kind, with a short prompt, and some of the base."""
    firsts = {each.kind: each for each in reversed(variants(family))}
    picked = list(firsts.values())[: FAMILIES[family]]
    goldens = {
        case.name: case
        for case in golden_cases(family)
        if case.name in GOLDENS and len(case.prompt) <= LONGEST_PROMPT
    }
    found = [
        *(case for case in peft_cases(oracle, picked, folder, MAX_TOKENS)),
        *list(goldens.values())[: FAMILIES[family]],
        *list(base_cases(oracle, MAX_TOKENS))[:2],
    ]
    random.Random(5).shuffle(found)
    return [
        replace(case, token_ids=case.token_ids[:MAX_TOKENS], logprobs=case.logprobs[:MAX_TOKENS])
        for case in found
        if len(case.prompt) <= LONGEST_PROMPT
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpus_kernels_give_the_librarys_tokens(family, tiny_model, tmp_path):
    """Every kind in one batch: tokens equal, log-probabilities within 2e-3."""
    model = tiny_model(family)
    cases = chosen(PeftOracle(model), family, tmp_path / "zoo")
    served = tmp_path / "served"
    served.mkdir()
    wrong = served_answers(model, cases, served, DELTAMUX_KERNELS="interpret")
    assert {name: faults for name, faults in wrong.items() if faults} == {}
