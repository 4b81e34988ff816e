"""Adapters of every kind on one base, with what the library that made each gives for a prompt."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedModel

from .adapterhub_golden import GOLDENS, Golden
from .peft_zoo import VARIANTS, Configure, PeftOracle, Variant
from .plain_zoo import PLAIN_VARIANTS, said_variant

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
MAX_TOKENS = 10
LENGTHS = (1, 3, 4, 9, 17, 40)
VOCABULARY = range(3, 300)
PLAIN = (*(variant.name for variant in PLAIN_VARIANTS), "said")


@dataclass(frozen=True)
class Case:
    """One request of one adapter.

    Attributes:
        name: Of the adapter, ``None`` for the base.
        folder: As the library saved it.
        prompt: Token ids.
        token_ids: The library's greedy ones, the end token ignored.
        logprobs: Of ``token_ids``.
    """

    name: str | None
    folder: Path | None
    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]


NORMALISED = "it normalises inside the bottleneck"
REFUSED_GOLDENS: Mapping[str, str] = {
    "seq_bn_ln_before": NORMALISED,
    "seq_bn_ln_after": NORMALISED,
    "seq_bn_ln_after_residual": NORMALISED,
    "par_bn_ln_before": NORMALISED,
    "par_bn_ln_after": NORMALISED,
    "double_seq_bn_both_ln": NORMALISED,
}
"""What AdapterHub computes and we do not, and the reason that the refusal gives."""

SHUFFLED = {("noreft_long_suffix", 3)}
"""Name and length of the prompt where AdapterHub writes ReFT's rows to other tokens' positions.

It does so where a prompt is shorter than the suffix and there is a prefix too: a token would depend
on a later one.
"""


def names(family: str) -> list[str]:
    """Of every adapter on a tiny base of this family."""
    return [
        *(f"peft-{variant.name}" for variant in variants(family)),
        *(f"adapterhub-{golden.name}" for golden in goldens(family)),
        *(f"plain-{name}" for name in PLAIN),
    ]


def variants(family: str) -> list[Variant]:
    """PEFT's adapters on a tiny base of this family."""
    return [each for each in VARIANTS if each.served and family in each.families]


def demo_variants() -> list[Variant]:
    """One of every kind for the demo base; in its first and last layer alone, where PEFT can.

    All thirty layers of some kinds take PEFT minutes.
    """
    firsts = {each.kind: each for each in reversed(variants("llama"))}
    return [replace(each, config=_in_two_layers(each)) for each in firsts.values()]


def goldens(family: str) -> list[Golden]:
    """AdapterHub's adapters on a base of this family that are served."""
    return [each for each in GOLDENS if each.family == family and each.name not in REFUSED_GOLDENS]


def peft_cases(
    oracle: PeftOracle, chosen: list[Variant], folder: Path, max_tokens: int = MAX_TOKENS
) -> Iterator[Case]:
    """Save each variant's adapter and ask PEFT what it generates."""
    for seed, variant in enumerate(chosen):
        choose = random.Random(seed)
        tokens = choose.choices(VOCABULARY, k=choose.choice(LENGTHS))
        prompt = variant.prompt(tokens)
        saved = oracle.save(variant, folder / variant.name, seed)
        found = oracle.generate(prompt, max_tokens, saved)
        yield Case(f"peft-{variant.name}", saved, prompt, found.token_ids, found.logprobs)


def golden_cases(family: str) -> Iterator[Case]:
    """What AdapterHub gave, one case a prompt."""
    for golden in goldens(family):
        expected = golden.expected
        for prompt, token_ids, logprobs in zip(
            expected.prompts, expected.tokens, expected.logprobs, strict=True
        ):
            if (golden.name, len(prompt)) not in SHUFFLED:
                yield Case(f"adapterhub-{golden.name}", golden.folder, prompt, token_ids, logprobs)


def plain_cases(oracle: PeftOracle, folder: Path) -> Iterator[Case]:
    """Save each delta in the plain format and change the model by hand."""
    for seed, variant in enumerate((*PLAIN_VARIANTS, said_variant(oracle.model))):
        prompt = random.Random(seed).choices(VOCABULARY, k=LENGTHS[seed % len(LENGTHS)])
        saved = variant.save(oracle.model, folder / variant.name, seed)
        found = variant.generate(oracle, prompt, MAX_TOKENS, seed)
        yield Case(f"plain-{variant.name}", saved, prompt, found.token_ids, found.logprobs)


def base_cases(oracle: PeftOracle, max_tokens: int = MAX_TOKENS) -> Iterator[Case]:
    """The bare base between them."""
    for seed, length in enumerate(LENGTHS):
        prompt = random.Random(-seed - 1).choices(VOCABULARY, k=length)
        found = oracle.generate(prompt, max_tokens)
        yield Case(None, None, prompt, found.token_ids, found.logprobs)


def _in_two_layers(variant: Variant) -> Configure:
    def configure(family: str, base: PreTrainedModel) -> PeftConfig:
        config = variant.config(family, base)
        if getattr(config, "layers_to_transform", 0) is None and config.target_modules:
            config.layers_to_transform = [0, base.config.num_hidden_layers - 1]
        return config

    return configure
