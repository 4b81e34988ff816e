"""Lowered AdapterHub adapters compute what the library itself computes with them.

The oracle is ``tests/golden``: greedy tokens and log-probabilities by the library. Here the base is
transformers' own model and the corrections are the reference operations, so that nothing but the
kinds is under test.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.errors import AdapterUnsupported
from deltamux.adapters.kind import Lowered
from deltamux.adapters.lower import lower
from deltamux.server.model.base import ServedBase, load_base

from .adapterhub_folders import Golden, every_name, folder, goldens
from .served_model import ServedModel

TOLERANCE = 1e-4
ROOM = 1 << 30

NORM = "no norm of its own"
REFUSED = {
    "seq_bn_ln_before": NORM,
    "seq_bn_ln_after": NORM,
    "seq_bn_ln_after_residual": NORM,
    "double_seq_bn_both_ln": NORM,
    "par_bn_ln_before": NORM,
    "par_bn_ln_after": NORM,
}
"""What the library computes and the primitives do not express, and a part of the reason."""

SHUFFLED = {"noreft_long_suffix": range(3, 4)}
"""Lengths of prompts whose rows the library mixes up: more than the head, less than the tail."""

NAMES = every_name()
SERVED = [
    name
    for name in NAMES
    # transformers' cache has keys in every layer: a prefix in some is served in test_kinds.py
    if name.split("/")[1] not in {*REFUSED, "prefix_flat_leave_out", "prefix_mlp_leave_out"}
]

Model = tuple[PreTrainedModel, ServedBase]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> Callable[[str], Model]:
    """A family's base, as transformers runs it and as adapters are lowered for it."""
    loaded: dict[str, Model] = {}

    def load(family: str) -> Model:
        if family not in loaded:
            path = tiny_model(family)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            loaded[family] = model.eval(), load_base(path, torch.float32)
        return loaded[family]

    return load


def logprobs(model: ServedModel, golden: Golden) -> tuple[Tensor, Tensor]:
    """Of the prompt's tokens from the second, and rows (tokens, vocab) after the prompt."""
    ids, start = golden.prompt + golden.tokens, len(golden.prompt) - 1
    rows = model.logits(ids[:-1], golden.prompt).log_softmax(-1)
    following = torch.tensor(golden.prompt[1:], dtype=torch.int64)
    return rows[:start].gather(1, following[:, None])[:, 0], rows[start:]


@pytest.mark.parametrize("name", SERVED)
def test_tokens_and_logprobs_are_the_librarys(name: str, models: Callable[[str], Model]) -> None:
    family, variant = name.split("/")
    transformers_model, base = models(family)
    adapter = lower(folder(name), base, ROOM)
    model = ServedModel(transformers_model, base, Lowered(adapter.parts, adapter.prefix))
    checked = 0
    for golden in goldens(name):
        if len(golden.prompt) in SHUFFLED.get(variant, ()):
            continue
        of_prompt, rows = logprobs(model, golden)
        expected = torch.tensor(golden.prompt_logprobs)
        torch.testing.assert_close(of_prompt, expected, atol=TOLERANCE, rtol=0)
        assert rows.argmax(-1).tolist() == golden.tokens
        best = rows.max(-1).values
        torch.testing.assert_close(best, torch.tensor(golden.logprobs), atol=TOLERANCE, rtol=0)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[1] in REFUSED])
def test_what_no_primitive_expresses_is_refused_by_name(
    name: str, models: Callable[[str], Model]
) -> None:
    family, variant = name.split("/")
    with pytest.raises(AdapterUnsupported, match=REFUSED[variant]):
        lower(folder(name), models(family)[1], ROOM)


def test_every_family_is_there() -> None:
    """Files that are missing from a checkout would make the other tests pass by being empty."""
    assert {name.split("/")[0] for name in SERVED} == {"llama", "qwen2", "qwen3", "gpt2"}
    assert len(SERVED) > 150
